"""What two parts of a model do differently is named, from their jaxprs alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linen_nnx.infer.jaxprs import described
from linen_nnx.proof import curves
from linen_nnx.proof.functions import differences
from linen_nnx.proof.read_terms import Region
from linen_nnx.proof.unrolled import Unrolled

X = jnp.linspace(-1.0, 1.0, 8).reshape(2, 4)
W = jnp.ones((4, 4))
CAUSAL = np.tril(np.ones((4, 4), bool))


def region(function, *args):
    steps = Unrolled(jax.make_jaxpr(function)(*args))
    return Region(steps, steps.outs[0], leaves=0)


def said(one, two, *args):
    args = args or (X,)
    return differences(region(one, *args), region(two, *args))


def norm(x, epsilon=1e-6, inside=True, centred=True, fast=False, ddof=0):
    mean = x.mean(-1, keepdims=True)
    d = x - mean if centred else x
    square = (
        (x * x).mean(-1, keepdims=True) - mean * mean
        if fast
        else jnp.square(d).mean(-1, keepdims=True)
    )
    square = square * (x.shape[-1] / (x.shape[-1] - ddof))
    if inside:
        return d * jax.lax.rsqrt(square + epsilon)
    return d / (jnp.sqrt(square) + epsilon)


def attend(
    x, before=1.0, on_q=1.0, after=1.0, fill=None, mask=CAUSAL, added=False, softmax=jax.nn.softmax
):
    scores = (x[0] * on_q) @ x[1].T * before
    if fill is not None and added:
        scores = scores + jnp.where(mask, 0.0, fill)
    elif fill is not None:
        scores = jnp.where(mask, scores, fill)
    return (softmax(scores, axis=-1) * after) @ x[1]


def own_softmax(x, axis):
    e = jnp.exp(x)
    return e / e.sum(axis, keepdims=True)


ROOT = "1 / the root of the variance, epsilon"
Q = jnp.stack([jnp.ones((4, 4))] * 2)
PAIRS = {
    "gelu": (jax.nn.gelu, lambda x: jax.nn.gelu(x, approximate=False), X,
             ["gelu: Linen the tanh approximation, nnx exact, by erf"]),
    "quick gelu": (jax.nn.gelu, lambda x: x * jax.nn.sigmoid(1.702 * x), X,
                   ["gelu: Linen the tanh approximation, nnx x * sigmoid(1.702 x)"]),
    "gelu and silu": (lambda x: jax.nn.gelu(x, approximate=False), jax.nn.silu, X,
                      ["function: Linen gelu exact, by erf, nnx silu"]),
    "relu and relu6": (jax.nn.relu, jax.nn.relu6, X,
                       ["activation: Linen relu, nnx relu up to 6"]),
    "leaky slope": (jax.nn.leaky_relu, lambda x: jax.nn.leaky_relu(x, 0.2), X,
                    ["activation: Linen leaky relu with slope 0.01, nnx leaky relu with slope"]),
    "softplus": (jax.nn.softplus, jax.nn.elu, X,
                 ["activation: Linen softplus, nnx elu with alpha 1"]),
    "mish and hard swish": (jax.nn.mish, jax.nn.hard_silu, X, ["activation: Linen mish, nnx "
                            "silu with x / 6 + 1/2 clipped to 0..6 for its sigmoid"]),
    "cap": (lambda x: 30 * jnp.tanh(x / 30), lambda x: 50 * jnp.tanh(x / 50), X,
            ["activation: Linen tanh with cap 30, nnx tanh with cap 50"]),
    "activation of one side": (jnp.tanh, lambda x: x, X, ["tanh, in Linen alone"]),
    "epsilon": (norm, lambda x: norm(x, 1e-5), X,
                [f"normalisation: Linen {ROOT} 1e-06 inside the root, nnx {ROOT} 1e-05 inside"]),
    "epsilon outside": (norm, lambda x: norm(x, inside=False), X,
                        [f"normalisation: Linen {ROOT} 1e-06 inside the root, nnx {ROOT} 1e-06 "
                         "outside the root"]),
    "unbiased variance": (norm, lambda x: norm(x, ddof=1), X,
                          [f"normalisation: Linen {ROOT} 1e-06 inside the root, nnx 1 / the root "
                           "of 1.333 times the variance, epsilon 1e-06 inside the root"]),
    "rms norm": (norm, lambda x: norm(x, centred=False), X,
                 ["normalisation: Linen the variance over axis -1, nnx the mean of squares over "
                  "axis -1", "the mean over axis -1, in Linen alone"]),
    "softmax scaled after": (lambda x: attend(x, 0.5), lambda x: attend(x, after=0.5), Q,
                             ["softmax: Linen scales by 0.5 before it, nnx after it"]),
    "softmax of another scale": (lambda x: attend(x, 0.5), attend, Q,
                                 ["softmax: Linen its input times 0.5, nnx its input times 1"]),
    "fill of a mask": (lambda x: attend(x, 0.5, fill=-1e9), lambda x: attend(x, 0.5, fill=-jnp.inf),
                       Q, ["mask: Linen fills in -1e+09, nnx fills in -inf"]),
    "another mask": (lambda x: attend(x, fill=-1e9),
                     lambda x: attend(x, fill=-1e9, mask=np.tril(CAUSAL, -1)), Q,
                     ["constant mask: Linen true at 6 of 16 places, nnx true at 10 of 16 places"]),
    "no mask": (lambda x: attend(x, fill=-1e9), attend, Q,
                ["mask: fills in -1e+09, in Linen alone"]),
    "pooling": (lambda x: x.mean(0), lambda x: x.max(0), X,
                ["operation: Linen the mean over axis -2, nnx the largest over axis -2"]),
    "residual": (lambda x: x + jnp.tanh(x @ W), lambda x: jnp.tanh(x @ W), X,
                 ["the sum of 2 values, in Linen alone"]),
    "dropout": (lambda x: x, lambda x: nn.Dropout(0.5, deterministic=False).apply(
                {}, x, rngs={"dropout": jax.random.key(0)}), X, ["dropout, in nnx alone"]),
    "a table": (lambda x: x + jnp.arange(4.0), lambda x: x + 2 * jnp.arange(4.0), X,
                ["constants: Linen 4 numbers from 0 to 3, in all 6, nnx 4 numbers from 0 to 6, in "
                 "all 12"]),
    "a table in another order": (lambda x: x + jnp.arange(4.0), lambda x: x + jnp.arange(4.0)[::-1],
                                 X, ["constants: Linen 4 numbers from 0 to 3, in all 6, 0 at [0], "
                                     "nnx 4 numbers from 0 to 3, in all 6, 3 at [0]"]),
    "a cast": (lambda x: jnp.tanh(x.astype(jnp.bfloat16)), jnp.tanh, X,
               ["a cast to bfloat16, in Linen alone"]),
    "another order of axes": (lambda x: x.reshape(2, 2, 2).swapaxes(0, 1).reshape(2, 4),
                              lambda x: x, X, ["order of axes: Linen reshape new_sizes=(2, 2, 2)"]),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_a_function_that_differs_is_named(name):
    one, two, x, due = PAIRS[name]

    got = said(one, two, x)

    assert len(got) >= len(due)
    assert all(line.startswith(start) for line, start in zip(got, due, strict=False)), got


SAME = {
    "gelu by hand": (jax.nn.gelu, lambda x: x / 2 * (1 + jnp.tanh(
        jnp.sqrt(2 / jnp.pi) * (x + 0.044715 * x * x * x))), X),
    "silu by hand": (jax.nn.silu, lambda x: x / (1 + jnp.exp(-x)), X),
    "variance by squares": (norm, lambda x: norm(x, fast=True), X),
    "variance by jax.numpy": (norm, lambda x: (x - x.mean(-1, keepdims=True)) / jnp.sqrt(
        x.var(-1, keepdims=True) + 1e-6), X),
    "scale of queries or scores": (lambda x: attend(x, 0.5), lambda x: attend(x, on_q=0.5), Q),
    "softmax by hand": (attend, lambda x: attend(x, softmax=own_softmax), Q),
    "log of softmax": (jax.nn.log_softmax, lambda x: x - jnp.log(jnp.exp(x).sum(-1, keepdims=True)),
                       X),
    "order of sums": (lambda x: x @ W + (x + jnp.tanh(x)), lambda x: jnp.tanh(x) + x @ W + x, X),
    "mean of a sum": (lambda x: (x + x @ W).mean(-1), lambda x: (x + x @ W).sum(-1) / 4, X),
    "mask by either branch": (lambda x: attend(x, fill=-1e9),
                              lambda x: attend(x, fill=-1e9, mask=~~CAUSAL), Q),
    "a scan": (lambda x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, Q)[0],
               lambda x: jnp.tanh(jnp.tanh(x @ Q[0]) @ Q[1]), X),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_one_function_in_two_forms_is_no_difference(name):
    one, two, x = SAME[name]

    assert not [line for line in said(one, two, x) if not line.startswith("order of axes")]


def test_what_has_no_name_is_shown_by_its_values():
    assert curves.name(np.cos(curves.GRID) + curves.GRID).text.startswith(
        "one with f(-1) = -0.4597"
    )


def test_described_leaves_out_what_changes_no_value():
    eqn = jax.make_jaxpr(lambda x: x @ W)(X).eqns[-1]

    assert "dimension_numbers" in described(eqn) and "precision" not in described(eqn)
