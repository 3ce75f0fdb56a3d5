"""Gradient fingerprints: leaves that act alike have equal gradients, whatever they are called.

Every slot of one form (see `dataflow.py`) gets the same values on both sides, so that the twins'
outputs agree whichever slot is whose. Then the gradient of a slot tells what flows into it and what
becomes of it, and the new value of a slot that the call updates does the same. Where those values
come from is `ground.py`.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from linen_nnx.infer.ground import Ground
from linen_nnx.infer.run import EXACT, Run, difference, distinct, pattern, run
from linen_nnx.infer.sides import SlotForm, SlottedSide

Array = np.ndarray
_BLIND = 1e-10  # of the median gradient
_SUMS = 16


class Prints(NamedTuple):
    """Fingerprints of both sides, (slots, 2, sums): of the gradient and of the new value.

    noise: relative difference of the twins' outputs.
    seen: for each Linen slot, whether any output, or its own new value, depends on it.
    rich: the forms whose values told; `partial`: the others had to be held constant.
    problem: why there are no fingerprints, else None.
    """

    linen: Array
    nnx: Array
    noise: float
    seen: Array
    rich: set[SlotForm]
    partial: bool
    problem: str | None

    @property
    def tolerance(self) -> float:
        """Fingerprints that differ relatively by no more than this are equal."""
        return max(EXACT, min(100 * self.noise, 0.01))


def fingerprints(ground: Ground) -> Prints:
    """What both sides gave on common ground, slot by slot."""
    if ground.runs is None:
        none = np.zeros(0)
        return Prints(none, none, 0.0, none, set(), False, ground.problem)
    one, two = ground.runs
    linen, nnx = ground.sides
    (ours, sizes), (theirs, _) = _prints(linen, one), _prints(nnx, two)
    noise = difference(one.outputs, two.outputs)
    seen = sizes > 0
    seen[_waking(ground, np.flatnonzero(~seen).tolist())] = True
    return Prints(ours, theirs, noise, seen, ground.rich, ground.partial, None)


def _waking(ground: Ground, slots: list[int]) -> list[int]:
    """Which Linen slots without a gradient are seen after all, once no two slots are alike.

    Where all slots of a form are equal, symmetry hides some: the gates of equal experts, say.
    """
    if not slots:
        return []
    side = ground.sides[0]
    base = distinct(side, ground.values[0], side.paths)
    moved = base.copy()
    for number in slots:
        ids = side.flow.slots[number].ids
        moved[ids] *= pattern(*ids.shape)
    one, two = (run(side, ground.inputs, given) for given in (base, moved))
    if difference(one.outputs, two.outputs) <= EXACT:
        return []
    if len(slots) == 1:
        return slots
    half = len(slots) // 2
    halves = (_waking(ground, part) for part in (slots[:half], slots[half:]))
    return [number for found in halves for number in found]


def _prints(side: SlottedSide, result: Run) -> tuple[Array, Array]:
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
