"""`init_from` a checkpoint of a script that knows nothing of this template."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import QUIET, STAGES
from flax import nnx
from linen_nnx import Refusal
from linen_nnx.ladder.nesting import renamed
from strangers import script
from strangers.net.nnx import Port

import model
from training import compose, data, datasets, evaluation, loop, moving
from training.assemble import Setup, prepare
from training.runtime import start
from training.runtime.errors import Refused

model.__path__.append(str(Path(__file__).parent / "strangers"))

TX = optax.chain(optax.clip(1.0), optax.adamw(1e-2))
SETTINGS = (
    "experiment=diabetes", "model.family=net", "model.hidden=8", "model.dropout=0.3",
    f"seed={script.SEED}", "data.batch=16", "steps=7", "optimizer.clip_norm=null",
    "optimizer.weight_decay=0",
    "optimizer.chain=[{clip: {max_delta: 1.0}}, {adamw: {learning_rate: 0.01, mask: null}}]",
    "eval.every=100", "checkpoint.every=100", "checkpoint.best=false", *QUIET,
)  # fmt: skip


def batches(first: int, end: int) -> list[Any]:
    """The batches of steps `first` to `end` of a run with these settings."""
    drawn = data.train_iterator(datasets.load(datasets.create(compose(*SETTINGS).data)))
    drawn.skip(first)
    found = [next(drawn) for _ in range(first, end)]
    drawn.close()
    return found


@pytest.fixture(scope="module")
def state() -> script.State:
    """What the stranger's script has come to after four steps."""
    return script.train(script.start(TX, 10), batches(0, 4))[0]


