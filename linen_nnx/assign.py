"""Pairs the slots of two models on the evidence, and leaves open what the evidence leaves open.

Two slots may be a pair if their forms and their gradient fingerprints are equal. Of such
candidates the dataflow rules out those that other pairs contradict: what flows into one must be
what flows into the other, and so for what it flows into and what it acts on. What both leave open
is interchangeable as far as any output shows; then the order of first use decides, unless the names
say otherwise.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from linen_nnx.dataflow import Flow
from linen_nnx.fingerprints import Prints, distances
from linen_nnx.sides import Side

Array = np.ndarray


class Pair(NamedTuple):
    """One pair of slots, by number, and the evidence.

    gap: relative difference of their fingerprints; margin: that to the nearest other candidate.
    seen: whether any output depends on them.
    tie: how many slots the evidence could not tell apart from them when order decided, else 0.
    named: whether names agreed with the order when it decided.
    """

    linen: int
    nnx: int
    gap: float
    margin: float
    seen: bool
    tie: int = 0
    named: bool = False


class Assignment(NamedTuple):
    """Pairs, and for every slot without one its candidates on the other side and the reason."""

    pairs: list[Pair]
    open_linen: dict[int, tuple[list[int], str]]
    open_nnx: dict[int, tuple[list[int], str]]


def assign(linen: Side, nnx: Side, prints: Prints) -> Assignment:
    """Pairs the slots of both sides on their fingerprints and dataflow."""
    fits, gaps = _candidates(linen, nnx, prints)
    state = _State(linen.flow, nnx.flow, fits)
    state.narrow()
    ties: dict[int, tuple[int, bool]] = {}
    disputed: dict[int, str] = {}
    seen = np.zeros(len(linen.forms), bool) if prints.problem else prints.seen
    while (tied := state.tied(set(disputed))) is not None:
        left, right = tied
        choice = right[0]  # slots are numbered by first use, on both sides
        scores = _alike(linen.first[left[0]], [nnx.first[k] for k in right])
        if not seen[left[0]]:
            disputed |= dict.fromkeys(left, "no output sees it, and several places fit it")
        elif max(scores) > scores[0]:
            why = "the order of first use and the names disagree on which is whose"
            disputed |= dict.fromkeys(left, why)
        else:
            ties[left[0]] = (len(left), scores.count(scores[0]) == 1)
            state.choose(left[0], choice)
            state.narrow()
    pairs = []
    for a, b in state.pairs():
        others = np.delete(gaps[a], b)
        margin = float(others.min()) if others.size else np.inf
        tie, named = ties.get(a, (0, False))
        pairs.append(Pair(a, b, float(gaps[a, b]), margin, bool(seen[a]), tie, named))
    return Assignment(
        pairs,
        _open(state, {pair.linen for pair in pairs}, fits, gaps, prints, disputed),
        _open(state, {pair.nnx for pair in pairs}, fits.T, gaps.T, prints, {}),
    )


def _candidates(linen: Side, nnx: Side, prints: Prints) -> tuple[Array, Array]:
    """(Linen slots, nnx slots): which may be pairs, and the gaps of their fingerprints."""
    gaps = np.full((len(linen.forms), len(nnx.forms)), np.inf)
    for form in set(linen.forms) & set(nnx.forms):
        rows = [k for k, other in enumerate(linen.forms) if other == form]
        columns = [k for k, other in enumerate(nnx.forms) if other == form]
        if prints.problem or len(form) == 1:
            gaps[np.ix_(rows, columns)] = 1.0
            continue
        left = np.stack([prints.linen[k] for k in rows])
        right = np.stack([prints.nnx[k] for k in columns])
        each = [distances(left[:, part], right[:, part], 1e-30) for part in range(2)]
        gaps[np.ix_(rows, columns)] = np.maximum(*each)
    return gaps <= prints.tolerance, gaps


class _State:
    """The pairs that are still possible."""

    def __init__(self, linen: Flow, nnx: Flow, fits: Array) -> None:
        self.fits = fits.copy()
        self.flows = (linen, nnx)

    def pairs(self) -> list[tuple[int, int]]:
        """Linen slots with one candidate that is no other's candidate."""
        single = (self.fits.sum(1) == 1)[:, None] & (self.fits.sum(0) == 1)[None] & self.fits
        return [(int(a), int(b)) for a, b in np.argwhere(single)]

    def choose(self, a: int, b: int) -> None:
        self.fits[a] = False
        self.fits[:, b] = False
        self.fits[a, b] = True

    def narrow(self) -> None:
        """Rules out what the dataflow between pairs contradicts, until nothing changes."""
        known = -1
        while known != (known := self._settle()):
            pairs = np.array(list(self.pairs()) if known else [], int).reshape(-1, 2)
            left, right = pairs[:, 0], pairs[:, 1]
            one, two = self._relations(0, left), self._relations(1, right)
            _, kinds = np.unique(np.concatenate([one, two]), axis=0, return_inverse=True)
            same = kinds[: len(one), None] == kinds[None, len(one) :]
            for a in np.flatnonzero(self.fits.sum(1) > 1):
                if (self.fits[a] & same[a]).any():
                    self.fits[a] &= same[a]
            for b in np.flatnonzero(self.fits.sum(0) > 1):
                if (self.fits[:, b] & same[:, b]).any():
                    self.fits[:, b] &= same[:, b]

    def _settle(self) -> int:
        """Drops pairs that contradict others, the worst first; returns how many remain."""
        while pairs := self.pairs():
            left, right = map(np.array, zip(*pairs, strict=True))
            one = self.flows[0].above[np.ix_(left, left)]
            two = self.flows[1].above[np.ix_(right, right)]
            faults = (one != two).sum(0) + (one != two).sum(1)
            if not faults.any():
                return len(pairs)
            worst = int(faults.argmax())
            self.fits[left[worst], right[worst]] = False
        return 0

    def _relations(self, side: int, known: Array) -> Array:
        """(slots, bytes): how each slot is related to the known ones, as packed bits."""
        flow = self.flows[side]
        known = np.asarray(known, int)
        related = np.concatenate([flow.above[:, known], flow.above[known].T], axis=1)
        return np.packbits(related, axis=1)

    def tied(self, skip: set[int]) -> tuple[list[int], list[int]] | None:
        """The first slots that share all their candidates, if they are equally many."""
        for a in np.flatnonzero(self.fits.sum(1) > 1):
            if int(a) in skip:
                continue
            right = np.flatnonzero(self.fits[a])
            left = np.flatnonzero((self.fits == self.fits[a]).all(1))
            closed = not self.fits[np.setdiff1d(np.arange(len(self.fits)), left)][:, right].any()
            if len(left) == len(right) and closed:
                return left.tolist(), right.tolist()
        return None


