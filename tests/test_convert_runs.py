"""This template's own run directories change their stage, and stay run directories."""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import yaml
from conftest import bits
from linen_nnx import RuleBook, RuleError
from linen_nnx.book.stages import STAGES, forms_at
from linen_nnx.book.tree import flatten, unflatten
from linen_nnx.disk import digests
from linen_nnx.disk.convert import convert
from linen_nnx.disk.planning import plan_conversion
from linen_nnx.proof.verify import verify

from training.runtime.runs import RUNS

BOOK = RuleBook.from_dict(
    {
        "version": 1,
        "rules": [
            {"linen": "params/encoder/Block_{i}/{name}", "nnx": "encoder/blocks/{i}/{name}"},
            {
                "linen": "params/encoder/Scan/kernel",
                "nnx": "encoder/deep/{i}/kernel",
                "ops": [{"op": "stack", "capture": "i", "axis": 0}],
            },
            {"linen": "batch_stats/encoder/Norm_0/{name}", "nnx": "encoder/norm/{name}"},
            {
                "linen": "params/head/Dense_0/kernel",
                "nnx": "head/out/kernel",
                "ops": [{"op": "transpose", "perm": [1, 0]}],
            },
        ],
    }
)


def halves(stage, variables):
    """Linen variables in the form of a stage, by the rule book alone."""
    leaves = flatten(variables)
    result = {}
    for half, form in forms_at(stage, ("encoder", "head"), ("encoder",)).items():
        part = {path: leaf for path, leaf in leaves.items() if path.split("/")[1] == half}
        if form == "nnx":
            sub = BOOK.within(half)
            for move in sub.plan(part, "nnx").moves:
                collection = move.sources[0].split("/")[0]
                arrays = move.run([part[path] for path in move.sources])
                paths = (f"{collection}/{path}" for path in move.targets)
                part = {**part, **dict(zip(paths, arrays, strict=True))}
                for path in move.sources:
                    del part[path]
        result |= part
    return unflatten(result)


def linen_variables(seed):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return jnp.asarray(rng.standard_normal(shape).astype(np.float32))

    blocks = {f"Block_{i}": {"kernel": leaf(4, 4), "bias": leaf(4)} for i in range(12)}
    return {
        "params": {
            "encoder": {**blocks, "Scan": {"kernel": leaf(3, 4, 4)}},
            "head": {"Dense_0": {"kernel": leaf(4, 2)}},
        },
        "batch_stats": {"encoder": {"Norm_0": {"mean": leaf(4), "var": leaf(4)}}},
    }


def training_state(stage, step):
    """What the trainer saves: variables, optimizer and EMA; moments are told apart by values."""
    variables = halves(stage, linen_variables(step))
    other = halves(stage, linen_variables(step + 100))["params"]
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.multi_transform(
            {"encoder": optax.adamw(1e-3), "head": optax.sgd(0.1, momentum=0.9)},
            {"encoder": "encoder", "head": "head"},
        ),
    )
    opt_state = tx.init(variables["params"])
    _, opt_state = tx.update(other, opt_state, variables["params"])
    return {"step": jnp.int32(step), **variables, "opt_state": opt_state, "ema": other}


def make_run(path, stage):
    config = {"stage": stage, "model": {"family": "tiny"}, "steps": 9}
    path.mkdir()
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    BOOK.save(path / "rules.yaml")
    (path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 0.1}\n')
    for root, steps in (("checkpoints", (5, 9)), ("best", (5,))):
        with ocp.CheckpointManager(path / root) as manager:
            for step in steps:
                items = ocp.args.Composite(
                    state=ocp.args.StandardSave(training_state(stage, step)),
                    data=ocp.args.JsonSave({"position": step}),
                    run=ocp.args.JsonSave(
                        {"config": config, "rules": BOOK.to_dict(), "stage": stage}
                    ),
                )
                manager.save(step, args=items)
        for step in steps:
            digests.write(path / root / str(step))
    return path


def load(path, step, like):
    with ocp.CheckpointManager(path) as manager:
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(like),
            data=ocp.args.JsonRestore(),
            run=ocp.args.JsonRestore(),
        )
        return manager.restore(step, args=items)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {stage: make_run(folder / stage, stage) for stage in STAGES}


@pytest.mark.sampled(4)
@pytest.mark.parametrize(("before", "after"), list(itertools.permutations(STAGES, 2)))
def test_a_run_changes_its_stage(tmp_path, runs, before, after):
    out = tmp_path / "out"
    convert(runs[before], out, after, runs=RUNS)
    for root, step in (("checkpoints", 9), ("best", 5)):
        expected = training_state(after, step)
        restored = load(out / root, step, jax.tree.map(jnp.zeros_like, expected))
        assert bits(restored.state) == bits(expected)
        assert restored.data == {"position": step}
        assert restored.run["stage"] == restored.run["config"]["stage"] == after
        assert digests.check(out / root / str(step))
    assert yaml.safe_load((out / "config.yaml").read_text())["stage"] == after
    assert RuleBook.load(out / "rules.yaml") == BOOK
    assert (out / "metrics.jsonl").read_bytes() == (runs[before] / "metrics.jsonl").read_bytes()
    checks = verify(runs[before], out, runs=RUNS)
    assert all(c.passed for c in checks if "files beside" not in c.name)  # nothing vouches for them


