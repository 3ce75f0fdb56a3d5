"""The functional interface of the stages: strict where the bridge is silent."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import STAGES
from flax import nnx

from linen_nnx import RuleBook
from linen_nnx.book.tree import flatten, unflatten
from model import families
from model.families import Family
from model.stages import Stage, VariablesError, translate

OPTIONS: dict[str, dict[str, Any]] = {
    "transformer": {
        "family": "transformer", "depth": 2, "width": 8, "heads": 2, "mlp_factor": 2, "vocab": 11,
        "length": 6, "dropout": 0.5, "dtype": "float32", "remat": False, "scan": False,
    },
    "convnet": {
        "family": "convnet", "depth": 1, "width": 4, "channels": 1, "classes": 3, "dropout": 0.5,
        "dtype": "float32", "remat": False,
    },
    "mlp": {
        "family": "mlp", "features": 5, "hidden": 4, "outputs": 2, "dropout": 0.5,
        "dtype": "float32",
    },
}  # fmt: skip
INPUTS = {
    "transformer": jnp.arange(18).reshape(3, 6) % 11,
    "convnet": jnp.linspace(0, 1, 3 * 8 * 8).reshape(3, 8, 8, 1),
    "mlp": jnp.linspace(-1, 1, 15).reshape(3, 5),
}
KEY = jax.random.key(3)


def family(name: str, **options: Any) -> Family:
    return families.create(OPTIONS[name] | options)


def staged(name: str, stage: str, **options: Any) -> tuple[Stage, dict[str, Any]]:
    """A stage and the Linen twin's initial variables, translated to it."""
    made = family(name, **options)
    linen = flatten(Stage("linen", made, INPUTS[name]).init(jax.random.key(0)))
    rules = RuleBook.load(made.rules_path)
    variables = unflatten(translate(linen, rules, "linen", stage))
    return Stage(stage, made, INPUTS[name]), variables


def apply(stage: Stage, variables: Any, name: str, **how: Any) -> Any:
    return jax.jit(lambda v: stage.apply(v, INPUTS[name], **how))(variables)


def bits(tree: Any) -> dict[str, bytes]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in leaves}


@pytest.mark.parametrize("name", OPTIONS)
def test_outputs_and_updates_are_the_same_bits_at_every_stage(name: str) -> None:
    for how in ({"train": False}, {"train": True, "key": KEY}):
        outputs, updates = set(), set()
        for stage_name in STAGES:
            stage, variables = staged(name, stage_name)
            output, update = apply(stage, variables, name, **how)
            outputs.add(np.asarray(output).tobytes())
            own = RuleBook.load(stage.family.rules_path).of_collection("batch_stats")
            linen = translate(flatten(update), own, stage_name, "linen") if update else {}
            updates.add(tuple(sorted(bits(linen).items())))
        assert len(outputs) == 1
        assert len(updates) == 1


@pytest.mark.parametrize("stage_name", STAGES)
@pytest.mark.parametrize("name", OPTIONS)
def test_initial_variables_are_what_apply_demands(name: str, stage_name: str) -> None:
    stage = Stage(stage_name, family(name), INPUTS[name])
    variables = flatten(stage.init(KEY))
    assert {p: (v.shape, v.dtype) for p, v in variables.items()} == {
        p: (v.shape, v.dtype) for p, v in stage.abstract.items()
    }
    assert any(np.ptp(np.asarray(leaf)) > 0 for leaf in variables.values())


@pytest.mark.parametrize("stage_name", STAGES)
def test_a_dropout_mask_depends_on_the_key_and_differs_between_layers(stage_name: str) -> None:
    stage, variables = staged("mlp", stage_name)
    one, _ = apply(stage, variables, "mlp", train=True, key=KEY)
    again, _ = apply(stage, variables, "mlp", train=True, key=KEY)
    other, _ = apply(stage, variables, "mlp", train=True, key=jax.random.key(4))
    off, _ = apply(stage, variables, "mlp", train=False)
    assert bits(one) == bits(again)
    assert bits(one) != bits(other)
    assert bits(one) != bits(off)


