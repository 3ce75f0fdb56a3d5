"""Whole training states as people have them: what mirrors no parameter, and what mirrors oddly."""

import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import yaml
from convert_helpers import bits, restore, save
from flax import nnx, serialization
from flax.training.train_state import TrainState

from linen_nnx import RuleBook, RuleError, Twin
from linen_nnx.cli import main
from linen_nnx.disk.convert import convert
from linen_nnx.disk.planning import plan_conversion
from linen_nnx.proof.verify import verify

LIBRARY = Path(__file__).parents[1] / "README.md"
DENSE = {"linen": "params/d/{leaf}", "nnx": "a/{leaf}"}
PARAMS = {"d": {"kernel": jnp.ones((6, 3)), "bias": jnp.arange(3.0)}}


def book(*rules: Any) -> RuleBook:
    return RuleBook.from_dict({"version": 1, "rules": list(rules)})


RENAME = book(DENSE)


def train_state(tx, params=PARAMS, **fields):
    kind = type("Own", (TrainState,), {"__annotations__": dict.fromkeys(fields, Any)})
    kind = __import__("flax").struct.dataclass(kind) if fields else TrainState
    return kind.create(apply_fn=None, params=params, tx=tx, **fields)


def stepped(state, times=2):
    """The state after some updates by gradients that differ from one element to the next."""
    grads = jax.tree.map(
        lambda x: jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape), state.params
    )
    for _ in range(times):
        state = state.apply_gradients(grads=grads)
    return state


def passes(checks):
    return all(check.passed is not False for check in checks)


def refused(path, rules, to="nnx", **options):
    """Why a conversion is refused."""
    with pytest.raises(RuleError) as caught:
        plan_conversion(path, to, rules, **options)
    return str(caught.value)


# Fields of one's own


def test_an_array_of_ones_own_goes_along_and_is_listed(tmp_path):
    state = train_state(optax.adam(0.1), obs_mean=jnp.arange(6.0))
    save(tmp_path / "linen", state)
    result = convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=RENAME)
    assert result.reports[0]["as_they_are"] == ["obs_mean"]
    assert (restore(tmp_path / "nnx")["obs_mean"] == state.obs_mean).all()
    assert passes(verify(tmp_path / "linen", tmp_path / "nnx"))


@pytest.mark.parametrize(
    "rule",
    [
        {"linen": "obs_mean", "ops": [{"op": "drop"}]},
        {"linen": "{field}", "ops": [{"op": "drop"}]},
        {"linen": "own/{rest...}", "ops": [{"op": "drop"}]},
    ],
)
def test_a_rule_drops_a_field_of_the_training_state(tmp_path, rule):
    fields = {"obs_mean": jnp.arange(6.0), "own": {"a": jnp.ones(2), "b": jnp.ones(2)}}
    if rule["linen"] == "{field}":
        fields.pop("own")
    save(tmp_path / "linen", {"params": PARAMS, **fields})
    result = convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=book(DENSE, rule))
    dropped = {path.split("/")[0] for path in result.reports[0]["dropped"]}
    assert dropped == {"own" if rule["linen"].startswith("own") else "obs_mean"}
    assert not dropped & restore(tmp_path / "nnx").keys()
    assert passes(verify(tmp_path / "linen", tmp_path / "nnx"))


def test_a_field_that_is_dropped_in_part_keeps_the_rest(tmp_path):
    save(tmp_path / "linen", {"params": PARAMS, "own": {"a": jnp.ones(2), "b": jnp.zeros(2)}})
    drop = {"linen": "own/a", "ops": [{"op": "drop"}]}
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=book(DENSE, drop))
    assert list(restore(tmp_path / "nnx")["own"]) == ["b"]


def test_a_rule_renames_a_field_of_the_training_state_there_and_back(tmp_path):
    save(tmp_path / "linen", {"params": PARAMS, "obs_mean": jnp.arange(6.0)})
    rules = book(DENSE, {"linen": "obs_mean", "nnx": "inputs/mean"})
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=rules)
    assert (restore(tmp_path / "nnx")["inputs"]["mean"] == jnp.arange(6.0)).all()
    convert(tmp_path / "nnx", tmp_path / "back", "linen")
    assert bits(restore(tmp_path / "back")) == bits(restore(tmp_path / "linen"))


