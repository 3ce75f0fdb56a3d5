"""Five facts about mixing Flax Linen and Flax NNX, as functions to run, read and quote.

Each makes one claim about two frameworks on the same weights, in a few lines, and returns the
numbers that show it. All compute in float32: `x` and `y` may be lists or arrays of another real
dtype and are converted first. `seed` and `features` may be floats of integral value. Arguments
that do not fit raise one `ValueError` that names every reason.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from jax import Array
from jax.typing import ArrayLike
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.tree import flatten, unflatten

Params = Mapping[str, Any]

HIDDEN = 4  # width of the hidden layer in `mixed_train_step`
# PRNGKey takes the lower 32 bits of a seed, in silence; `mixed_train_step` adds 1.
LAST_SEED = 2**32 - 2
LARGEST = float(np.finfo(np.float32).max)

# `nnx.Linear` and `nn.Dense` name their leaves alike; Linen keeps them one level below.
DENSE = RuleBook.from_dict({"version": 1, "rules": [{"linen": "params/{leaf}", "nnx": "{leaf}"}]})


def coexistence_parity(seed: float, x: ArrayLike, features: float) -> Array:
    """Show that `nnx.Linear` and `nn.Dense` compute the same bits from one kernel and bias.

    Pitfall: only the arrays are shared, not how they are made. Each framework derives its keys
    differently, so that two inits from one seed differ: initialise once and translate.

    Args:
        seed: of the nnx layer's init, 0 to 2**32 - 2.
        x: (inputs,), one vector.
        features: width of the output, at least 1.

    Returns:
        (3,) float32: sum of the nnx output, sum of the Linen output, largest absolute difference
        of the two outputs. Expected: `[s, s, 0.0]`.

    Raises:
        ValueError: the arguments do not fit.
    """
    seed, x, features = _layer_arguments(seed, x, features)
    layer = nnx.Linear(x.shape[-1], features, rngs=nnx.Rngs(seed))
    twin = nn.Dense(features)
    nnx_out = layer(x)
    linen_out = _apply(twin, _linen_variables(layer, twin, x), x)
    return jnp.stack([nnx_out.sum(), linen_out.sum(), jnp.abs(nnx_out - linen_out).max()])


def shared_params_two_modules(seed: float, x: ArrayLike, features: float) -> Array:
    """Show that one array can be the kernel of an nnx and of a Linen module at once.

    Pitfall: sharing an array is not sharing a parameter. Where both uses are trained, the array
    must be passed to both in one call, so that its gradients add up; two copies drift apart.

    Args:
        seed: of the nnx layer's init, 0 to 2**32 - 2.
        x: (inputs,), one vector.
        features: width of the output, at least 1.

    Returns:
        (features,) float32: nnx output plus Linen output, equal to twice either. No bias.

    Raises:
        ValueError: the arguments do not fit.
    """
    seed, x, features = _layer_arguments(seed, x, features)
    layer = nnx.Linear(x.shape[-1], features, use_bias=False, rngs=nnx.Rngs(seed))
    twin = nn.Dense(features, use_bias=False)
    return layer(x) + _apply(twin, _linen_variables(layer, twin, x), x)


def mixed_train_step(seed: float, x: ArrayLike, y: ArrayLike, lr: float) -> Array:
    """Show one SGD step through a hybrid: `nnx.Linear`, relu, `nn.Dense`, mean squared error.

    The nnx half enters as a plain dict, as Linen parameters do: then one `jax.grad` over both
    arguments differentiates the two halves, and one update rule serves both.

    Pitfalls: `jax.grad` over an nnx module itself unties what it shares; and the Linen half is
    initialised on a hidden vector, not on `x`, or its kernel has the wrong number of rows.

    Args:
        seed: of the nnx half's init, 0 to 2**32 - 2; the Linen half uses `seed + 1`.
        x: (inputs,) or (batch, inputs).
        y: (outputs,) or (batch, outputs), as many dimensions as `x`.
        lr: learning rate, finite, not negative.

    Returns:
        (2,) float32: loss before the step and after it. At a small rate it decreases.

    Raises:
        ValueError: the arguments do not fit.
    """
    seed, x, y, lr = _step_arguments(seed, x, y, lr)
    graphdef, state = nnx.split(nnx.Linear(x.shape[-1], HIDDEN, rngs=nnx.Rngs(seed)))
    head = nn.Dense(y.shape[-1])
    encoder_params = nnx.to_pure_dict(state)
    head_params: Params = head.init(jax.random.PRNGKey(seed + 1), jnp.zeros(HIDDEN))["params"]

    def loss(encoder_params: Params, head_params: Params) -> Array:
        hidden = nn.relu(nnx.merge(graphdef, encoder_params)(x))
        return jnp.mean((_apply(head, {"params": head_params}, hidden) - y) ** 2)

    def descend(param: Array, grad: Array) -> Array:
        return param - lr * grad

    params = (encoder_params, head_params)
    grads = jax.grad(loss, argnums=(0, 1))(*params)
    stepped = jax.tree.map(descend, params, grads)
    return jnp.stack([loss(*params), loss(*stepped)])


def state_translation(seed: float, x: ArrayLike, features: float) -> Array:
    """Show that the state of a split nnx module is, renamed, the parameters of its Linen twin.

    Pitfalls: `nnx.State` holds Variables, Linen wants arrays below a `params` level; a forgotten
    level, or a Variable left in place, is for the translator to refuse, since Flax may not.

    Args:
        seed: of the nnx layer's init, 0 to 2**32 - 2.
        x: (inputs,), one vector.
        features: width of the output, at least 1.

    Returns:
        (2,) float32: sum of the nnx output and sum of the Linen output, equal.

    Raises:
        ValueError: the arguments do not fit.
    """
    seed, x, features = _layer_arguments(seed, x, features)
    layer = nnx.Linear(x.shape[-1], features, rngs=nnx.Rngs(seed))
    twin = nn.Dense(features)
    linen_out = _apply(twin, _linen_variables(layer, twin, x), x)
    return jnp.stack([layer(x).sum(), linen_out.sum()])


def nnx_inside_linen(seed: float, x: ArrayLike, features: float) -> Array:
    """Show that an nnx class wrapped by `bridge.to_linen` is an ordinary Linen module.

    Pitfalls: give the class, not an instance; and check what you apply, for the wrapper fills a
    missing parameter from a fresh init, in silence, where Linen raises.

    Args:
        seed: of the key given to `init`, 0 to 2**32 - 2.
        x: (inputs,), one vector.
        features: width of the output, at least 1.

    Returns:
        (features,) float32: equal to `x @ kernel + bias` of its own parameters.

    Raises:
        ValueError: the arguments do not fit.
    """
    seed, x, features = _layer_arguments(seed, x, features)

    class Encoder(nnx.Module):
        def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
            self.linear = nnx.Linear(inputs, outputs, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            return self.linear(x)

    module = bridge.to_linen(Encoder, x.shape[-1], features)
    variables = module.init(jax.random.PRNGKey(seed), x)
    return _apply(module, variables, x)


def _apply(module: nn.Module, variables: Any, x: Array) -> Array:
    """`module.apply` where one array comes out: Flax types what may come with it."""
    return module.apply(variables, x)  # pyrefly: ignore[bad-return]


def _linen_variables(layer: nnx.Linear, twin: nn.Dense, x: Array) -> dict[str, Any]:
    """Translate the layer's parameters for its twin, checked against the twin's own shapes."""
    leaves = flatten({**nnx.to_pure_dict(nnx.state(layer, nnx.Param))})
    target = flatten(jax.eval_shape(twin.init, jax.random.key(0), x))
    return unflatten(DENSE.to_linen(leaves, target))


def _layer_arguments(seed: float, x: ArrayLike, features: float) -> tuple[int, Array, int]:
    _refuse(
        *_number_problems("seed", seed, 0, LAST_SEED, whole=True),
        *_array_problems("x", x, ndims=(1,)),
        *_number_problems("features", features, 1, 2**31 - 1, whole=True),
    )
    return int(float(seed)), _float32(x), int(float(features))


def _step_arguments(
    seed: float, x: ArrayLike, y: ArrayLike, lr: float
) -> tuple[int, Array, Array, float]:
    _refuse(
        *_number_problems("seed", seed, 0, LAST_SEED, whole=True),
        *_array_problems("x", x, ndims=(1, 2)),
        *_array_problems("y", y, ndims=(1, 2)),
        *_number_problems("lr", lr, 0, LARGEST),
    )
    x, y = _float32(x), _float32(y)
    if x.shape[:-1] != y.shape[:-1]:
        _refuse(
            f"x has shape {x.shape} and y {y.shape}; expected (inputs,) and (outputs,), or "
            "(batch, inputs) and (batch, outputs) with the same batch."
        )
    return int(float(seed)), x, y, float(lr)


def _number_problems(
    name: str, value: float, low: float, high: float, whole: bool = False
) -> Iterator[str]:
    try:
        number = float(value) if np.ndim(value) == 0 and not isinstance(value, str) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high or (whole and not number.is_integer()):
        kind = "a whole number" if whole else "a number"
        yield f"{name} is {value!r}; expected {kind} from {low} to {high}."


def _array_problems(name: str, value: ArrayLike, ndims: tuple[int, ...]) -> Iterator[str]:
    try:
        array = np.asarray(value)
    except ValueError as error:
        yield f"{name} is not an array: {str(error).rstrip('.')}."
        return
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer, bool)):
        yield f"{name} has dtype {array.dtype}; expected real numbers."
    elif array.ndim not in ndims or array.size == 0:
        expected = " or ".join(f"{ndim}-D" for ndim in ndims)
        yield (f"{name} has shape {array.shape}; expected {expected} and not empty.")
    elif not np.isfinite(_float32(array)).all():
        yield f"{name} holds values that are not finite in float32."


def _float32(value: ArrayLike) -> Array:
    with np.errstate(over="ignore"):  # overflow is found, and named, by `_array_problems`
        return jnp.asarray(np.asarray(value).astype(np.float32))


def _refuse(*problems: str) -> None:
    if problems:
        raise ValueError("\n".join(problems))
