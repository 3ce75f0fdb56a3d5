"""Runs one side of a twin in float64 on given values, and compares what sides give."""

from collections.abc import Container, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from linen_nnx.infer.float64 import wide
from linen_nnx.infer.sides import SlottedSide

Array = np.ndarray
_KEPT = 1 << 16  # elements of a pattern that is kept: larger ones are drawn anew
EXACT = 1e-8  # relative: what rounding in float64 may do, with room to spare


class Run(NamedTuple):
    """Outputs, leaves with new values, and the gradient: one number per element, if asked for.

    The gradient is as large as the model twice over (float64): it is kept no longer than needed.
    """

    outputs: list[Array]
    updates: dict[str, Array]
    gradient: Array


def run(side: SlottedSide, inputs: Sequence[Any], values: Array, gradient: bool = False) -> Run:
    """Evaluates one side in float64.

    Args:
      side: what to run.
      inputs: in the place of the example inputs.
      values: (elements,), the leaves one after the other.
      gradient: whether to compute that of a fixed random projection of the outputs, as if the
        model had no `stop_gradient`.
    """
    trace = side.trace
    with jax.enable_x64(True):
        kinds = [aval.dtype for aval in trace.wide.in_avals]
        numbers = zip(trace.numbers.values(), kinds, strict=False)
        leaves = [jnp.asarray(values[each], kind) for each, kind in numbers]
        inputs = list(map(wide, inputs))
        flat = np.zeros(0)
        # A small model is compiled once, with its gradient: compiling it twice would take longer.
        if gradient or trace.small:
            outs, slopes = trace.pull_plain(leaves, inputs, trace.count)
            if gradient:
                flat = _joined(slopes)
        else:
            outs = trace.run_wide(*leaves, *inputs)
        outs = [np.asarray(out) for out in outs]
    old = dict(zip(side.paths, leaves, strict=True))
    new = zip(trace.updates, outs[trace.count :], strict=True)
    updates = {path: value for path, value in new if not np.array_equal(value, old[path])}
    return Run(outs[: trace.count], updates, flat)


def _joined(arrays: list[Any]) -> Array:
    """All elements one after the other; the list is emptied on the way, to free its arrays."""
    end = sum(array.size for array in arrays)
    joined = np.empty(end)
    while arrays:
        part = np.ravel(arrays.pop())
        joined[end - part.size : end] = part
        end -= part.size
    return joined


def difference(left: Sequence[Any], right: Sequence[Any]) -> float:
    """The largest difference between two lists of arrays, relative to each array; NaN is inf."""
    worst = 0.0
    for one, two in zip(left, right, strict=True):
        if one.size and one.dtype.kind in "fc":
            scale = max(np.abs(one).max(), np.abs(two).max(), 1e-30)
            worst = max(worst, float(np.nan_to_num(np.abs(one - two).max() / scale, nan=np.inf)))
    return worst


def distances(left: Array, right: Array) -> Array:
    """(n, m): relative differences of n and m rows of sums."""
    scale = np.maximum(np.abs(left).max(-1)[:, None], np.abs(right).max(-1)[None])
    return np.abs(left[:, None] - right[None]).max(-1) / np.maximum(scale, 1e-30)


def distinct(side: SlottedSide, values: Array, paths: Container[str]) -> Array:
    """The values with numbers of its own for every slot of the leaves `paths`."""
    values = values.copy()
    for number, slot in enumerate(side.flow.slots):
        first = side.first[number]
        if first in paths and first not in side.held:
            columns, summed = slot.ids.shape
            values[slot.ids] = pattern(columns, summed, number + 1)
    return values


def pattern(columns: int, summed: int, seed: int = 0) -> Array:
    """(N, K) values: positive ones for scales, biases, variances; else of variance 1/K."""
    small = columns * summed <= _KEPT
    return (_pattern if small else _pattern.__wrapped__)(columns, summed, seed)


@lru_cache(maxsize=64)
def _pattern(columns: int, summed: int, seed: int) -> Array:
    random = np.random.default_rng([columns, summed, seed])
    if summed == 1:
        return random.uniform(0.5, 1.5, (columns, 1))
    return random.normal(size=(columns, summed)) / np.sqrt(summed)


def with_noise(array: jax.Array, seed: int) -> Any:
    """An example input with noise: zeros, ones and even ramps hide much of a model."""
    kind = getattr(array.dtype, "kind", "") if array.size > 1 else ""
    given = np.asarray(array) if kind in ("f", "i", "u") else np.zeros(0)
    random = np.random.default_rng([seed, given.size])
    if kind == "f" and np.isfinite(given).all():
        return given + random.uniform(0, given.std() or 1.0, given.shape)
    if given.size and (given == given.flat[0]).all():  # all tokens the same
        return random.integers(0, max(int(given.flat[0]), 1) + 1, given.shape).astype(given.dtype)
    return array