def test_a_parameters_name_outside_of_any_mirror_is_refused_until_a_rule_drops_it(tmp_path):
    odd = {"d": {"kernel": jnp.ones((6, 3))}, "note": jnp.ones(1)}
    save(tmp_path / "linen", {"params": PARAMS, "odd": odd})
    assert "drop it by a rule, {linen: 'odd/d/kernel', ops: [{op: drop}]}" in refused(
        tmp_path / "linen", RENAME
    )
    drop = {"linen": "odd/d/kernel", "ops": [{"op": "drop"}]}
    assert plan_conversion(tmp_path / "linen", "nnx", book(DENSE, drop)).dropped == ["odd/d/kernel"]


def advised(why, rules):
    """The book with the rule that a message advises."""
    (text,) = set(re.findall(r"\{(?:linen|nnx): .*?\}(?:\]\})?", why))
    return book(*rules.to_dict()["rules"], yaml.safe_load(text))


@pytest.mark.parametrize("side", ["linen", "nnx"])
def test_the_rule_that_a_refusal_advises_works(tmp_path, side):
    odd = {"d": {"kernel": jnp.ones((6, 3))}, "note": jnp.ones(1)}
    model = {"params": PARAMS} if side == "linen" else {"model": nnx.state(Linear(nnx.Rngs(0)))}
    if side == "nnx":
        odd["a"] = odd.pop("d")
    save(tmp_path / side, {**model, "odd": odd})
    to = "nnx" if side == "linen" else "linen"
    why = refused(tmp_path / side, RENAME, to)
    conversion = plan_conversion(tmp_path / side, to, advised(why, RENAME))
    assert conversion.dropped == [f"odd/{'d' if side == 'linen' else 'a'}/kernel"]


# Optimizers


STACK = book(
    {
        "linen": "params/d/{leaf}",
        "nnx": "a/{i}/{leaf}",
        "ops": [{"op": "stack", "capture": "i", "axis": 0}],
    }
)
STACKED = {"d": {"kernel": jnp.ones((2, 6, 5)), "bias": jnp.zeros((2, 5))}}


def own_transformation(length):
    """An optimizer that keeps a row of numbers, as one may write it."""
    return optax.GradientTransformation(
        lambda params: {"row": jnp.zeros(length), "mu": params},
        lambda updates, state, params=None: (updates, state),
    )


def test_a_row_that_may_depend_on_the_form_is_refused_until_a_rule_says_otherwise(tmp_path):
    whole = sum(leaf.size for leaf in jax.tree.leaves(STACKED))
    save(tmp_path / "linen", train_state(own_transformation(whole), STACKED))
    why = refused(tmp_path / "linen", STACK)
    assert "else go on with a fresh optimizer (--reset-optimizer)" in why
    kept = advised(why, STACK)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=kept)
    row = restore(tmp_path / "nnx")["optimizer"]["opt_state"]["row"]["value"]
    assert row.shape == (whole,)
    plan_conversion(tmp_path / "linen", "nnx", STACK, reset_optimizer=True)


def test_a_row_that_cannot_depend_on_the_form_goes_along(tmp_path):
    save(tmp_path / "linen", train_state(own_transformation(11), STACKED))
    conversion = plan_conversion(tmp_path / "linen", "nnx", STACK)
    assert conversion.as_they_are == ("opt_state/row",)


def test_all_parameters_in_a_row_are_refused_where_their_order_changes(tmp_path):
    params = {"a": {"kernel": jnp.ones((2, 3))}, "b": {"kernel": jnp.ones((2, 3))}}
    save(tmp_path / "linen", train_state(own_transformation(12), params))
    same = book(
        {"linen": "params/a/{leaf}", "nnx": "p/{leaf}"},
        {"linen": "params/b/{leaf}", "nnx": "q/{leaf}"},
    )
    other = book(
        {"linen": "params/a/{leaf}", "nnx": "q/{leaf}"},
        {"linen": "params/b/{leaf}", "nnx": "p/{leaf}"},
    )
    plan_conversion(tmp_path / "linen", "nnx", same)
    assert "in the order of their names, which changes" in refused(tmp_path / "linen", other)


