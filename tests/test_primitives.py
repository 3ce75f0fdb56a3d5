"""The five documented facts, over random inputs, and the pitfalls that their docstrings name."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from linen_nnx import RuleError

from model.primitives import (
    DENSE,
    coexistence_parity,
    mixed_train_step,
    nnx_inside_linen,
    shared_params_two_modules,
    state_translation,
)

# Values vary much and shapes little: each new shape compiles anew.
SEEDS = st.integers(0, 2**32 - 2)
FEATURES = st.sampled_from([1, 5])
RATES = st.floats(1e-4, 1e-3)


def arrays(*shapes, bound):
    values = st.floats(-bound, bound, width=32)
    return st.sampled_from(shapes).flatmap(
        lambda shape: hnp.arrays(np.float32, shape, elements=values)
    )


VECTORS = arrays((1,), (7,), bound=1024)
ONE_LAYER = [coexistence_parity, shared_params_two_modules, state_translation, nnx_inside_linen]
many = settings(max_examples=50, deadline=None)


def same_bits(one, other):
    one, other = np.asarray(one), np.asarray(other)
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def nnx_output(seed, x, features, **options):
    return nnx.Linear(x.shape[-1], features, rngs=nnx.Rngs(seed), **options)(jnp.asarray(x))


# --- the facts


@many
@given(SEEDS, VECTORS, FEATURES)
def test_one_kernel_and_bias_give_the_same_bits_in_both_frameworks(seed, x, features):
    result = coexistence_parity(seed, x, features)

    expected = nnx_output(seed, x, features).sum()
    assert same_bits(result, np.array([expected, expected, 0], np.float32))


@pytest.mark.long
@many
@given(SEEDS, VECTORS, FEATURES)
def test_two_modules_with_one_kernel_add_up_to_twice_either(seed, x, features):
    result = shared_params_two_modules(seed, x, features)

    assert result.shape == (features,)
    assert same_bits(result, 2 * nnx_output(seed, x, features, use_bias=False))


@many
@given(SEEDS, VECTORS, FEATURES)
def test_a_split_state_renamed_gives_the_same_sum_in_linen(seed, x, features):
    result = state_translation(seed, x, features)

    expected = nnx_output(seed, x, features).sum()
    assert same_bits(result, np.array([expected, expected], np.float32))


class Wrapped(nnx.Module):
    def __init__(self, inputs, outputs, *, rngs):
        self.linear = nnx.Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x):
        return self.linear(x)


@many
@given(SEEDS, VECTORS, FEATURES)
def test_a_wrapped_nnx_class_computes_with_its_own_linen_parameters(seed, x, features):
    result = nnx_inside_linen(seed, x, features)

    module = bridge.to_linen(Wrapped, x.shape[-1], features)
    own = module.init(jax.random.PRNGKey(seed), x)["params"]["linear"]
    assert result.shape == (features,)
    assert same_bits(result, jnp.asarray(x) @ own["kernel"] + own["bias"])


def reference_step(seed, x, y, lr):
    """`mixed_train_step` without either framework's modules in the computation."""
    encoder = nnx.Linear(x.shape[-1], 4, rngs=nnx.Rngs(seed))
    head = nn.Dense(y.shape[-1]).init(jax.random.PRNGKey(seed + 1), jnp.zeros(4))["params"]
    params = [encoder.kernel[...], encoder.bias[...], head["kernel"], head["bias"]]

    def loss(params):
        w, b, v, c = params
        return jnp.mean((jax.nn.relu(x @ w + b) @ v + c - y) ** 2)

    before, grads = jax.value_and_grad(loss)(params)
    return before, loss([p - lr * g for p, g in zip(params, grads, strict=True)])


@pytest.mark.long
@many
@given(SEEDS, arrays((1,), (7,), bound=2), arrays((1,), (3,), bound=2), RATES)
def test_one_step_through_both_frameworks_decreases_the_loss(seed, x, y, lr):
    before, after = mixed_train_step(seed, x, y, lr)

    assert after < before or before == 0  # nothing is left to learn where the guess is right
    assert np.allclose([before, after], reference_step(seed, x, y, lr), rtol=1e-5)


