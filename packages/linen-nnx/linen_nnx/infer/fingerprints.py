"""Gradient fingerprints: slots that act alike have equal gradients, whatever they are called.

We do not know yet which slot matches which. So all slots of one form get the same values on both
sides (`ground.py` finds them), and both models give the same output under any pairing. The
gradients of that output still differ from slot to slot, as each depends on what comes before and
after. In the twin of `example.py` the two kernels hold the same four numbers:

    Linen                gradient                    nnx
    0 up/kernel          [[.001 .001] [.009 .012]]   0 first/kernel
    1 up/bias            [[.001] [.008]]             1 first/bias
    2 down/kernel        [[.071 .071] [.600 .603]]   2 last

    >>> from linen_nnx.infer.example import two_layers
    >>> from linen_nnx.infer.ground import common_ground
    >>> from linen_nnx.infer.sides import sides
    >>> from linen_nnx.infer.trace import trace_linen, trace_nnx
    >>> both = sides(trace_linen(two_layers()), trace_nnx(two_layers()), {})
    >>> prints = fingerprints(common_ground(both))
    >>> np.allclose(prints.linen, prints.nnx, atol=0, rtol=1e-9)     # 0 with 0, 1 with 1, 2 with 2
    True
    >>> np.allclose(prints.linen[0], prints.nnx[2], rtol=0.5)        # 0 is not 2
    False

For slots that the call updates (batch statistics, say) the new value serves likewise. A fingerprint
is sixteen weighted sums of each, so that slots of any size are compared at one cost, and the order
of their elements counts.
"""

import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from linen_nnx.infer.ground import Ground, not_run
from linen_nnx.infer.run import EXACT, difference, distinct, pattern, rounding, run
from linen_nnx.infer.sides import SlotForm, SlottedSide

Array = np.ndarray
_SUMS = 16


class Prints(NamedTuple):
    """Fingerprints of both sides.

    Attributes:
      linen, nnx: (slots, 2, sums) float64; of the gradient of each slot and of its new value.
      noise: relative difference of the twins' outputs.
      seen: (Linen slots,) bool; whether any output, or its own new value, depends on the slot.
      rich: the forms that had numbers of their own.
      partial: whether there are other forms; a constant or the numbers of their leaves' shape had
        to do for them.
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
        """Fingerprints that differ relatively by no more than this are equal.

        Outputs that agree but for rounding allow 1e-8. Outputs that differ (by another epsilon in a
        norm, say) allow their difference a hundredfold, up to a percent: gradients differ by more
        than outputs do.
        """
        return max(EXACT, min(100 * self.noise, 0.01))


def fingerprints(ground: Ground) -> Prints:
    """The fingerprints of both sides on common ground; none where there is no such ground."""
    if ground.problem is not None:
        return _without(ground.problem)
    # One side after the other: gradients take twice a model's memory, fingerprints nearly none.
    try:
        linen, sizes = _prints(ground, 0)
        nnx, _ = _prints(ground, 1)
    except Exception as error:  # the user's own model: it may have no gradient, as a while loop has
        return _without(not_run(error))
    noise = difference(*ground.outputs)
    seen = sizes > 0
    seen[_waking(ground, np.flatnonzero(~seen).tolist())] = True
    return Prints(linen, nnx, noise, seen, ground.rich, ground.partial, None)


def _without(problem: str) -> Prints:
    """No fingerprints, and why."""
    none = np.zeros(0)
    return Prints(none, none, 0.0, none, set(), False, problem)


def _waking(ground: Ground, slots: list[int]) -> list[int]:
    """Which Linen slots without a gradient are seen after all, once no two slots are alike.

    Where all slots of a form are equal, symmetry hides some. A router that chooses between experts
    has no gradient while all experts compute the same.
    """
    if not slots:
        return []
    side = ground.sides[0]
    values = distinct(side, ground.values(0), side.paths)
    before = run(side, ground.inputs, values)
    for number in slots:
        slot = side.flow.slots[number]
        values[slot.numbers()] *= pattern(*slot.shape)
    after = run(side, ground.inputs, values)
    if difference(before.outputs, after.outputs) <= EXACT:
        return []
    if len(slots) == 1:
        return slots
    # Most are blind indeed. Looking at halves takes few runs where few slots wake.
    half = len(slots) // 2
    return _waking(ground, slots[:half]) + _waking(ground, slots[half:])


def _prints(ground: Ground, number: int) -> tuple[Array, Array]:
    """(slots, 2, sums): of the gradient of each slot, 0 if blind, and of its new value.

    And (slots,): how strongly outputs, or its own new value, depend on each slot; 0 for those whose
    gradient is nothing but rounding.
    """
    side = ground.sides[number]
    result = run(side, ground.inputs, ground.values(number), by=set(side.paths))
    slots = side.flow.slots
    rows = np.zeros((len(slots), 2, _SUMS))
    largest = np.zeros((2, len(slots)))
    # By size, so that the weights of each size are drawn once.
    in_order = sorted(range(len(slots)), key=lambda slot: math.prod(slots[slot].shape))
    for size, alike in itertools.groupby(in_order, lambda slot: math.prod(slots[slot].shape)):
        weights = _weights(size)
        for slot in alike:
            for kind, arrays in enumerate((result.slopes, result.updates)):
                # A slot that the call does not update has no new value: zeros.
                if not arrays.keys().isdisjoint(side.leaves_of_slot[slot]):
                    values = _gathered(side, arrays, slot)
                    rows[slot, kind] = _sums(values, weights)
                    largest[kind, slot] = np.abs(values).max()
    slopes, news = largest
    sizes = np.where(slopes > rounding(slopes), slopes, 0) + news
    # Rounding differs from side to side: as it stands it would be a fingerprint of nothing.
    rows[~(sizes > 0), 0] = 0
    return rows, sizes


def _gathered(side: SlottedSide, arrays: Mapping[str, Array], slot: int) -> Array:
    """(N, K): what some leaves have for the elements of a slot; 0 of those that have nothing."""
    leaves: dict[str, Array] = {}
    for path in side.leaves_of_slot[slot]:
        known = path in arrays
        leaves[path] = arrays[path] if known else np.zeros(side.trace.leaves[path].shape)
    return side.gather(leaves, side.flow.slots[slot].elements)


def _sums(values: Array, weights: Array) -> Array:
    """(sums,): sixteen weighted sums over parts of an array, fewer and zeros where it is small.

    Example:
        >>> one, two = np.array([1.0, 2.0]), np.array([2.0, 1.0])
        >>> bool(_sums(one, _weights(2)).sum() == _sums(two, _weights(2)).sum())
        False
    """
    weighted = values.ravel() * weights
    # A slot of fewer elements than sums has a sum for each element, and zeros behind them.
    starts = np.unique(np.linspace(0, values.size, _SUMS, endpoint=False).astype(int))
    return np.pad(np.add.reduceat(weighted, starts), (0, _SUMS - len(starts)))


def _weights(size: int) -> Array:
    """(size,): the same random weights for all slots of a size, on both sides."""
    return np.random.default_rng(size).uniform(0.5, 1.5, size)