@pytest.mark.parametrize("stage_name", STAGES)
def test_training_without_a_key_is_refused(stage_name: str) -> None:
    stage, variables = staged("mlp", stage_name)
    with pytest.raises(ValueError, match="needs the dropout key"):
        stage.apply(variables, INPUTS["mlp"], train=True)


@pytest.mark.parametrize("stage_name", STAGES)
def test_batch_statistics_move_in_training_and_only_there(stage_name: str) -> None:
    stage, variables = staged("convnet", stage_name)
    _, updates = apply(stage, variables, "convnet", train=True, key=KEY)
    _, none = apply(stage, variables, "convnet", train=False)
    assert none == {}
    before, after = flatten(variables["batch_stats"]), flatten(updates["batch_stats"])
    assert before.keys() == after.keys()
    assert all((np.asarray(before[path]) != np.asarray(after[path])).any() for path in before)


@pytest.mark.parametrize("stage_name", STAGES)
def test_every_difference_is_named_in_one_error(stage_name: str) -> None:
    stage, variables = staged("convnet", stage_name)
    leaves = flatten(variables)
    paths = [path for path in leaves if path.startswith("params/encoder")]
    missing, misshapen, misspelt, mistyped = paths[0], paths[1], paths[2], paths[3]
    del leaves[missing]
    leaves[misshapen] = jnp.zeros((7, *leaves[misshapen].shape))
    leaves[misspelt + "x"] = leaves.pop(misspelt)
    leaves[mistyped] = leaves[mistyped].astype(jnp.bfloat16)
    leaves["params/head/extra"] = jnp.zeros(())
    wrong = unflatten({p: v for p, v in leaves.items() if not p.startswith("batch_stats")})

    with pytest.raises(VariablesError) as error:
        apply(stage, wrong, "convnet", train=False)

    text = str(error.value)
    statistics = [path for path in stage.abstract if path.startswith("batch_stats")]
    for path in (missing, misspelt, *statistics):
        assert f"missing     {path}: expected" in text
    for path in (misspelt + "x", "params/head/extra"):
        assert f"unexpected  {path}: got" in text
    assert f"mismatch    {misshapen}: got float32[7, " in text
    assert f"mismatch    {mistyped}: got bfloat16" in text
    assert f"({len(statistics) + 6} differences)" in text
    assert stage_name in text


@pytest.mark.parametrize("stage_name", STAGES)
def test_no_variables_at_all_are_refused(stage_name: str) -> None:
    stage, _ = staged("mlp", stage_name)
    with pytest.raises(VariablesError, match="4 differences"):
        apply(stage, {}, "mlp", train=False)


@pytest.mark.parametrize("stage_name", STAGES)
def test_the_gradient_of_the_shared_table_is_the_sum_over_its_two_uses(
    monkeypatch: pytest.MonkeyPatch, stage_name: str
) -> None:
    """The table embeds the bytes, and the head scores with it: one leaf, two paths of gradient.

    Each byte occurs once, so that every entry is a sum of two numbers, in whatever order; and
    nothing is jitted, so that the three gradients are made of the same operations, fused nowhere.
    """
    tokens = jnp.array([[7, 2, 9, 0, 4, 5]])
    weights = jnp.linspace(-1, 1, 6 * 11).reshape(1, 6, 11)

    def gradient() -> np.ndarray:
        stage, variables = staged("transformer", stage_name)
        leaves = flatten(variables)
        (path,) = [path for path in leaves if path.endswith(TABLE)]

        def loss(table: Any) -> Any:
            full = unflatten({**leaves, path: table})
            outputs, _ = stage.apply(full, tokens, train=True, key=KEY)
            return (outputs * weights).sum()

        return np.asarray(jax.grad(loss)(leaves[path]))

    whole = gradient()
    with monkeypatch.context() as patch:
        cut_head(patch, features=False, shared=True)
        embedding = gradient()
    with monkeypatch.context() as patch:
        cut_head(patch, features=True, shared=False)
        scoring = gradient()
    assert np.abs(embedding).max() > 0
    assert np.abs(scoring).max() > 0
    np.testing.assert_array_equal(whole, embedding + scoring)


TABLE = ("Embed_0/embedding", "token_embed/embedding")