@pytest.mark.long
@settings(max_examples=50, deadline=None)
@given(SEEDS, arrays((6, 3), bound=2), arrays((6, 2), bound=2), RATES)
def test_the_step_takes_batches_too(seed, x, y, lr):
    before, after = mixed_train_step(seed, x, y, lr)

    assert after < before or before == 0  # nothing is left to learn where the guess is right
    assert np.allclose([before, after], reference_step(seed, x, y, lr), rtol=1e-5)


def test_a_rate_of_zero_leaves_the_loss_alone():
    before, after = mixed_train_step(0, [1.0, 2.0], [3.0], 0)

    assert same_bits(before, after)


# --- arguments


@pytest.mark.parametrize("fact", ONE_LAYER)
def test_whole_floats_lists_and_other_dtypes_give_the_same_float32_bits(fact):
    plain = fact(3, np.array([1, -2, 4], np.float32), 2)

    assert isinstance(plain, jax.Array)
    assert plain.dtype == jnp.float32
    assert plain.ndim == 1
    for x in ([1, -2, 4], np.array([1.0, -2, 4]), np.array([1, -2, 4]), jnp.array([1, -2, 4.0])):
        assert same_bits(fact(3.0, x, np.float64(2)), plain)
    assert same_bits(fact(np.uint32(3), jnp.array([1, -2, 4], jnp.bfloat16), jnp.int32(2)), plain)


def test_the_step_takes_whole_floats_lists_and_other_dtypes():
    plain = mixed_train_step(3, np.array([1, 2], np.float32), np.array([0.5], np.float32), 0.01)

    assert plain.dtype == jnp.float32
    assert plain.shape == (2,)
    assert same_bits(mixed_train_step(3.0, [1, 2], np.array([0.5]), np.float64(0.01)), plain)


BAD_SEEDS = [-1, 0.5, 2**32 - 1, float("nan"), float("inf"), "3", [3], 1j, None]
BAD_FEATURES = [0, -2, 1.5, float("nan"), "2", [2], None]
BAD_VECTORS = {
    "shape (1, 2); expected 1-D": [[1.0, 2.0]],
    "shape (); expected 1-D": 1.0,
    "shape (0,); expected 1-D and not empty": [],
    "x is not an array": [[1.0], [1.0, 2.0]],
    "dtype complex128; expected real numbers": np.array([1j]),
    "dtype <U1; expected real numbers": ["a"],
    "dtype object; expected real numbers": [None],
    "x holds values that are not finite": [1.0, float("nan")],
    "x holds values that are not finite in": [1e300],
}


@pytest.mark.parametrize("fact", ONE_LAYER)
@pytest.mark.parametrize("seed", BAD_SEEDS)
def test_a_seed_that_is_no_whole_number_in_range_is_refused(fact, seed):
    with pytest.raises(
        ValueError, match=r"^seed is .*; expected a whole number from 0 to 4294967294\.$"
    ):
        fact(seed, [1.0], 2)


@pytest.mark.parametrize("fact", ONE_LAYER)
@pytest.mark.parametrize("features", BAD_FEATURES)
def test_a_width_that_is_no_whole_number_above_zero_is_refused(fact, features):
    with pytest.raises(ValueError, match=r"^features is .*; expected a whole number from 1 to"):
        fact(0, [1.0], features)


@pytest.mark.parametrize("fact", ONE_LAYER)
@pytest.mark.parametrize("reason", BAD_VECTORS)
def test_an_input_that_is_no_finite_real_vector_is_refused(fact, reason):
    with pytest.raises(ValueError, match=re.escape(reason)):
        fact(0, BAD_VECTORS[reason], 2)


@pytest.mark.parametrize("lr", [-0.1, float("nan"), float("inf"), "0.1", [0.1], None])
def test_a_rate_that_is_negative_or_not_finite_is_refused(lr):
    with pytest.raises(ValueError, match=r"^lr is .*; expected a number from 0"):
        mixed_train_step(0, [1.0], [1.0], lr)