def _open(
    state: _State,
    paired: set[int],
    fits: Array,
    gaps: Array,
    prints: Prints,
    disputed: dict[int, str],
) -> dict[int, tuple[list[int], str]]:
    """For each slot without a pair: candidates, the likeliest first, and the reason."""
    result = {}
    for slot in sorted(set(range(len(gaps))) - paired):
        near = np.argsort(gaps[slot], kind="stable")
        candidates = [int(k) for k in near if gaps[slot, k] < np.inf]
        if slot in disputed:
            why = disputed[slot]
        elif not candidates:
            why = "the other side uses no leaf in this form"
        elif prints.problem:
            why = prints.problem
        elif not fits[slot].any():
            why = f"no gradient of the other side equals its own (nearest {gaps[slot].min():.0e})"
        else:
            count = int(fits[slot].sum())
            candidates = [k for k in candidates if fits[slot, k]]
            why = f"{count} leaves fit equally well" if count > 1 else "the dataflow contradicts it"
        result[slot] = (candidates, why)
    return result


def _alike(name: str, others: Sequence[str]) -> list[int]:
    """How many words each of the others shares with a name that not all of them share."""
    known = [words(other) for other in others]
    common = set.intersection(*known)
    return [len(words(name) & (other - common)) for other in known]


def words(path: str) -> set[str]:
    """The words and numbers of a path, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+", path)}
