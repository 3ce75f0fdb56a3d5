"""Gradient fingerprints: leaves that act alike have equal gradients, whatever they are called.

Every slot of one form (see `dataflow.py`) gets the same values on both sides, so that the twins'
outputs agree whichever slot is whose. Then the gradient of a slot tells what flows into it and what
becomes of it, and the new value of a slot that the call updates does the same. Forms that the two
sides do not have equally often, or whose values the sides read in a different order, are held
constant: what remains is still comparable.
"""

from collections import Counter
from collections.abc import Container, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from linen_nnx.infer.evaluate import wide
from linen_nnx.infer.sides import Form, Side

Array = np.ndarray
EXACT = 1e-8  # relative: what rounding in float64 may do, with room to spare
_COMPARABLE = 1e-3  # twins whose outputs differ by more compute something else
_BLIND = 1e-10  # of the median gradient
_POOR = 0.03
_SUMS = 16


class Run(NamedTuple):
    """Outputs, leaves with new values, and the gradient: one number per element, if asked for."""

    outputs: list[Array]
    updates: dict[str, Array]
    gradient: Array


class Prints(NamedTuple):
    """Fingerprints of both sides, (slots, 2, sums): of the gradient and of the new value.

    inputs, values: what both sides were run on; values are (elements,) for each side.
    noise: relative difference of the twins' outputs.
    seen: for each Linen slot, whether any output, or its own new value, depends on it.
    rich: the forms whose values told; `partial`: the others had to be held constant.
    problem: why there are no fingerprints, else None.
    """

    linen: Array
    nnx: Array
    inputs: Sequence[Any]
    values: tuple[Array, Array]
    noise: float
    seen: Array
    rich: set[Form]
    partial: bool
    problem: str | None

    @property
    def tolerance(self) -> float:
        """Fingerprints that differ relatively by no more than this are equal."""
        return max(EXACT, min(100 * self.noise, 0.01))


def fingerprints(linen: Side, nnx: Side) -> Prints:
    """Runs both sides with equal values in slots of equal form."""
    given = linen.trace.inputs
    every = {form for form in linen.forms if len(form) > 1}
    problem = _imbalance(linen, nnx)
    ways = [[lively(array, seed) for seed, array in enumerate(given)], given]
    for inputs in [] if problem else ways:
        try:
            rich, trial = every, _trial(linen, nnx, inputs, every, gradient=True)
            if problem := trial.problem:
                rich = _comparable(linen, nnx, inputs, every)
                trial = _trial(linen, nnx, inputs, rich, gradient=True) if rich else trial
            if rich:
                return _measured(linen, nnx, inputs, trial, rich, partial=rich != every)
        except Exception as error:  # the user's own model: whatever it raises is the reason
            problem = f"the twins could not be run in float64: {type(error).__name__}: {error}"
    none = np.zeros(0)
    return Prints(none, none, given, (none, none), 0.0, none, set(), False, problem)


def _imbalance(linen: Side, nnx: Side) -> str | None:
    """Which forms one side has more of, if any: then the two do not compute the same."""
    counts = Counter(linen.forms), Counter(nnx.forms)
    surplus = [
        f"{name} uses {(one - two)[form]} more of form {form[0]} {form[1]} x {form[2]}"
        for name, one, two in (("Linen", *counts), ("nnx", *counts[::-1]))
        for form in one - two
        if len(form) > 1
    ]
    return f"the sides use different leaves: {'; '.join(surplus[:4])}" if surplus else None


def _comparable(linen: Side, nnx: Side, inputs: Sequence[Any], rich: set[Form]) -> set[Form]:
    """The forms that may have rich values so that outputs still agree; none if no set will do."""
    kept: set[Form] = set()
    if _trial(linen, nnx, inputs, kept).problem:
        return kept
    for form in sorted(rich):
        if not _trial(linen, nnx, inputs, kept | {form}).problem:
            kept.add(form)
    return kept


def _measured(
    linen: Side, nnx: Side, inputs: Sequence[Any], trial: "_Trial", rich: set[Form], partial: bool
) -> Prints:
    one, two = trial.runs
    (ours, sizes), (theirs, _) = _prints(linen, one), _prints(nnx, two)
    noise = difference(one.outputs, two.outputs)
    seen = sizes > 0
    seen[_waking(linen, inputs, trial.values[0], np.flatnonzero(~seen).tolist())] = True
    return Prints(ours, theirs, inputs, trial.values, noise, seen, rich, partial, None)


def _waking(side: Side, inputs: Sequence[Any], values: Array, slots: list[int]) -> list[int]:
    """Which slots without a gradient are seen after all, once no two slots are alike.

    Where all slots of a form are equal, symmetry hides some: the gates of equal experts, say.
    """
    if not slots:
        return []
    base = distinct(side, values, side.paths)
    moved = base.copy()
    for number in slots:
        moved[side.flow.slots[number].ids] *= _pattern(*side.flow.slots[number].ids.shape)
    one, two = (run(side, inputs, given) for given in (base, moved))
    if difference(one.outputs, two.outputs) <= EXACT:
        return []
    if len(slots) == 1:
        return slots
    half = len(slots) // 2
    halves = (_waking(side, inputs, values, part) for part in (slots[:half], slots[half:]))
    return [number for found in halves for number in found]


