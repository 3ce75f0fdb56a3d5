"""Pairs the slots of two models on the evidence, and leaves open what the evidence leaves open.

Two slots may be a pair if their forms and their gradient fingerprints are equal. Of such candidates
the dataflow rules out those that other pairs contradict: what flows into one must be what flows
into the other, and so for what they flow into. Slots that both leave open are interchangeable as
far as any output shows; then the order of first use decides, unless the names say otherwise.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from linen_nnx.infer.fingerprints import Prints
from linen_nnx.infer.run import EXACT, distances
from linen_nnx.infer.sides import HELD, SlottedSide

Array = np.ndarray
OpenSlots = dict[int, tuple[list[int], str]]
SEE_NOTES = "nothing is proven of these two models: `notes` say why"


class Pair(NamedTuple):
    """One pair of slots, by number, and the evidence.

    gap: relative difference of their fingerprints; margin: that to the nearest other candidate.
    seen: whether any output depends on them.
    chosen: whether the order of first use had to decide, on them or on slots they go with.
    named: whether names agreed where it did.
    """

    linen: int
    nnx: int
    gap: float
    margin: float
    seen: bool
    chosen: bool
    named: bool


class Assignment(NamedTuple):
    """Pairs; for each slot of either side without one its candidates, likeliest first, and why."""

    pairs: list[Pair]
    open: tuple[OpenSlots, OpenSlots]


def assign(linen: SlottedSide, nnx: SlottedSide, prints: Prints) -> Assignment:
    """Pairs the slots of both sides on their fingerprints and dataflow."""
    fits, gaps = _candidates(linen, nnx, prints)
    seen = prints.seen if len(prints.seen) else np.zeros(len(linen.forms), bool)
    state = _State((linen.flow.above, nnx.flow.above), fits)
    firm = set(state.pairs())
    named: dict[int, bool] = {}
    disputed: dict[int, str] = {}
    while tied := state.tied(disputed):
        left, right = tied  # slots are numbered by first use, on both sides
        scores = _alike(linen.first[left[0]], [nnx.first[k] for k in right])
        if prints.partial or not seen[left[0]]:
            disputed |= dict.fromkeys(left, "no output sees it, and several places fit it")
        elif max(scores) > scores[0]:
            why = "the order of first use and the names disagree on which is whose"
            disputed |= dict.fromkeys(left, why)
        else:
            named[left[0]] = scores.count(scores[0]) == 1
            state.choose(left[0], right[0])
    pairs = []
    for a, b in state.pairs():
        margin = float(np.delete(gaps[a], b).min(initial=np.inf))
        chosen, agreed = (a, b) not in firm, named.get(a, all(named.values()))
        pairs.append(Pair(a, b, float(gaps[a, b]), margin, bool(seen[a]), chosen, agreed))
    missing = (
        _open((linen, nnx), {pair.linen for pair in pairs}, fits, gaps, prints),
        _open((nnx, linen), {pair.nnx for pair in pairs}, fits.T, gaps.T, prints),
    )
    for slot in disputed.keys() & missing[0].keys():
        missing[0][slot] = missing[0][slot][0], disputed[slot]
    return Assignment(pairs, missing)


def words(path: str) -> set[str]:
    """The words and numbers of a path, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+", path)}


def shown(values: Array) -> str:
    """The values of a leaf in a few words."""
    if values.size and (values == values.flat[0]).all():
        return f"{values.flat[0]:g}"
    return "what its model's own constructor gives it"


def _candidates(linen: SlottedSide, nnx: SlottedSide, prints: Prints) -> tuple[Array, Array]:
    """(Linen slots, nnx slots): which may be pairs, and the gaps of their fingerprints."""
    gaps = np.full((len(linen.forms), len(nnx.forms)), np.inf)
    for form in set(linen.forms) - {HELD}:
        place = np.ix_(_places(linen, form), _places(nnx, form))
        gaps[place] = 1.0
        if form in prints.rich:
            left, right = prints.linen[place[0].ravel()], prints.nnx[place[1].ravel()]
            if prints.partial:  # what is held constant may hide a slot: no gradient tells nothing
                left[~left.any((1, 2))] = np.nan
            each = [distances(left[:, part], right[:, part]) for part in range(2)]
            gaps[place] = np.nan_to_num(np.maximum(*each), nan=1.0)
    near = np.minimum(*(gaps.min(axis, initial=np.inf, keepdims=True) for axis in (1, 0)))
    return (gaps <= prints.tolerance) & (gaps <= np.maximum(10 * near, EXACT)), gaps