def test_muon_which_chooses_by_axes_is_refused_where_rules_change_their_number(tmp_path):
    save(tmp_path / "linen", train_state(optax.contrib.muon(0.1), STACKED))
    why = refused(tmp_path / "linen", STACK)
    assert "chooses its parameters by their number of axes" in why
    plan_conversion(tmp_path / "linen", "nnx", STACK, reset_optimizer=True)


def test_a_mask_that_may_choose_by_axes_is_noted(tmp_path):
    tx = optax.masked(optax.trace(0.9), lambda params: jax.tree.map(lambda x: x.ndim > 2, params))
    save(tmp_path / "linen", train_state(tx, STACKED))
    notes = plan_conversion(tmp_path / "linen", "nnx", STACK).notes
    assert any("whose number of axes rules change" in note for note in notes)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("layers", [2, 9])
def test_factored_moments_follow_a_stack_or_are_refused(tmp_path, axis, layers):
    one = {"d": {"kernel": jnp.ones((6, 5))}}
    kernel = jnp.stack([one["d"]["kernel"] * (n + 1) for n in range(layers)], axis)
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=4)
    state = stepped(train_state(tx, {"d": {"kernel": kernel}}), 1)
    save(tmp_path / "linen", state)
    rule = {"linen": "params/d/{leaf}", "nnx": "a/{i}/{leaf}"}
    rules = book({**rule, "ops": [{"op": "stack", "capture": "i", "axis": axis}]})
    if layers > 6:  # the stack's own axis is the longest: optax factors along it
        assert "is factored along other axes" in refused(tmp_path / "linen", rules)
        return
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=rules)
    found = restore(tmp_path / "nnx")["optimizer"]["opt_state"]
    grads = jnp.cos(jnp.arange(kernel.size, dtype=kernel.dtype)).reshape(kernel.shape)
    for layer in range(layers):
        alone = train_state(tx, one)
        due = alone.apply_gradients(grads={"d": {"kernel": jnp.take(grads, layer, axis)}}).opt_state
        for field in ("v_row", "v_col", "v"):
            got = found[field]["a"][str(layer)]["kernel"]["value"]
            want = getattr(due, field)["d"]["kernel"]
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=1e-6)
    convert(tmp_path / "nnx", tmp_path / "back", "linen")
    assert bits(restore(tmp_path / "back", state)) == bits(state)


# Parameters that only one side has


FILL = {"op": "init", "fill": "ones", "shape": [3], "dtype": "float32"}
KERNEL = {"d": {"kernel": jnp.ones((6, 3))}}
NEW = {"nnx": "a/bias", "ops": [FILL]}
MOVED = {"linen": "params/d/kernel", "nnx": "a/kernel"}


def test_a_parameter_that_a_rule_fills_gets_the_moments_of_a_new_one(tmp_path):
    tx = optax.MultiSteps(optax.adamw(1e-3, mu_dtype="bfloat16"), 2)
    save(tmp_path / "linen", stepped(train_state(tx, KERNEL)))
    result = convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=book(MOVED, NEW))
    optimizer = restore(tmp_path / "nnx")["optimizer"]["opt_state"]
    mu = optimizer["inner_opt_state"]["0"]["mu"]["a"]["bias"]["value"]
    assert mu.dtype == jnp.bfloat16
    assert not mu.any() and mu.shape == (3,)
    assert not optimizer["acc_grads"]["a"]["bias"]["value"].any()
    filled = result.reports[0]["filled"]
    assert [path.split("/")[-3] for path in filled].count("a") == 4
    assert passes(verify(tmp_path / "linen", tmp_path / "nnx"))
    restored = restore(tmp_path / "nnx", _fresh_nnx(tx))
    assert restored["model"]["a"]["bias"][...].shape == (3,)


def _fresh_nnx(tx):
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(6, 3, rngs=rngs)

    model = Model(nnx.Rngs(0))
    return {
        "model": nnx.state(model),
        "optimizer": nnx.state(nnx.Optimizer(model, tx, wrt=nnx.Param)),
    }


def test_an_average_of_a_parameter_that_is_filled_starts_at_its_value(tmp_path):
    save(tmp_path / "linen", {"params": KERNEL, "ema": KERNEL})
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=book(MOVED, NEW))
    assert (restore(tmp_path / "nnx")["ema"]["a"]["bias"]["value"] == 1).all()