def run(side: Side, inputs: Sequence[Any], values: Array, gradient: bool = False) -> Run:
    """Evaluates one side in float64.

    Args:
      side: what to run.
      inputs: in the place of the example inputs.
      values: (elements,) float64, the leaves one after the other.
      gradient: whether to compute that of a fixed random projection of the outputs.
    """
    trace = side.trace
    with jax.enable_x64(True):
        kinds = [aval.dtype for aval in trace.wide.in_avals]
        numbers = zip(trace.numbers.values(), kinds, strict=False)
        leaves = [jnp.asarray(values[each], kind) for each, kind in numbers]
        inputs = list(map(wide, inputs))
        if gradient:
            outs, slopes = trace.pull_wide(leaves, inputs, trace.count)
            flat = np.concatenate([np.ravel(slope) for slope in slopes])
        else:
            outs, flat = trace.run_wide(*leaves, *inputs), np.zeros(0)
        outs = [np.asarray(out) for out in outs]
    old = dict(zip(side.paths, leaves, strict=True))
    new = zip(trace.updates, outs[trace.count :], strict=True)
    updates = {path: value for path, value in new if not np.array_equal(value, old[path])}
    return Run(outs[: trace.count], updates, flat)


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


class _Trial(NamedTuple):
    """Both sides run on equal values, and why their outputs cannot be compared, if so."""

    values: tuple[Array, Array]
    runs: tuple[Run, Run]
    problem: str | None


def _trial(
    linen: Side, nnx: Side, inputs: Sequence[Any], rich: set[Form], gradient: bool = False
) -> _Trial:
    values = _values(linen, rich), _values(nnx, rich)
    one, two = run(linen, inputs, values[0], gradient), run(nnx, inputs, values[1], gradient)
    shapes = [[out.shape for out in result.outputs] for result in (one, two)]
    problem = None
    if shapes[0] != shapes[1]:
        problem = f"the outputs differ in form: Linen {shapes[0]}, nnx {shapes[1]}"
    elif not all(np.isfinite(out).all() for out in (*one.outputs, *two.outputs)):
        problem = "the outputs are not finite at the values tried"
    elif (gap := difference(one.outputs, two.outputs)) > _COMPARABLE:
        problem = f"the outputs of the twins differ (by {gap:.0e} of their size), whatever is whose"
    return _Trial(values, (one, two), problem)


def _values(side: Side, rich: set[Form]) -> Array:
    """(elements,) float64: equal values for slots of equal form, a constant for poor forms."""
    values = np.full(side.owner.size, 0.5)
    for slot, form in zip(side.flow.slots, side.forms, strict=True):
        poor = form[0] if len(form) == 1 else _POOR
        values[slot.ids] = _pattern(*slot.ids.shape) if form in rich else poor
    return values


def distinct(side: Side, values: Array, paths: Container[str]) -> Array:
    """The values with numbers of its own for every slot of the leaves `paths`."""
    values = values.copy()
    for number, (slot, form) in enumerate(zip(side.flow.slots, side.forms, strict=True)):
        if side.first[number] in paths and len(form) > 1:
            values[slot.ids] = _pattern(*slot.ids.shape, number + 1)
    return values


@lru_cache(maxsize=64)
def _pattern(columns: int, summed: int, seed: int = 0) -> Array:
    """(N, K) values: positive ones for scales, biases, variances; else of variance 1/K."""
    random = np.random.default_rng([columns, summed, seed])
    if summed == 1:
        return random.uniform(0.5, 1.5, (columns, 1))
    return random.normal(size=(columns, summed)) / np.sqrt(summed)


def _prints(side: Side, result: Run) -> tuple[Array, Array]:
    """(slots, 2, sums): of the gradient of each slot, 0 if blind, and of its new value.

    And (slots,): how strongly outputs, or its own new value, depend on each; 0 is rounding.
    """
    updated = np.zeros(side.owner.size)
    for path, value in result.updates.items():
        updated[side.trace.numbers[path]] = value
    both = result.gradient, updated
    slopes, news = np.array(
        [[np.abs(values[slot.ids]).max() for slot in side.flow.slots] for values in both]
    )
    noise = _BLIND * float(np.median(slopes[slopes > 0])) if (slopes > 0).any() else 0.0
    sizes = np.where(slopes > noise, slopes, 0) + news
    rows = [
        [
            _sums(result.gradient[slot.ids]) if size > 0 else np.zeros(_SUMS),
            _sums(updated[slot.ids]),
        ]
        for slot, size in zip(side.flow.slots, sizes, strict=True)
    ]
    return np.array(rows), sizes


def _sums(values: Array) -> Array:
    """Up to 16 weighted sums of an array: different for different orders of its elements."""
    weighted = values.ravel() * _weights(values.size)
    starts = np.unique(np.linspace(0, values.size, _SUMS, endpoint=False).astype(int))
    return np.pad(np.add.reduceat(weighted, starts), (0, _SUMS - len(starts)))


@lru_cache(maxsize=64)
def _weights(size: int) -> Array:
    return np.random.default_rng(size).uniform(0.5, 1.5, size)


def lively(array: jax.Array, seed: int) -> Any:
    """An example input with noise: zeros, ones and even ramps hide much of a model."""
    kind = getattr(array.dtype, "kind", "") if array.size > 1 else ""
    given = np.asarray(array) if kind in ("f", "i", "u") else np.zeros(0)
    random = np.random.default_rng([seed, given.size])
    if kind == "f" and np.isfinite(given).all():
        return given + random.uniform(0, given.std() or 1.0, given.shape)
    if given.size and (given == given.flat[0]).all():  # all tokens the same
        return random.integers(0, max(int(given.flat[0]), 1) + 1, given.shape).astype(given.dtype)
    return array
