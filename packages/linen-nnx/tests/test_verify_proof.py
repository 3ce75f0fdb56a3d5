"""What the proof says of right conversions: exact where it can be, close where not, blind, idle."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from convert_helpers import restore, save
from flax import nnx
from flax.core import unfreeze
from jax.extend.core import jaxpr_as_fun
from pairs import PAIRS
from verify_helpers import TX, book, trained, twin

from linen_nnx import Twin, suggest, verify
from linen_nnx.disk.convert import convert
from linen_nnx.infer.float64 import outputs_and_slopes, widen
from linen_nnx.proof.closeness import gaps

RUN = ("forward pass", "gradients")
STEP, CONTROL = "one optimizer step from the carried state", "a step from a fresh optimizer"


def proof_of_pair(name, tmp_path):
    """The checks of a pair's true rule book, on fresh weights."""
    pair = PAIRS[name]()
    module, inputs = pair.twin.linen(), pair.twin.inputs()
    init = pair.twin.init_linen or (lambda module, key, *inputs: module.init(key, *inputs))
    variables = nn.unbox(unfreeze(init(module, jax.random.key(0), *inputs)))
    save(tmp_path / "linen", jax.tree.map(jnp.asarray, variables))
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=pair.truth)
    return {
        check.name: check for check in verify(tmp_path / "linen", tmp_path / "nnx", twin=pair.twin)
    }


@pytest.mark.parametrize("name", ["transposed_square_kernels", "batch_norm_in_training"])
def test_twins_with_the_same_operations_are_exact(name, tmp_path):
    checks = proof_of_pair(name, tmp_path)

    assert all(c.details[0].startswith("exact") for n, c in checks.items() if n.startswith(RUN))
    assert not any(check.close or check.passed is False for check in checks.values())


@pytest.mark.long
def test_other_operations_of_one_function_are_close_never_exact_and_the_blind_leaf_is_named(
    tmp_path,
):
    checks = proof_of_pair("keys_before_queries", tmp_path)
    run = [check for name, check in checks.items() if name.startswith(RUN)]

    assert all(c.passed and c.close and not c.details[0].startswith("exact") for c in run)
    assert "ulps" in run[0].details[0] and "close, not exact: in float64" in run[0].details[1]
    blind = checks["every leaf is seen by an output"]
    assert blind.passed is None
    assert all("/key/bias` is seen by none" in text for text in blind.details)


def test_a_lossy_rule_is_no_inverse_and_holds_for_these_weights_alone(tmp_path):
    checks = proof_of_pair("gru_cells", tmp_path)

    assert checks["exact inverse"].passed is None
    assert "params/GRUCell_0/hn/bias" in checks["exact inverse"].details[0]
    assert not any(check.passed is False for check in checks.values())


@pytest.fixture(scope="module")
def linen(tmp_path_factory):
    return save(tmp_path_factory.mktemp("proof") / "linen", trained())


@pytest.fixture(scope="module")
def converted(linen):
    convert(linen, linen.parent / "nnx", "nnx", rules=book())
    return linen.parent / "nnx"


def steps(linen, converted, optimizer):
    using = dataclasses.replace(twin, optimizer=optimizer)
    return {c.name.split(",")[0]: c for c in verify(linen, converted, twin=using)}


def test_the_way_from_nnx_to_linen_is_proved_as_well(converted, tmp_path):
    convert(converted, tmp_path / "back", "linen")
    checks = {check.name: check for check in verify(converted, tmp_path / "back", twin=twin)}

    assert all(check.passed and not check.close for check in checks.values())
    kernel = restore(tmp_path / "back")["params"]["blk_11"]["kernel"]
    assert np.array_equal(kernel, trained().params["blk_11"]["kernel"])