def test_a_moment_whose_start_is_not_known_is_refused(tmp_path):
    save(tmp_path / "linen", train_state(optax.adagrad(0.1), KERNEL))
    why = refused(tmp_path / "linen", book(MOVED, NEW))
    assert "sum_of_squares/a/bias` starts with a value that is not known" in why
    plan_conversion(tmp_path / "linen", "nnx", book(MOVED, NEW), reset_optimizer=True)


def test_a_new_parameter_under_a_mask_is_refused_until_a_tree_is_given(tmp_path):
    params = {"d": KERNEL["d"], "e": {"scale": jnp.ones(3)}}
    tx = optax.masked(
        optax.scale_by_adam(),
        lambda p: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key in ("d", "a"), p),
    )
    save(tmp_path / "linen", train_state(tx, params))
    rules = book(MOVED, NEW, {"linen": "params/e/scale", "nnx": "e/scale"})
    assert "give a checkpoint of the target's form with --like" in refused(
        tmp_path / "linen", rules
    )

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.Linear(6, 3, rngs=rngs)
            self.e = nnx.LayerNorm(3, use_bias=False, rngs=rngs)

    model = Model(nnx.Rngs(0))
    mask = optax.masked(
        optax.scale_by_adam(),
        lambda p: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "a", p),
    )
    fresh = {
        "model": nnx.state(model),
        "optimizer": nnx.state(nnx.Optimizer(model, mask, wrt=nnx.Param)),
    }
    save(tmp_path / "fresh", fresh)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=rules, like=tmp_path / "fresh")
    restore(tmp_path / "nnx", fresh)


def test_an_init_rule_with_captures_fills_where_its_node_is(tmp_path):
    blocks = {f"l_{n}": {"kernel": jnp.ones((6, 3))} for n in range(3)}
    save(tmp_path / "linen", train_state(optax.adam(0.1), blocks))
    moved = {"linen": "params/l_{i}/kernel", "nnx": "l/{i}/kernel"}
    rules = book(moved, {"nnx": "l/{i}/bias", "ops": [FILL]})
    conversion = plan_conversion(tmp_path / "linen", "nnx", rules)
    paths = [path for path in conversion.filled if path.startswith("model")]
    assert paths == [f"model/l/{n}/bias/value" for n in range(3)]


def test_an_init_rule_that_cannot_be_placed_takes_its_places_from_a_tree_or_the_twin(
    tmp_path, capsys
):
    save(tmp_path / "linen", train_state(optax.adam(0.1), KERNEL))
    bare = {"op": "init", "fill": "zeros"}
    rules = book(MOVED, {"nnx": "{node}/bias", "ops": [bare]})
    why = refused(tmp_path / "linen", rules)
    assert "--like" in why
    assert "--twin" in why
    save(tmp_path / "fresh", _fresh_nnx(optax.adam(0.1)))
    plan_conversion(tmp_path / "linen", "nnx", rules, like=tmp_path / "fresh")
    rules.save(tmp_path / "r.yaml")
    words = ["plan", str(tmp_path / "linen"), "--to", "nnx", "--rules", str(tmp_path / "r.yaml")]
    assert main([*words, "--twin", f"{__file__}:TWIN"]) == 0
    assert "optimizer/opt_state/0/mu/a/bias/value" in capsys.readouterr().out


def test_a_given_tree_comes_before_the_twin_and_a_note_says_where_they_differ(tmp_path):
    save(tmp_path / "linen", train_state(optax.adam(0.1)))
    save(tmp_path / "fresh", _fresh_nnx(optax.adam(0.1)))
    specs = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in PARAMS["d"].items()}
    halves = {name: jax.ShapeDtypeStruct(x.shape, "bfloat16") for name, x in PARAMS["d"].items()}

    def notes(specs):
        at_home = {f"a/{name}": spec for name, spec in specs.items()}
        options = {"like": tmp_path / "fresh", "specs": at_home}
        return " ".join(plan_conversion(tmp_path / "linen", "nnx", RENAME, **options).notes)

    assert "given by --like" not in notes(specs)
    assert "given by --like, where the model's code has others: `a/" in notes(halves)
    assert "`a/kernel`" in notes({**specs, "kernel": halves["kernel"]})
    assert "`a/bias`" not in notes({**specs, "kernel": halves["kernel"]})