@pytest.fixture(scope="module")
def own(state: script.State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoints that it has saved."""
    path = tmp_path_factory.mktemp("stranger") / "checkpoints"
    script.save(path, state)
    return path


def losses(run_dir: Path) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if row["split"] == "train"]


@pytest.mark.long
def test_all_four_stages_go_on_as_the_script_itself_does(
    state: script.State, own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, due = script.train(state, batches(4, 7))
    for stage in STAGES:
        where = f"run_dir={tmp_path / stage}"
        loop.train(compose(*SETTINGS, where, f"init_from={own}", f"stage={stage}"))
        assert losses(tmp_path / stage) == due, stage
    printed = capsys.readouterr().out
    assert printed.count("left out, as nothing here is called so: `key`") == len(STAGES)
    assert printed.count("goes on with batch 5, as if it had read the 4 before") == len(STAGES)


@pytest.fixture(scope="module")
def setups() -> dict[str, Setup]:
    return {stage: prepare(compose(*SETTINGS, f"stage={stage}")) for stage in ("linen", "nnx")}


def taken(setup: Setup, path: Path, **settings: Any) -> Any:
    """The state that a run would begin from."""
    setup = copy.copy(setup)
    setup.cfg = dataclasses.replace(setup.cfg, init_from=str(path), **settings)
    vars(setup).pop("run", None)  # which is the other configuration's
    return moving.moved(setup, start.given(setup.run, path))


def bits(tree: Any) -> list[Any]:
    """Every leaf by its path and bits, whatever the containers."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True) for path, _ in leaves]
    return sorted((n, np.asarray(x).tobytes()) for n, (_, x) in zip(names, leaves, strict=True))


def expected(setup: Setup, state: script.State) -> Any:
    """The same by the ladder, in memory."""
    parts = {"params": state.params, "batch_stats": state.batch_stats}
    moved = setup.stage.ladder.move({**parts, "opt_state": state.opt_state}, "linen", "nnx")
    tree = moved if setup.cfg.stage == "nnx" else {**parts, "opt_state": state.opt_state}
    return {**tree, "step": jnp.int32(state.step)}


def nnx_state(setup: Setup, state: script.State) -> Any:
    """What a script in nnx would save, with the same values."""
    port = Port(10, 8, 0.3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(port, TX, wrt=nnx.Param)
    moved = setup.stage.ladder.move(
        (state.params, state.batch_stats, state.opt_state), "linen", "nnx"
    )
    nnx.update(port, {**merged(*moved[:2])})
    filled = jax.tree.leaves(moved[2])
    old = nnx.state(optimizer)
    old["opt_state"] = jax.tree.unflatten(jax.tree.structure(old["opt_state"]), filled)
    old["step"].set_value(jnp.uint32(state.step))
    return {"model": nnx.state(port), "optimizer": old}


def merged(*trees: Any) -> Any:
    result: dict[str, Any] = {}
    for tree in trees:
        for name, node in tree.items():
            result[name] = {**result.get(name, {}), **node}
    return result


def renamed_tree(state: script.State) -> Any:
    """The same state of a model whose author calls everything otherwise."""
    names = {"Dense_0": "first", "BatchNorm_0": "bn", "Dense_1": "last"}

    def call(tree: Any) -> Any:
        if isinstance(tree, dict):
            return {names.get(name, name): call(node) for name, node in tree.items()}
        if isinstance(tree, tuple):
            nodes = list(map(call, tree))
            return type(tree)(*nodes) if hasattr(tree, "_fields") else tuple(nodes)
        return tree

    entries = ("step", "params", "batch_stats", "opt_state")
    return {entry: call(getattr(state, entry)) for entry in entries}


def nested_tree(state: script.State) -> Any:
    """The same where `TrainState.params` holds all that `init` has returned under that name."""

    def is_params(node: Any) -> bool:
        return isinstance(node, dict) and "Dense_0" in node

    def nest(node: Any) -> Any:
        return {"params": node} if is_params(node) else node

    tree = {entry: getattr(state, entry) for entry in ("step", "params", "opt_state")}
    return {**jax.tree.map(nest, tree, is_leaf=is_params), "batch_stats": state.batch_stats}


def orbax(path: Path, tree: Any) -> Path:
    with ocp.StandardCheckpointer() as writer:
        writer.save(path, tree)
    return path


def msgpack(path: Path, tree: Any) -> Path:
    path.with_suffix(".msgpack").write_bytes(flax.serialization.to_bytes(tree))
    return path.with_suffix(".msgpack")


TO_NNX = """\
version: 1
rules:
  - {linen: "params/first/{leaf}", nnx: "inner/{leaf}"}
  - {linen: "params/last/{leaf}", nnx: "out/{leaf}"}
  - {linen: "params/bn/scale", nnx: "norm/scale"}
  - {linen: "params/bn/bias", nnx: "norm/bias"}
  - {linen: "batch_stats/bn/mean", nnx: "norm/mean"}
  - {linen: "batch_stats/bn/var", nnx: "norm/var"}
"""
TO_LINEN = """\
version: 1
rules:
  - {linen: "params/first/{leaf}", nnx: "params/Dense_0/{leaf}"}
  - {linen: "params/last/{leaf}", nnx: "params/Dense_1/{leaf}"}
  - {linen: "params/bn/{leaf}", nnx: "params/BatchNorm_0/{leaf}"}
  - {linen: "batch_stats/bn/{leaf}", nnx: "batch_stats/BatchNorm_0/{leaf}"}
"""
LAYOUTS: dict[str, tuple[Callable[..., Any], str | None]] = {
    "TrainState": (lambda path, state, setup: orbax(path, state.replace(key=None)), None),
    "msgpack": (lambda path, state, setup: msgpack(path, state.replace(key=None)), None),
    "nested": (lambda path, state, setup: orbax(path, nested_tree(state)), None),
    "nnx.State": (lambda path, state, setup: orbax(path, nnx_state(setup, state)), None),
    "other names": (lambda path, state, setup: orbax(path, renamed_tree(state)), TO_NNX),
    "other Linen names": (lambda path, state, setup: msgpack(path, renamed_tree(state)), TO_LINEN),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_name_leads_to_the_same_bits(
    state: script.State, setups: dict[str, Setup], tmp_path: Path, layout: str
) -> None:
    write, rules = LAYOUTS[layout]
    path = write(tmp_path / "own", state, setups["linen"])
    settings = {}
    if rules is not None:
        (tmp_path / "rules.yaml").write_text(rules)
        settings["init_rules"] = str(tmp_path / "rules.yaml")
    for setup in setups.values():
        assert bits(taken(setup, path, **settings)) == bits(expected(setup, state))


def test_the_evaluation_of_a_checkpoint_is_that_of_the_original_model(
    state: script.State, own: Path, setups: dict[str, Setup], capsys: pytest.CaptureFixture[str]
) -> None:
    # The variables are arguments, as in a run: of constants, XLA would compute some things ahead,
    # and round otherwise.
    @jax.jit
    def total(variables: Any, batch: Any, rows: Any) -> Any:
        out = state.apply_fn(variables, batch["inputs"], train=False)
        return (jnp.square(out - batch["targets"])[:, 0] * rows).sum()

    setup = setups["linen"]
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    pairs = list(data.eval_batches(setup.dataset))
    added = sum(float(total(variables, *pair)) for pair in pairs)
    due = added / sum(float(rows.sum()) for _, rows in pairs)

    found = {stage: evaluation.evaluate(s, taken(s, own))["loss"] for stage, s in setups.items()}
    assert found["linen"] == due
    assert found["nnx"] == pytest.approx(due, rel=1e-6)
    evaluation.report(compose(*SETTINGS, "mode=eval", f"init_from={own}", "stage=linen"))
    assert f"step 4, stage linen: validation loss {due:.6f}" in capsys.readouterr().out


def test_what_cannot_be_taken_is_named_in_one_message(
    state: script.State, setups: dict[str, Setup], tmp_path: Path
) -> None:
    params = {
        **state.params,
        "Dense_1": {"kernel": jnp.ones((9, 1))},
        "tail": {"bias": jnp.ones(1)},
    }
    tx = optax.adamw(optax.constant_schedule(1e-2))
    other = {
        "step": 4, "params": params, "batch_stats": state.batch_stats, "opt_state": tx.init(params),
    }  # fmt: skip
    with pytest.raises(Refused) as refused:
        taken(setups["nnx"], orbax(tmp_path / "own", other))
    message = str(refused.value)
    for text in (
        "missing     params/Dense_1/bias: expected float32[1]",
        "unexpected  params/tail/bias: got float32[1]",
        "mismatch    params/Dense_1/kernel: got float32[9, 1], expected float32[8, 1]",
        "the optimizer's state is 0 (count, mu, nu), 2 (count); here it is 1/0 (count, mu, nu)",
        "init_rules=FILE",
        "init_optimizer=fresh",
    ):
        assert text in message, message


def test_a_fresh_optimizer_is_said_aloud(
    state: script.State, setups: dict[str, Setup], tmp_path: Path, capsys: Any
) -> None:
    path = orbax(tmp_path / "own", {"params": state.params, "batch_stats": state.batch_stats})
    with pytest.raises(Refusal, match="it has no `opt_state`"):
        taken(setups["nnx"], path)
    found = taken(setups["nnx"], path, init_optimizer="fresh")
    anew = setups["nnx"].steps.start({k: found[k] for k in ("params", "batch_stats")})
    assert bits(found) == bits(anew)
    printed = capsys.readouterr().out
    assert "holds no count of steps: no step has been made" in printed
    assert "init_optimizer=fresh: opt_state begin anew at step 0" in printed


def test_an_average_is_taken_by_what_is_in_it(
    state: script.State, tmp_path: Path, capsys: Any
) -> None:
    setup = prepare(compose(*SETTINGS, "optimizer.ema=0.9", "stage=linen"))
    tree = {
        entry: getattr(state, entry) for entry in ("step", "params", "batch_stats", "opt_state")
    }
    tree["ema_params"] = jax.tree.map(lambda x: x + 1, state.params)
    found = taken(setup, orbax(tmp_path / "own", tree))
    assert bits(found["ema"]) == bits(tree["ema_params"])
    assert "`ema_params` mirrors the parameters, and is taken for `ema`" in capsys.readouterr().out


PARAMS = {"d": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
CHAINS = {
    "a chain in a chain": (
        optax.chain(optax.clip(1.0), optax.adamw(optax.constant_schedule(1.0))),
        optax.chain(
            optax.scale_by_adam(), optax.scale_by_learning_rate(optax.constant_schedule(1.0))
        ),
    ),
    "a chain of one": (optax.scale_by_adam(), optax.chain(optax.clip(1.0), optax.adam(1.0))),
    "inside of another": (
        optax.MultiSteps(optax.adam(1.0), 2),
        optax.MultiSteps(optax.chain(optax.identity(), optax.adam(1.0)), 2),
    ),
}


@pytest.mark.parametrize("name", CHAINS)
def test_optimizers_nested_in_another_way_are_the_same(name: str) -> None:
    one, two = (named(tx.init(PARAMS)) for tx in CHAINS[name])
    found = renamed(one, two, named(PARAMS).keys(), named(PARAMS).keys())
    assert len(found) == len(set(found.values()))
    places = {new.rpartition("/")[2] for new in found.values()}
    assert places == {old.rpartition("/")[2] for old in found}
    assert set(found.values()) <= {path[: len(new)] for path in two for new in found.values()}


def named(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