def test_a_step_is_proved_only_with_the_optimizer_and_only_with_the_right_one(linen, converted):
    assert steps(linen, converted, TX)[STEP].passed and steps(linen, converted, TX)[CONTROL].passed
    assert steps(linen, converted, None)[STEP].passed is None
    other = steps(linen, converted, optax.lion(1e-2))[STEP]
    assert other.passed is False
    assert "`opt_state/0/mu/blk_0/bias` is missing" in " ".join(other.details)


@pytest.mark.parametrize(
    ("optimizer", "unproved"),
    [(optax.sgd(1e-2), STEP), (optax.sgd(optax.constant_schedule(1e-2)), CONTROL)],
)
def test_a_step_that_a_fresh_optimizer_takes_alike_proves_nothing(tmp_path, optimizer, unproved):
    state = trained()
    state = state.replace(tx=optimizer, opt_state=optimizer.init(state.params))
    save(tmp_path / "linen", state)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=book())

    assert steps(tmp_path / "linen", tmp_path / "nnx", optimizer)[unproved].passed is None


class Recurrent(nnx.Module):
    """Keeps a random key in its state, unless it is told not to."""

    def __init__(self, rngs, key=True):
        self.rnn = nnx.RNN(nnx.SimpleCell(2, 3, rngs=rngs), rngs=key)

    def __call__(self, x):
        carry = jnp.zeros((1, 3)) if self.rnn.rngs is None else None
        return self.rnn(x, initial_carry=carry)


def test_random_state_that_the_result_lacks_is_named_with_the_way_to_restore_without(tmp_path):
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.SimpleCell(3))(x)

    x = jnp.ones((1, 4, 2))
    save(tmp_path / "linen", Linen().init(jax.random.key(0), x))
    keeping = Twin(Linen, Recurrent, lambda: (x,))
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=suggest(keeping))

    def said(twin):
        checks = verify(tmp_path / "linen", tmp_path / "nnx", twin=twin)
        (check,) = (check for check in checks if check.name.startswith("leaves"))
        assert check.passed
        return check.details

    (text,) = said(keeping)
    assert "`rnn/rngs`, is not in it" in text and "nnx.Not(nnx.RngState)" in text
    assert not said(dataclasses.replace(keeping, nnx=lambda rngs: Recurrent(rngs, key=False)))
    model = Recurrent(nnx.Rngs(0))
    with ocp.StandardCheckpointer() as checkpointer:
        with pytest.raises(ValueError, match="rngs"):
            checkpointer.restore(tmp_path / "nnx", nnx.state(model))
        checkpointer.restore(tmp_path / "nnx", nnx.state(model, nnx.Not(nnx.RngState)))


def test_products_asked_for_in_bfloat16_are_taken_in_float64():
    half = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.bfloat16)
    attend = jax.make_jaxpr(jax.nn.dot_product_attention)(half, half, half)
    assert "BF16_BF16_F32" in str(attend)
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=half.shape) for _ in range(3))

    with jax.enable_x64(True):
        wide = np.asarray(jaxpr_as_fun(widen(attend))(*map(jnp.asarray, (query, key, value)))[0])
    scores = np.einsum("bqhd,bkhd->bhqk", query, key) / np.float32(8**0.5)
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhqk,bkhd->bqhd", weights, value)

    assert np.abs(wide - expected).max() < 1e-6


def test_an_infinite_slope_of_a_statistic_leaves_the_gradient_of_the_outputs_as_it_is():
    def model(x):
        return [x * x, jnp.sqrt(x)]

    _, (slope,) = outputs_and_slopes(model, [jnp.zeros(3)], [], 1)

    assert np.isfinite(slope).all()


def test_nan_is_an_infinite_difference_wherever_it_stands():
    nan, one = np.array([np.nan, 2.0]), np.array([1.0, 2.0])
    for left, right in ((nan, one), (one, nan), (nan, nan)):
        found = gaps({"first": one, "second": left}, {"first": one, "second": right}, 1e-3)
        assert found == {"first": 0.0, "second": np.inf}
