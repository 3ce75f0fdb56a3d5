"""What single equations do to the elements of an operand: move them, or sum products with them.

`dataflow.py` follows leaf elements through a model with these. Shapes and numbers only: nothing
here computes a value of the model.

    transpose(w)              a movement: element (0, 1) is then at (1, 0)
    dot_general(x, w)         a product: w's axis 0 is summed over, its axis 1 is the output's last
    conv_general_dilated      a product, too: summed over the window and the input channels
    gather(table, tokens)     a product with one-hot rows: summed over the table's rows

    >>> import jax, jax.numpy as jnp
    >>> eqn = jax.make_jaxpr(lambda x, w: x @ w)(jnp.ones((1, 3)), jnp.ones((3, 5))).eqns[0]
    >>> product_axes(eqn, weight=1)
    Axes(batch=[], free=[1], summed=[0], places=[1])
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from linen_nnx.infer.jaxprs import bind, param

Array = np.ndarray
Movement = Callable[[Array], Array]
_EACH_ALONE = (
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp "
    "convert_element_type copy copy_p cos cosh device_put div eq erf erf_inv erfc exp exp2 expm1 "
    "floor ge gt integer_pow is_finite le log log1p logistic lt max min mul name ne neg nextafter "
    "not optimization_barrier or pow reduce_precision rem round rsqrt select_n sharding_constraint "
    "sign sin sinh sqrt square stop_gradient sub tan tanh xor"
)
ELEMENTWISE = frozenset(_EACH_ALONE.split())
"""The primitives that keep every element in its place."""


class Axes(NamedTuple):
    """What a product does with the axes of its weight.

    Attributes:
      batch: axes that go along with axes of the other operand, entry by entry (`nn.vmap`).
      free: axes that become axes of the output.
      summed: axes that are summed over.
      places: where batch and free axes are in the output.
    """

    batch: list[int]
    free: list[int]
    summed: list[int]
    places: list[int]


def product_axes(eqn: Any, weight: int) -> Axes | None:
    """How an equation sums over products with its operand `weight`, if it does."""
    operand = eqn.invars[weight].aval
    match eqn.primitive.name:
        case "dot_general":
            contract, batches = param(eqn, "dimension_numbers")
            # Sorted by the other operand's axes. Two models that sum over (heads, size), one as
            # two axes and one as a reshaped single axis, then sum in one order.
            pairs = zip(contract[1 - weight], contract[weight], strict=True)
            summed = [axis for _, axis in sorted(pairs)]
            batch = list(batches[weight])
            free = [axis for axis in range(operand.ndim) if axis not in (*summed, *batch)]
            # The output has the batch axes first, then the left operand's, then the right one's.
            other = eqn.invars[0].aval.ndim - len(summed) - len(batch) if weight else 0
            before = len(batch) + other
            places = [*range(len(batch)), *range(before, before + len(free))]
            return Axes(batch, free, summed, places)
        case "conv_general_dilated" if weight == 1:
            out, into, *window = param(eqn, "dimension_numbers").rhs_spec
            return Axes([], [out], [*window, into], [param(eqn, "dimension_numbers").out_spec[1]])
        case "gather" if weight == 0:
            # Looked up by index: a product with one-hot rows, as other models write it. A slice of
            # each row alone (`whole` is false) is no such product.
            numbers, sizes = param(eqn, "dimension_numbers"), param(eqn, "slice_sizes")
            indexed = list(numbers.collapsed_slice_dims)
            free = [axis for axis in range(operand.ndim) if axis not in indexed]
            whole = all(sizes[axis] == operand.shape[axis] for axis in free)
            if whole and indexed and not numbers.operand_batching_dims:
                return Axes([], free, indexed, list(numbers.offset_dims))
    return None


def movements(eqn: Any, rest: Sequence[Array | None]) -> list[Movement] | None:
    """What an equation does to the elements of its first operand.

    Args:
      eqn: the equation.
      rest: the values of its other operands, where they are constants.

    Returns:
      one function of arrays for each output; None if the equation keeps no element.
    """
    shape = eqn.outvars[0].aval.shape
    match eqn.primitive.name:
        case "squeeze" | "expand_dims":
            return [lambda a: a.reshape(shape)]
        case "reshape" if param(eqn, "dimensions") is None:
            return [lambda a: a.reshape(shape)]
        case "transpose":
            return [lambda a: a.transpose(param(eqn, "permutation"))]
        case "broadcast_in_dim":
            return [lambda a: broadcast(a, shape, param(eqn, "broadcast_dimensions"))]
        case "rev":
            return [lambda a: np.flip(a, param(eqn, "dimensions"))]
        case "slice":
            steps = param(eqn, "strides") or (1,) * len(shape)
            cut = tuple(map(slice, param(eqn, "start_indices"), param(eqn, "limit_indices"), steps))
            return [lambda a: a[cut]]
        case "split":
            ends = np.cumsum(param(eqn, "sizes"))[:-1]
            axis = param(eqn, "axis")
            return [lambda a, k=k: np.split(a, ends, axis)[k] for k in range(len(ends) + 1)]
        case "unstack":
            axis = param(eqn, "axis")
            return [lambda a, k=k: a.take(k, axis) for k in range(len(eqn.outvars))]
        case "gather" | "dynamic_slice" if all(value is not None for value in rest):
            # Run as it is, on element numbers. A lookup out of range finds no element: -1.
            missing = {"fill_value": -1} if "fill_value" in eqn.params else {}
            return [lambda a: np.asarray(bind(eqn, [np.int32(a), *rest], **missing)[0])]
    return None


def broadcast(array: Array, shape: tuple[int, ...], places: Sequence[int]) -> Array:
    """The array with its axes at `places` of `shape`, repeated along the others.

    Example:
        >>> broadcast(np.array([4, 5]), (2, 2), [1])
        array([[4, 5],
               [4, 5]])
    """
    sizes = [1] * len(shape)
    for place, size in zip(places, array.shape, strict=True):
        sizes[place] = size
    return np.broadcast_to(array.reshape(sizes), shape)