# `TrainState.params` that holds the whole dict of variables


@pytest.mark.parametrize("given", [False, True])
def test_the_level_params_comes_off_and_goes_on_again(tmp_path, given):
    tx = optax.MultiSteps(optax.adam(0.1), 2)
    state = stepped(train_state(tx, {"params": PARAMS}, ema={"params": PARAMS}))
    save(tmp_path / "linen", state)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=RENAME)
    restored = restore(tmp_path / "nnx")
    mu = restored["optimizer"]["opt_state"]["inner_opt_state"]["0"]["mu"]
    assert list(mu) == list(restored["ema"]) == list(restored["model"]) == ["a"]
    assert passes(verify(tmp_path / "linen", tmp_path / "nnx"))
    if given:
        (tmp_path / "nnx" / "report.json").unlink()
    options = {"like": tmp_path / "linen"} if given else {}
    convert(tmp_path / "nnx", tmp_path / "back", "linen", rules=RENAME, **options)
    assert bits(restore(tmp_path / "back", state)) == bits(state)


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="d")(x)


class Linear(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.a(x)


class Bare(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, use_bias=False, name="d")(x)


TWIN = Twin(linen=Bare, nnx=Linear, inputs=lambda: (jnp.ones((2, 6)),))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", ["whole dict", "sm3"])
def test_the_models_prove_a_step_from_states_of_odd_forms(tmp_path, name):
    tx = optax.sm3(0.1) if name == "sm3" else optax.MultiSteps(optax.adam(0.1), 1)
    params = PARAMS if name == "sm3" else {"params": PARAMS}
    save(tmp_path / "linen", stepped(train_state(tx, params)))
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=RENAME)
    twin = Twin(linen=Dense, nnx=Linear, inputs=lambda: (jnp.ones((2, 6)),), optimizer=tx)
    checks = {
        check.name: check for check in verify(tmp_path / "linen", tmp_path / "nnx", twin=twin)
    }
    assert passes(checks.values()), checks
    assert checks["one optimizer step from the carried state"].passed


# Which side a tree is of


def test_an_nnx_state_below_params_is_known_by_the_rule_book(tmp_path):
    save(tmp_path / "nnx", {"params": nnx.state(nnx.Linear(6, 3, rngs=nnx.Rngs(0))), "epoch": 3})
    rules = book({"linen": "params/d/{leaf}", "nnx": "{leaf}"})
    convert(tmp_path / "nnx", tmp_path / "linen", "linen", rules=rules)
    assert list(restore(tmp_path / "linen")["params"]) == ["d"]


def test_where_the_book_cannot_tell_from_says_it(tmp_path, capsys):
    boxed = {"params": {"d": {"kernel": {"value": jnp.ones((6, 3))}}}}
    save(tmp_path / "it", boxed)
    book({"linen": "params/{rest...}", "nnx": "{rest...}"}).save(tmp_path / "r.yaml")
    words = [str(tmp_path / "it"), str(tmp_path / "out"), "--rules", str(tmp_path / "r.yaml")]
    assert main(["run", *words, "--to", "nnx"]) == 1
    assert "say which with --from linen or --from nnx" in capsys.readouterr().err
    assert main(["run", *words, "--to", "nnx", "--from", "linen"]) == 0
    assert main(["verify", *words[:2]]) == 0
    assert main(["run", *words, "--to", "nnx", "--from", "nnx"]) == 1
    assert "is said to be in nnx form already" in capsys.readouterr().err


# Random state and constants of nnx


class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.drop = nnx.Dropout(0.1, rngs=rngs)
        self.a = nnx.Linear(6, 3, rngs=rngs)
        self.table = jnp.arange(3.0)


