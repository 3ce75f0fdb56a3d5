"""Runs one side of a twin in float64 on given values, and compares what sides give."""

from collections.abc import Collection, Container, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from linen_nnx.infer.float64 import wide
from linen_nnx.infer.memory import give_back
from linen_nnx.infer.sides import SlottedSide

Array = np.ndarray
EXACT = 1e-8  # relative: what rounding in float64 may do, with room to spare
_BLIND = 1e-10  # of the median gradient
_KEPT = 1 << 16  # elements of a pattern that is kept: larger ones are drawn anew


class Run(NamedTuple):
    """What one side gave.

    Attributes:
      outputs: the arrays that the call returned.
      updates: new values by path, of the leaves whose value the call changed.
      slopes: the gradients by the leaves that were asked for, in float64, in their shapes. All of
        them are twice as large as a model in float32: a run is kept no longer than needed.
      sizes: the largest gradient in each leaf, whichever were asked for; empty if none was.
    """

    outputs: list[Array]
    updates: dict[str, Array]
    slopes: dict[str, Array]
    sizes: dict[str, float]


def run(side: SlottedSide, inputs: Sequence[Any], values: Array, by: Collection[str] = ()) -> Run:
    """Evaluates one side in float64.

    Args:
      side: what to run.
      inputs: in the place of the example inputs.
      values: (elements,), the leaves one after the other.
      by: the leaves by which to derive a fixed random projection of the outputs, as if the model
        had no `stop_gradient`.

    Example:
        >>> from linen_nnx.infer.example import two_layers
        >>> from linen_nnx.infer.sides import sides
        >>> from linen_nnx.infer.trace import trace_linen, trace_nnx
        >>> linen, _ = sides(trace_linen(two_layers()), trace_nnx(two_layers()), {})
        >>> run(linen, [np.ones((1, 2))], np.zeros(10)).outputs      # tanh(0 + 0) @ 0
        [array([[0., 0.]])]
    """
    trace = side.trace
    with jax.enable_x64(True):
        # Leaves that are no floats (counts, keys) keep their dtype.
        kinds = [aval.dtype for aval in trace.wide.in_avals]
        leaves = []
        for path, kind in zip(side.paths, kinds, strict=False):
            leaves.append(jnp.asarray(trace.part(values, path), kind))
        # Copies: the leaves' memory is taken over by the gradients.
        before = {path: np.array(leaves[side.paths.index(path)]) for path in trace.updates}
        inputs = list(map(wide, inputs))
        slopes: list[Any] = []
        # A small model is compiled once, with its gradient: compiling it twice would take longer.
        if by or trace.small:
            outs, slopes = trace.pull_plain(leaves, inputs, trace.count)
        else:
            outs = trace.run_wide(*leaves, *inputs)
        del leaves
        outs = [np.asarray(out) for out in outs]
    updates: dict[str, Array] = {}
    for path, value in zip(trace.updates, outs[trace.count :], strict=True):
        if not np.array_equal(value, before[path]):
            updates[path] = value
    kept: dict[str, Array] = {}
    sizes: dict[str, float] = {}
    if by:
        for path, slope in zip(side.paths, slopes, strict=True):
            sizes[path] = float(np.abs(slope).max(initial=0))
            if path in by:
                kept[path] = np.asarray(slope)
    del slopes
    give_back()
    return Run(outs[: trace.count], updates, kept, sizes)


# Comparing


def difference(left: Sequence[Any], right: Sequence[Any]) -> float:
    """The largest difference between two lists of arrays, relative to each array.

    NaN is an infinite difference. Arrays of integers are not compared.

    Example:
        >>> difference([np.array([1.0, 4.0])], [np.array([1.0, 5.0])])
        0.2
    """
    worst = 0.0
    for one, two in zip(left, right, strict=True):
        if one.size and one.dtype.kind in "fc":
            scale = max(np.abs(one).max(), np.abs(two).max(), 1e-30)
            gap = np.abs(one - two).max() / scale
            worst = max(worst, float(np.nan_to_num(gap, nan=np.inf)))
    return worst


def distances(left: Array, right: Array) -> Array:
    """Relative differences of the rows of two arrays, each with each.

    Args:
      left: (n, sums).
      right: (m, sums).

    Returns:
      (n, m): relative to the larger of the two rows.

    Example:
        >>> distances(np.array([[1.0], [2.0]]), np.array([[2.0]]))
        array([[0.5],
               [0. ]])
    """
    scale = np.maximum(np.abs(left).max(-1)[:, None], np.abs(right).max(-1)[None])
    return np.abs(left[:, None] - right[None]).max(-1) / np.maximum(scale, 1e-30)


def rounding(sizes: Array) -> float:
    """Up to which size a gradient is nothing but rounding, given the sizes of all gradients.

    Where softmax cancels a key bias, the gradient is a sum of terms that cancel: 1e-17, not 0.
    """
    seen = sizes[sizes > 0]
    return _BLIND * float(np.median(seen)) if seen.size else 0.0


# Values to run on


def distinct(side: SlottedSide, values: Array, paths: Container[str]) -> Array:
    """The values with numbers of its own for every slot of the leaves `paths`."""
    values = values.copy()
    for number, slot in enumerate(side.flow.slots):
        first = side.first_leaf[number]
        if first in paths and first not in side.held:
            columns, summed = slot.shape
            # Seed 0 is kept for common ground, where slots of one form are alike on purpose.
            values[slot.numbers()] = pattern(columns, summed, number + 1)
    return values


def pattern(columns: int, summed: int, seed: int = 0) -> Array:
    """(N, K) values for a slot: the same for the same arguments, wherever they are asked for.

    Positive ones from 0.5 to 1.5 for scales, biases and variances (K = 1); else of variance 1/K, so
    that activations neither vanish nor explode in a deep model.
    """
    # Small ones are asked for most and kept. 64 large ones would take more memory than the model.
    small = columns * summed <= _KEPT
    return (_pattern if small else _pattern.__wrapped__)(columns, summed, seed)


@lru_cache(maxsize=64)
def _pattern(columns: int, summed: int, seed: int) -> Array:
    """`pattern`, kept once it is drawn."""
    random = np.random.default_rng([columns, summed, seed])
    if summed == 1:
        return random.uniform(0.5, 1.5, (columns, 1))
    return random.normal(size=(columns, summed)) / np.sqrt(summed)


def with_noise(array: jax.Array, seed: int) -> Any:
    """An example input with noise: zeros, ones and even ramps hide much of a model.

    Floats get noise as large as their own spread. Integers are kept (they may be indices that must
    stay in range), unless all are equal: then they are drawn between 0 and that number.
    """
    kind = getattr(array.dtype, "kind", "") if array.size > 1 else ""
    given = np.asarray(array) if kind in ("f", "i", "u") else np.zeros(0)
    random = np.random.default_rng([seed, given.size])
    if kind == "f" and np.isfinite(given).all():
        return given + random.uniform(0, given.std() or 1.0, given.shape)
    # A batch of zero tokens looks up one row of a table: no other row would have a gradient.
    if given.size and (given == given.flat[0]).all():
        return random.integers(0, max(int(given.flat[0]), 1) + 1, given.shape).astype(given.dtype)
    return array