def cut_head(patch: pytest.MonkeyPatch, *, features: bool, shared: bool) -> None:
    """Lets no gradient through one of the head's two inputs, in both twins."""
    from model.linen import transformer as linen
    from model.nnx import transformer as in_nnx

    def stopped(base: Any) -> Any:
        class Head(base):
            def __call__(self, x: Any, lent: Any, *, train: bool, key: Any) -> Any:
                x = jax.lax.stop_gradient(x) if features else x
                lent = jax.lax.stop_gradient(lent) if shared else lent
                return super().__call__(x, lent, train=train, key=key)

        return Head

    for twin in (linen, in_nnx):
        patch.setattr(twin, "Head", stopped(twin.Head))


def test_rng_state_inside_an_nnx_half_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from model.nnx import mlp

    class Streams(mlp.Encoder):
        def __init__(self, cfg: Any, *, rngs: nnx.Rngs) -> None:
            super().__init__(cfg, rngs=rngs)
            self.drop = nnx.Dropout(0.1, rngs=rngs)

    monkeypatch.setattr(mlp, "Encoder", Streams)
    for stage_name in ("nnx_in_linen", "linen_in_nnx", "nnx"):
        with pytest.raises(ValueError, match=r"drop/rngs/count is RNG state"):
            Stage(stage_name, family("mlp"), INPUTS["mlp"])


def test_a_parameter_type_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from model.nnx import mlp

    class Scale(nnx.Param):
        pass

    class Scaled(mlp.Encoder):
        def __init__(self, cfg: Any, *, rngs: nnx.Rngs) -> None:
            super().__init__(cfg, rngs=rngs)
            self.scale = Scale(jnp.ones(3))

    monkeypatch.setattr(mlp, "Encoder", Scaled)
    with pytest.raises(ValueError, match=r"scale is a Scale, a subclass of nnx\.Param"):
        Stage("nnx", family("mlp"), INPUTS["mlp"])


@pytest.mark.parametrize("stage_name", STAGES[1:])
def test_a_variable_type_of_its_own_is_a_collection_at_every_stage(
    monkeypatch: pytest.MonkeyPatch, stage_name: str
) -> None:
    from model.nnx import mlp

    tally = type(f"Tally{stage_name}", (nnx.Variable,), {})  # new to flax, whatever ran before

    class Counting(mlp.Encoder):
        def __init__(self, cfg: Any, *, rngs: nnx.Rngs) -> None:
            super().__init__(cfg, rngs=rngs)
            self.count = tally(jnp.zeros(3))

    monkeypatch.setattr(mlp, "Encoder", Counting)
    stage = Stage(stage_name, family("mlp"), INPUTS["mlp"])
    assert f"Tally{stage_name}/encoder/count" in stage.abstract
    assert stage.mutable == [f"Tally{stage_name}"]


def test_a_linen_head_with_statistics_keeps_its_updates_inside_nnx(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from model.linen import mlp

    class Counting(nn.Module):
        cfg: Any

        @nn.compact
        def __call__(self, x: Any, shared: Any, *, train: bool, key: Any) -> Any:
            return nn.BatchNorm(use_running_average=not train)(x)

    monkeypatch.setattr(mlp, "Head", Counting)
    results = []
    for stage_name in ("nnx_in_linen", "linen_in_nnx"):
        stage = Stage(stage_name, family("mlp"), INPUTS["mlp"])
        variables = unflatten(
            {p: jnp.full(s.shape, 0.5, s.dtype) for p, s in stage.abstract.items()}
        )
        _, updates = apply(stage, variables, "mlp", train=True, key=KEY)
        assert bits(updates) != bits({"batch_stats": variables["batch_stats"]})
        results.append(bits(updates))
    assert results[0] == results[1]


def test_an_unknown_family_or_option_is_named() -> None:
    from configs.build import ConfigError

    with pytest.raises(ConfigError, match=r"did you mean.*transformer"):
        families.create({"family": "transfomer"})
    options = OPTIONS["convnet"].copy()
    options["widht"] = options.pop("width")
    with pytest.raises(ConfigError, match=r"(?s)model\.widht.*model\.width.*missing"):
        families.create(options)