def test_a_run_goes_to_every_stage_and_back(tmp_path, runs):
    for stage in STAGES:
        if stage != "nnx_in_linen":
            convert(runs["nnx_in_linen"], tmp_path / stage, stage, runs=RUNS)
            convert(tmp_path / stage, tmp_path / f"{stage} back", "nnx_in_linen", runs=RUNS)
            back = tmp_path / f"{stage} back" / "checkpoints" / "9" / "state" / "_METADATA"
            source = runs["nnx_in_linen"] / "checkpoints" / "9" / "state" / "_METADATA"
            old, new = (json.loads(p.read_text())["tree_metadata"] for p in (source, back))
            assert {json.dumps(v) for v in old.values()} == {json.dumps(v) for v in new.values()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_runs_checkpoint_goes_to_the_stock_layouts(tmp_path, runs, stage):
    step = runs[stage] / "checkpoints" / "9"
    convert(step, tmp_path / "nnx", "nnx", runs=RUNS)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "nnx" / "state")
    assert set(restored) == {"model", "optimizer", "ema"}
    variables = linen_variables(9)
    expected = variables["params"]["head"]["Dense_0"]["kernel"].T
    assert (restored["model"]["head"]["out"]["kernel"]["value"] == expected).all()
    assert restored["optimizer"]["step"]["value"].dtype == np.uint32
    assert not (tmp_path / "nnx" / "run").exists()
    convert(step, tmp_path / "linen", "linen", runs=RUNS)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "linen" / "state", training_state("linen", 0))
    assert bits(restored) == bits(training_state("linen", 9))


def test_a_leaf_in_neither_half_is_refused(tmp_path, runs):
    tree = training_state("linen", 1)
    tree["params"]["tail"] = {"kernel": jnp.ones(3)}
    with ocp.CheckpointManager(tmp_path / "odd") as manager:
        run = {"config": {}, "rules": BOOK.to_dict(), "stage": "linen"}
        items = {"state": ocp.args.StandardSave(tree), "run": ocp.args.JsonSave(run)}
        manager.save(1, args=ocp.args.Composite(**items))
    where = r"`params/tail/kernel` lies in none of the parts \(encoder, head\)"
    with pytest.raises(RuleError, match=where):
        plan_conversion(tmp_path / "odd", "nnx_in_linen", runs=RUNS)


def test_an_unknown_stage_is_named_with_the_nearest(runs):
    with pytest.raises(RuleError, match="did you mean `nnx_in_linen`"):
        plan_conversion(runs["linen"], "nnx_in_line", runs=RUNS)


def rows(run):
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"]) for row in map(json.loads, lines) if row["split"] == "train"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("experiment", "before", "after"),
    [("diabetes", "nnx", "linen"), ("lm", "linen", "nnx"), ("digits", "nnx_in_linen", "linen")],
)
def test_the_plain_train_command_goes_on_in_a_converted_run(
    train, tmp_path, experiment, before, after
):
    uninterrupted = train(experiment, f"stage={after}", "steps=8")
    run = train(experiment, f"stage={before}", "steps=8", "stop_at=4")
    convert(run, tmp_path / "out", after, runs=RUNS)
    assert all(check.passed for check in verify(run, tmp_path / "out", runs=RUNS))
    train(experiment, f"stage={after}", "steps=8", f"run_dir={tmp_path / 'out'}")
    assert rows(tmp_path / "out") == rows(uninterrupted)


def test_a_run_from_before_checkpoints_said_their_parts_is_read_as_ever(train, tmp_path):
    """Written when every model had an encoder and a head, and the stage alone told their forms."""
    old = Path(__file__).parent / "data" / "run_before_parts"
    assert "forms" not in json.loads((old / "checkpoints/4/run/metadata").read_text())
    settings = ("model.hidden=4", "data.batch=8", "optimizer.warmup=1", "optimizer.ema=0.9")
    settings = (*settings, "steps=6", "eval.every=6")

    convert(old, tmp_path / "nnx", "nnx", runs=RUNS)
    checks = verify(old, tmp_path / "nnx", runs=RUNS)
    assert all(check.passed for check in checks)
    convert(tmp_path / "nnx", tmp_path / "back", "nnx_in_linen", runs=RUNS)
    runs = {"linen": old, "nnx": tmp_path / "nnx", "nnx_in_linen": tmp_path / "back"}
    found = [
        rows(train("diabetes", *settings, f"stage={stage}", f"init_from={run}"))
        for stage, run in runs.items()
    ]
    assert found == [found[0]] * 3 and [step for step, _ in found[0]] == [1, 2, 3, 4, 5, 6]