class _State:
    """The pairs that are still possible: `fits` is (Linen slots, nnx slots) bool."""

    def __init__(self, above: tuple[Array, Array], fits: Array) -> None:
        self.above = above
        self.fits = fits.copy()
        self.narrow()

    def pairs(self) -> list[tuple[int, int]]:
        """Linen slots with one candidate that is no other's candidate."""
        single = (self.fits.sum(1) == 1)[:, None] & (self.fits.sum(0) == 1)[None] & self.fits
        return [(int(a), int(b)) for a, b in np.argwhere(single)]

    def choose(self, a: int, b: int) -> None:
        """Makes two slots a pair."""
        self.fits[a] = self.fits[:, b] = False
        self.fits[a, b] = True
        self.narrow()

    def narrow(self) -> None:
        """Rules out what the dataflow between pairs contradicts, until nothing changes."""
        count = -1
        while count != (count := self._settle()):
            known = np.array(self.pairs(), int).reshape(-1, 2).T
            related = [_related(above, side) for above, side in zip(self.above, known, strict=True)]
            _, kinds = np.unique(np.concatenate(related), axis=0, return_inverse=True)
            same = kinds[: len(self.fits), None] == kinds[None, len(self.fits) :]
            for fits, alike in ((self.fits, same), (self.fits.T, same.T)):
                for slot in np.flatnonzero(fits.sum(1) > 1):
                    if (fits[slot] & alike[slot]).any():
                        fits[slot] &= alike[slot]

    def _settle(self) -> int:
        """Drops pairs that contradict others, the worst first; returns how many remain."""
        while pairs := self.pairs():
            left, right = np.array(pairs).T
            faults = self.above[0][np.ix_(left, left)] != self.above[1][np.ix_(right, right)]
            if not faults.any():
                break
            worst = int((faults.sum(0) + faults.sum(1)).argmax())
            self.fits[left[worst], right[worst]] = False
        return len(pairs)

    def tied(self, skip: dict[int, str]) -> tuple[list[int], list[int]] | None:
        """The first slots that share all their candidates, if they are equally many."""
        for a in np.flatnonzero(self.fits.sum(1) > 1):
            right = np.flatnonzero(self.fits[a])
            left = np.flatnonzero((self.fits == self.fits[a]).all(1))
            shared = np.flatnonzero(self.fits[:, right].any(1))
            if int(a) not in skip and len(left) == len(right) == len(shared):
                return left.tolist(), right.tolist()
        return None


def _related(above: Array, known: Array) -> Array:
    """(slots, bytes): what of the known slots flows into each slot, and what it flows into."""
    return np.packbits(np.concatenate([above[:, known], above[known].T], axis=1), axis=1)


def _open(
    sides: tuple[SlottedSide, SlottedSide],
    paired: set[int],
    fits: Array,
    gaps: Array,
    prints: Prints,
) -> OpenSlots:
    side, other = sides
    result: OpenSlots = {}
    for slot in sorted(set(range(len(gaps))) - paired):
        form = side.forms[slot]
        rank = side.forms[:slot].count(form)
        alike = _places(other, form)
        near = sorted(alike, key=lambda k: (gaps[slot, k], abs(alike.index(k) - rank)))
        count = int(fits[slot].sum())
        if prints.problem:
            why = SEE_NOTES
        elif form == HELD:
            value = shown(side.held[side.first[slot]])
            why = f"the other side has no leaf for it; both compute the same where it is {value}"
        elif not count:
            why = f"no gradient of the other side equals its own (nearest {gaps[slot].min():.0e})"
        else:
            near = [k for k in near if fits[slot, k]]
            why = f"{count} leaves fit equally well" if count > 1 else "the dataflow contradicts it"
        result[slot] = near, why
    return result


def _places(side: SlottedSide, form: tuple[object, ...]) -> list[int]:
    return [slot for slot, other in enumerate(side.forms) if other == form and form != HELD]


def _alike(name: str, others: Sequence[str]) -> list[int]:
    """How many words each of the others shares with a name that not all of them share."""
    known = [words(other) for other in others]
    common = set.intersection(*known)
    return [len(words(name) & (other - common)) for other in known]