def test_random_state_and_constants_are_left_out_and_said(tmp_path, capsys):
    model = Noisy(nnx.Rngs(0))
    tx = optax.adamw(1e-3)
    saved = {
        "model": nnx.state(model),
        "optimizer": nnx.state(nnx.Optimizer(model, tx, wrt=nnx.Param)),
    }
    save(tmp_path / "nnx", {**saved, "epoch": 3})
    fresh = train_state(tx)
    save(
        tmp_path / "like",
        {"params": fresh.params, "opt_state": fresh.opt_state, "step": 0, "epoch": 0},
    )
    RENAME.save(tmp_path / "r.yaml")
    words = ["run", str(tmp_path / "nnx"), str(tmp_path / "linen"), "--to", "linen"]
    words += ["--rules", str(tmp_path / "r.yaml"), "--like", str(tmp_path / "like")]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "random state of nnx is left out" in out
    assert "`drop/rngs/count`, `drop/rngs/key`" in out
    assert "no nnx.Variable) are left out: `table`" in out


def test_the_restore_of_the_docs_works_with_dropout_constants_and_extra_entries(tmp_path):
    tx = optax.adam(0.1)
    state = stepped(train_state(tx, obs_mean=jnp.arange(6.0), ema=PARAMS))
    step_of(tmp_path / "linen", default=state)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=RENAME)
    (snippet,) = re.findall(r"```python\n(import orbax.*?)```", LIBRARY.read_text(), re.S)
    assert "nnx.Not(nnx.RngState)" in snippet
    run = snippet.replace("/absolute/path/converted", str(tmp_path / "nnx"))
    names = {"MyNnx": lambda width, rngs: Noisy(rngs), "tx": tx}
    exec(run, names)
    assert (names["model"].a.kernel[...] == state.params["d"]["kernel"]).all()
    moments = names["optimizer"].opt_state[0].mu
    assert (moments["a"]["kernel"][...] == state.opt_state[0].mu["d"]["kernel"]).all()


# The model alone


def test_a_file_that_cannot_hold_the_state_is_refused_unless_the_model_alone_is_wanted(
    tmp_path, capsys
):
    save(tmp_path / "linen", train_state(optax.adam(0.1)))
    RENAME.save(tmp_path / "r.yaml")
    for name in ("nnx.safetensors", "nnx"):
        words = [str(tmp_path / "linen"), str(tmp_path / name), "--to", "nnx"]
        words += ["--rules", str(tmp_path / "r.yaml")]
        if name.endswith("safetensors"):
            assert main(["run", *words]) == 1
            assert "leave them out with --model-only" in capsys.readouterr().err
        assert main(["run", *words, "--model-only"]) == 0
        assert main(["verify", *words]) == 0
    assert set(restore(tmp_path / "nnx")) == {"a"}


def test_verify_knows_of_a_fresh_optimizer_by_the_report(tmp_path):
    save(tmp_path / "linen", train_state(optax.adam(0.1)))
    RENAME.save(tmp_path / "r.yaml")
    words = [str(tmp_path / "linen"), str(tmp_path / "nnx")]
    more = ["--to", "nnx", "--rules", str(tmp_path / "r.yaml"), "--reset-optimizer"]
    assert main(["run", *words, *more]) == 0
    assert main(["verify", *words]) == 0


# Files of Flax, which hold whole states


CHAIN = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def test_a_whole_state_in_msgpack_goes_to_nnx_and_back_into_msgpack(tmp_path):
    state = stepped(train_state(CHAIN))
    source, back = tmp_path / "state.msgpack", tmp_path / "back.msgpack"
    source.write_bytes(serialization.to_bytes(state))
    convert(source, tmp_path / "nnx", "nnx", rules=RENAME)
    restored = restore(tmp_path / "nnx", _fresh_nnx(CHAIN))
    moment = restored["optimizer"]["opt_state"][1][0]["mu"]["a"]["kernel"]
    assert (moment[...] == state.opt_state[1][0].mu["d"]["kernel"]).all()
    assert passes(verify(source, tmp_path / "nnx"))
    convert(tmp_path / "nnx", back, "linen")
    assert bits(serialization.from_bytes(train_state(CHAIN), back.read_bytes())) == bits(state)


