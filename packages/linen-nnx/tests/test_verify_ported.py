"""Models written in two ways: conversions pass run, stock restore, verify and the way back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from convert_helpers import restore, save
from flax import nnx
from flax.training.train_state import TrainState
from ported import PORTED

from linen_nnx import suggest
from linen_nnx.book.tree import flatten, unflatten
from linen_nnx.cli import main
from linen_nnx.infer.calls import complete
from linen_nnx.infer.trial import equalised

TX = optax.adamw(1e-2)
QUICK = ["tied_head_that_the_port_unties", "key_biases_and_a_mask", "frozen_backbone"]
MANY = sorted(set(PORTED) - set(QUICK))


def trained(twin, book):
    """A Linen training state after a step, whose numbers are nobody's defaults, as a tree."""
    whole = complete(twin)
    flat = flatten(whole.init_linen(whole.linen(), jax.random.key(0), *twin.inputs()))
    random = np.random.default_rng(0)
    for path, leaf in flat.items():
        flat[path] = np.asarray(leaf + random.uniform(0.1, 0.4, leaf.shape), leaf.dtype)
    variables = unflatten(equalised(book, flat))
    params = variables.pop("params")
    state = TrainState.create(apply_fn=None, params=params, tx=TX)
    state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
    return {"params": state.params, "opt_state": state.opt_state, "step": state.step, **variables}


@pytest.fixture
def converted(tmp_path):
    """Converts a trained checkpoint of a twin by the rules that are suggested for it."""

    def convert(name):
        pair = PORTED[name]()
        book = suggest(pair.twin)
        book.save(tmp_path / "rules.yaml")
        save(tmp_path / "linen", trained(pair.twin, book))
        assert run(tmp_path / "linen", tmp_path / "nnx", "nnx", tmp_path / "rules.yaml") == 0
        (tmp_path / "trained_twin.py").write_text(
            "import dataclasses\nimport optax\nfrom ported import PORTED\n"
            f"twin = PORTED[{name!r}]().twin\n"
            "TWIN = dataclasses.replace(twin, optimizer=optax.adamw(1e-2))\n"
        )
        return pair.twin

    return convert


def run(source, out, to, rules):
    return main(["run", str(source), str(out), "--to", to, "--rules", str(rules)])


def verified(folder, capsys, one, two):
    """The exit code of `verify`, and its checks by name."""
    capsys.readouterr()
    twin = ["--twin", f"{folder / 'trained_twin.py'}:TWIN", "--json"]
    code = main(["verify", str(folder / one), str(folder / two), *twin])
    printed = capsys.readouterr()
    assert printed.out, printed.err
    return code, {check["name"]: check for check in json.loads(printed.out)["checks"]}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in MANY)]
)
def test_a_right_conversion_passes_run_restore_verify_and_the_way_back(
    name, converted, tmp_path, capsys
):
    twin = converted(name)

    code, checks = verified(tmp_path, capsys, "linen", "nnx")
    assert code == 0, [check for check in checks.values() if check["passed"] is False]
    assert checks["forward pass, randomised weights"]["passed"]
    assert checks["gradients, randomised weights"]["passed"]

    model = twin.nnx(nnx.Rngs(1))
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    like = {"model": nnx.state(model, nnx.All(nnx.Variable, nnx.Not(nnx.RngState))),
            "optimizer": nnx.state(optimizer)}  # fmt: skip
    assert restore(tmp_path / "nnx", like)

    assert run(tmp_path / "nnx", tmp_path / "back", "linen", tmp_path / "rules.yaml") == 0
    before, after = (flatten(restore(tmp_path / place)["params"]) for place in ("linen", "back"))
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[path], after[path]) for path in before)


@pytest.mark.parametrize(
    ("name", "leaf"),
    [
        ("tied_head_that_the_port_unties", "head/kernel"),
        ("key_biases_and_a_mask", "key/kernel"),
        ("frozen_backbone", "one/bias"),
    ],
)
def test_a_planted_fault_fails(name, leaf, converted, tmp_path, capsys):
    converted(name)
    tree = restore(tmp_path / "nnx")
    place = tree["model"]
    for part in leaf.split("/"):
        parent, place = place, place[part]
    holder = place if isinstance(place, dict) else parent
    key = "value" if isinstance(place, dict) else part
    holder[key] = holder[key] * np.float32(1.01)
    save(tmp_path / "bad", tree)
    for kept in ("report.json", "rules.yaml"):
        (tmp_path / "bad" / kept).write_bytes((tmp_path / "nnx" / kept).read_bytes())

    code, checks = verified(tmp_path, capsys, "linen", "bad")

    assert code == 1
    assert [name for name, check in checks.items() if check["passed"] is False]


def test_what_one_side_freezes_is_named(converted, tmp_path, capsys):
    converted("frozen_backbone")

    _, checks = verified(tmp_path, capsys, "linen", "nnx")

    details = " ".join(checks["gradients, the checkpoint's weights"]["details"])
    assert "`one/kernel`: only nnx trains it, as `stop_gradient` stands elsewhere" in details


def test_moments_of_a_copied_leaf_are_copied_and_a_note_says_so(converted, tmp_path, capsys):
    converted("tied_head_that_the_port_unties")
    output = capsys.readouterr().out

    assert "copied to each of its homes" in output