@pytest.mark.parametrize(
    ("x", "y"), [((3, 2), (4, 2)), ((3, 2), (3,)), ((2,), (3, 2)), ((2,), (1, 2))]
)
def test_inputs_and_targets_of_different_batches_are_refused(x, y):
    with pytest.raises(ValueError, match=re.escape(f"x has shape {x} and y {y}")):
        mixed_train_step(0, np.ones(x), np.ones(y), 0.1)


def test_every_wrong_argument_is_named_in_one_message():
    with pytest.raises(ValueError, match=r"(?s)seed is -1.*x has shape.*y has dtype.*lr is nan"):
        mixed_train_step(-1, [], ["a"], float("nan"))
    with pytest.raises(ValueError, match=r"(?s)seed is 0\.5.*x has shape.*features is 0"):
        coexistence_parity(0.5, [[1.0]], 0)


# --- the pitfalls


def dense_leaves(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "params/kernel": jnp.asarray(rng.normal(size=(3, 2)), dtype),
        "params/bias": jnp.asarray(rng.normal(size=2), dtype),
    }


def layer_leaves(**options):
    abstract = nnx.eval_shape(lambda: nnx.Linear(3, 2, rngs=nnx.Rngs(0), **options))
    return nnx.to_pure_dict(nnx.state(abstract))


def test_the_rule_book_carries_kernel_and_bias_both_ways_bit_for_bit():
    leaves = dense_leaves()

    there = DENSE.to_nnx(leaves, layer_leaves())
    assert same_bits(there["kernel"], leaves["params/kernel"])
    assert same_bits(there["bias"], leaves["params/bias"])
    back = DENSE.to_linen(there, leaves)
    assert {path: np.asarray(leaf).tobytes() for path, leaf in back.items()} == {
        path: np.asarray(leaf).tobytes() for path, leaf in leaves.items()
    }


def test_a_forgotten_params_level_is_refused():
    bare = {path.removeprefix("params/"): leaf for path, leaf in dense_leaves().items()}

    with pytest.raises(RuleError, match=r"(?s)`kernel`.*`bias`"):
        DENSE.to_nnx(bare, layer_leaves())


def test_a_variable_where_an_array_is_due_is_refused():
    wrapped = {path: nnx.Param(leaf) for path, leaf in dense_leaves().items()}

    with pytest.raises((RuleError, TypeError), match="Param"):
        DENSE.to_nnx(wrapped, layer_leaves())


def test_a_dtype_mismatch_is_refused():
    with pytest.raises(RuleError, match=r"(?s)`kernel` would be .*bfloat16.*`bias` would be"):
        DENSE.to_nnx(dense_leaves(jnp.bfloat16), layer_leaves())


def test_a_bias_on_one_side_alone_is_refused():
    with pytest.raises(RuleError, match="becomes `bias`, which the target lacks"):
        DENSE.to_nnx(dense_leaves(), layer_leaves(use_bias=False))
    kernel = {"params/kernel": dense_leaves()["params/kernel"]}
    with pytest.raises(RuleError, match="`bias`"):
        DENSE.to_nnx(kernel, layer_leaves())


def test_one_seed_draws_different_weights_in_the_two_frameworks():
    ours = nnx.Linear(3, 2, rngs=nnx.Rngs(0)).kernel[...]
    theirs = nn.Dense(2).init(jax.random.PRNGKey(0), jnp.ones(3))["params"]["kernel"]

    assert not same_bits(ours, theirs)


def test_the_wrapper_fills_missing_parameters_in_silence_where_linen_raises():
    x = jnp.ones(3)

    assert bridge.to_linen(nnx.Linear, 3, 2).apply({}, x).shape == (2,)
    with pytest.raises(Exception, match="kernel"):
        nn.Dense(2).apply({}, x)


def test_a_gradient_over_an_nnx_module_unties_what_it_shares():
    class Tied(nnx.Module):
        def __init__(self):
            self.one = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
            self.two = nnx.Linear(3, 3, rngs=nnx.Rngs(1))
            self.two.kernel = self.one.kernel

    grads = jax.grad(lambda m: (m.one(jnp.ones(3)) + 2 * m.two(jnp.ones(3))).sum())(Tied())

    assert not same_bits(grads.one.kernel[...], grads.two.kernel[...])