def test_a_whole_state_in_msgpack_restores_into_a_train_state_by_orbax(tmp_path):
    model = Linear(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, CHAIN, wrt=nnx.Param)
    optimizer.update(model, nnx.state(model, nnx.Param))
    whole = {"model": nnx.state(model), "optimizer": nnx.state(optimizer)}
    pure = nnx.to_pure_dict(nnx.State(whole))
    (tmp_path / "nnx.msgpack").write_bytes(serialization.msgpack_serialize(pure))
    fresh = train_state(CHAIN)
    save(tmp_path / "fresh", fresh)
    options = {"rules": RENAME, "like": tmp_path / "fresh"}
    convert(tmp_path / "nnx.msgpack", tmp_path / "linen", "linen", **options)
    state = restore(tmp_path / "linen", fresh)
    assert int(state.step) == 1
    assert (state.params["d"]["kernel"] == model.a.kernel[...]).all()


# Items of a step beside the training state's


def step_of(path, **items):
    with ocp.CheckpointManager(path) as manager:
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        manager.save(1, args=ocp.args.Composite(**args))
    return path


def item_of(path, name, like=None):
    with ocp.CheckpointManager(path) as manager:
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore(like)})
        return manager.restore(1, args=args)[name]


def test_averages_in_an_item_of_their_own_are_converted_in_the_same_run(tmp_path, capsys):
    tx = optax.adam(0.1)
    state, ema = stepped(train_state(tx)), jax.tree.map(lambda x: x / 3, PARAMS)
    items = {"state": state, "ema": ema, "tables": {"rows": jnp.ones((4, 2))}}
    step_of(tmp_path / "linen", **items)
    RENAME.save(tmp_path / "r.yaml")
    words = [str(tmp_path / "linen"), str(tmp_path / "nnx")]
    assert main(["run", *words, "--to", "nnx", "--rules", str(tmp_path / "r.yaml")]) == 0
    said = capsys.readouterr().out
    assert "item `ema` is converted, too: 2 leaves" in said
    assert "item `tables` mirrors no parameter, and goes along as it is" in said
    fresh = _fresh_nnx(tx)
    item_of(tmp_path / "nnx", "state", fresh)
    found = item_of(tmp_path / "nnx", "ema", fresh["model"])
    assert (found["a"]["kernel"][...] == ema["d"]["kernel"]).all()
    assert main(["verify", *words]) == 0
    assert main(["run", words[1], str(tmp_path / "back"), "--to", "linen"]) == 0
    for name, tree in items.items():
        assert bits(item_of(tmp_path / "back", name, tree)) == bits(tree)


def test_an_item_beside_that_differs_fails_the_proof(tmp_path):
    step_of(tmp_path / "linen", state={"params": PARAMS}, ema=PARAMS)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=RENAME)
    other = jax.tree.map(lambda x: x + 1, PARAMS)
    step_of(tmp_path / "other", state={"params": PARAMS}, ema=other)
    assert not passes(verify(tmp_path / "other", tmp_path / "nnx"))


def test_model_and_optimizer_in_items_of_their_own_are_converted_together(tmp_path):
    tx = optax.adamw(1e-3)
    state = stepped(train_state(tx))
    items = {"model_state": {"params": state.params}, "optimizer_state": state.opt_state}
    step_of(tmp_path / "linen", **items)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=RENAME, item="model_state")
    fresh = _fresh_nnx(tx)
    item_of(tmp_path / "nnx", "model_state", fresh["model"])
    moments = item_of(tmp_path / "nnx", "optimizer_state", fresh["optimizer"]["opt_state"])
    assert (moments[0]["mu"]["a"]["kernel"][...] == state.opt_state[0].mu["d"]["kernel"]).all()
    assert passes(verify(tmp_path / "linen", tmp_path / "nnx"))
    convert(tmp_path / "nnx", tmp_path / "back", "linen")
    for name, tree in items.items():
        assert bits(item_of(tmp_path / "back", name, tree)) == bits(tree)
    reset = convert(
        tmp_path / "linen", tmp_path / "reset", "nnx",
        rules=RENAME, item="model_state", reset_optimizer=True,
    )  # fmt: skip
    assert not (reset.out / "1" / "optimizer_state").exists()
    words = ["run", str(tmp_path / "nnx"), str(tmp_path / "one.safetensors"), "--to", "linen"]
    assert main(words) == 1
    assert main([*words, "--model-only"]) == 0
    assert passes(verify(tmp_path / "linen", tmp_path / "reset"))
