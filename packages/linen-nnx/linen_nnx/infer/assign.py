"""Pairs the slots of two models on the evidence, and leaves open what the evidence leaves open.

A slot is one first use of elements of a leaf (`dataflow.py` draws those of `example.py`). Its
fingerprint is made of its gradient (`fingerprints.py`). Four steps leave ever fewer candidates:

1. **Fingerprints.** Two slots may be a pair if their forms are equal and their fingerprints nearly
   so. For the twin of `example.py` that is enough. The table holds the relative difference of
   fingerprints, "-" for slots of different forms:

                           nnx 0 first/kernel   1 first/bias   2 last
    Linen 0 up/kernel            0                   -           0.98
          1 up/bias              -                   0           -
          2 down/kernel          0.98                -           0

    >>> from linen_nnx.infer.example import two_layers
    >>> from linen_nnx.infer.fingerprints import fingerprints
    >>> from linen_nnx.infer.ground import common_ground
    >>> from linen_nnx.infer.sides import sides
    >>> from linen_nnx.infer.trace import trace_linen, trace_nnx
    >>> ground = common_ground(sides(trace_linen(two_layers()), trace_nnx(two_layers()), {}))
    >>> [(pair.linen, pair.nnx) for pair in assign(*ground.sides, fingerprints(ground)).pairs]
    [(0, 0), (1, 1), (2, 2)]

2. **Dataflow.** If A is paired with A', and B with B', then A must flow into B exactly when A'
   flows into B'. Say that two slots e have equal fingerprints, that f and g have their own, and
   that one e flows into f and the other into g:

    Linen   e0 -> f    e1 -> g          e0 and e1 each fit e0' and e1'
    nnx     e1' -> f'  e0' -> g'        f is paired with f', so e0 is with e1'

   Below, `linen[2, 0]` says that slot 0 flows into slot 2; the slots are e0, e1, f and g.

    >>> linen = np.array([[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]], bool)
    >>> nnx = np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]], bool)
    >>> fits = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    >>> _Candidates((linen, nnx), fits).pairs()
    [(0, 1), (1, 0), (2, 2), (3, 3)]

3. **Order of first use.** What is left may be interchangeable: two towers whose results are added
   give the same output whichever is whose. Then the slot that is used first on one side is paired
   with the one that is used first on the other.

    >>> nothing_flows = np.zeros((2, 2), bool)
    >>> towers = _Candidates((nothing_flows, nothing_flows), fits=np.ones((2, 2), bool))
    >>> towers.tied(skip={})
    ([0, 1], [0, 1])
    >>> towers.choose(0, 0)
    >>> towers.pairs()
    [(0, 0), (1, 1)]

4. **Names** have a veto, no more. If the words of the paths speak for another pairing than the
   order of first use, both stay open: a wrong rule is worse than none.
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
"""By slot without a pair: the slots of the other side that it may go with, and why it is open."""
SEE_NOTES = "nothing is proven of these two models: `notes` say why"


class Pair(NamedTuple):
    """One pair of slots, by number, and the evidence.

    Attributes:
      gap: relative difference of their fingerprints.
      margin: relative difference to the nearest other candidate.
      seen: whether any output depends on the Linen slot.
      chosen: whether the order of first use had to decide, on this pair or on one whose choice
        settled this one.
      named: whether the names agreed where the order of first use decided.
    """

    linen: int
    nnx: int
    gap: float
    margin: float
    seen: bool
    chosen: bool
    named: bool


class Assignment(NamedTuple):
    """The pairs that were found, and for Linen and nnx the slots that are open."""

    pairs: list[Pair]
    open: tuple[OpenSlots, OpenSlots]


def assign(linen: SlottedSide, nnx: SlottedSide, prints: Prints) -> Assignment:
    """Pairs the slots of both sides; the steps are those at the head of this file."""
    fits, gaps = _compare_fingerprints(linen, nnx, prints)
    seen = prints.seen if len(prints.seen) else np.zeros(len(linen.forms), bool)
    candidates = _Candidates((linen.flow.above, nnx.flow.above), fits)
    # What the evidence alone settles. Pairs beyond these rest on a choice, and say so.
    firm = set(candidates.pairs())
    named, disputed = _break_ties(candidates, (linen, nnx), prints.partial, seen)
    pairs: list[Pair] = []
    paired: tuple[set[int], set[int]] = set(), set()
    for a, b in candidates.pairs():
        others = np.delete(gaps[a], b)
        margin = float(others.min(initial=np.inf))
        # A pair that followed from choices made elsewhere is as good as all of them together.
        agreed = named.get(a, all(named.values()))
        chosen = (a, b) not in firm
        pairs.append(Pair(a, b, float(gaps[a, b]), margin, bool(seen[a]), chosen, agreed))
        paired[0].add(a)
        paired[1].add(b)
    open_linen = _open_slots((linen, nnx), paired[0], fits, gaps, prints)
    open_nnx = _open_slots((nnx, linen), paired[1], fits.T, gaps.T, prints)
    for slot in disputed.keys() & open_linen.keys():
        near, _ = open_linen[slot]
        open_linen[slot] = near, disputed[slot]
    return Assignment(pairs, (open_linen, open_nnx))


def words(path: str) -> set[str]:
    """The words and numbers of a path, in lower case.

    Example:
        >>> sorted(words("params/ResBlock_0/out_proj"))
        ['0', 'block', 'out', 'params', 'proj', 'res']
    """
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+", path)}


def shown(values: Array) -> str:
    """The values of a leaf in a few words.

    Example:
        >>> shown(np.zeros(3)), shown(np.arange(3))
        ('0', "what its model's own constructor gives it")
    """
    if values.size and (values == values.flat[0]).all():
        return f"{values.flat[0]:g}"
    return "what its model's own constructor gives it"


# Step 1


def _compare_fingerprints(
    linen: SlottedSide, nnx: SlottedSide, prints: Prints
) -> tuple[Array, Array]:
    """(Linen slots, nnx slots): which may be pairs, and the gaps of their fingerprints."""
    gaps = np.full((len(linen.forms), len(nnx.forms)), np.inf)
    for form in set(linen.forms) - {HELD}:
        rows, columns = _slots_of_form(linen, form), _slots_of_form(nnx, form)
        block = np.ix_(rows, columns)
        # Slots of one form that had no numbers of their own are told apart by nothing: 1 is the
        # gap of what has nothing in common.
        gaps[block] = 1.0
        if form not in prints.rich:
            continue
        left, right = prints.linen[rows], prints.nnx[columns]
        if prints.partial:
            # Some leaves are held at a constant, which may hide a slot. That no output depends on
            # two slots is then no evidence that they are a pair.
            left[~left.any((1, 2))] = np.nan
        of_gradients = distances(left[:, 0], right[:, 0])
        of_new_values = distances(left[:, 1], right[:, 1])
        gaps[block] = np.nan_to_num(np.maximum(of_gradients, of_new_values), nan=1.0)
    # Twins whose outputs differ (by another epsilon, say) get a tolerance of up to 0.01. So the
    # nearest alone is a candidate, and what is nearly as near.
    nearest_of_row = gaps.min(1, initial=np.inf, keepdims=True)
    nearest_of_column = gaps.min(0, initial=np.inf, keepdims=True)
    nearest = np.minimum(nearest_of_row, nearest_of_column)
    fits = (gaps <= prints.tolerance) & (gaps <= np.maximum(10 * nearest, EXACT))
    return fits, gaps


def _slots_of_form(side: SlottedSide, form: tuple[object, ...]) -> list[int]:
    """The slots of a form; none for `HELD`, as such slots have no twin."""
    return [] if form == HELD else side.slots_of_form(form)


# Step 2


class _Candidates:
    """Which slots may still be pairs, narrowed by the dataflow.

    Attributes:
      fits: (Linen slots, nnx slots) bool; it only ever loses candidates.
      above: for each side which slots flow into which, see `dataflow.Flow`.
    """

    def __init__(self, above: tuple[Array, Array], fits: Array) -> None:
        self.above = above
        self.fits = fits.copy()
        self.narrow()

    def pairs(self) -> list[tuple[int, int]]:
        """Slots with one candidate that is no other's candidate: rows and columns with one 1."""
        is_single = (self.fits.sum(1) == 1)[:, None] & (self.fits.sum(0) == 1)[None] & self.fits
        return [(int(a), int(b)) for a, b in np.argwhere(is_single)]

    def choose(self, a: int, b: int) -> None:
        """Makes two slots a pair, and draws the conclusions."""
        self.fits[a] = self.fits[:, b] = False
        self.fits[a, b] = True
        self.narrow()

    def narrow(self) -> None:
        """Rules out what the dataflow between pairs contradicts, until no pair is added or lost.

        Each round looks at all slots at once. A slot is described by the pairs that flow into it
        and those that it flows into; candidates whose description differs are dropped. Slots with
        one candidate left become pairs, and these tell more in the next round.
        """
        count = -1
        while count != (count := self._drop_contradictions()):
            known = np.array(self.pairs(), int).reshape(-1, 2)
            of_linen = _described(self.above[0], known[:, 0])
            of_nnx = _described(self.above[1], known[:, 1])
            # Equal descriptions get equal numbers: comparing numbers is far cheaper than rows.
            _, kinds = np.unique(np.concatenate([of_linen, of_nnx]), axis=0, return_inverse=True)
            same = kinds[: len(self.fits), None] == kinds[None, len(self.fits) :]
            for fits, alike in ((self.fits, same), (self.fits.T, same.T)):
                for slot in np.flatnonzero(fits.sum(1) > 1):
                    # If no candidate agrees, the models differ around this slot (sums in another
                    # order, say). Then the dataflow is no evidence, and all of them stay.
                    if (fits[slot] & alike[slot]).any():
                        fits[slot] &= alike[slot]

    def _drop_contradictions(self) -> int:
        """Drops pairs that contradict others, the worst first; returns how many remain.

        One wrong pair contradicts many right ones, and each of these only it. So the pair with the
        most contradictions goes, and the rest is looked at again.
        """
        while pairs := self.pairs():
            left, right = np.array(pairs).T
            faults = self.above[0][np.ix_(left, left)] != self.above[1][np.ix_(right, right)]
            if not faults.any():
                break
            worst = int((faults.sum(0) + faults.sum(1)).argmax())
            self.fits[left[worst], right[worst]] = False
        return len(pairs)

    # Step 3

    def tied(self, skip: dict[int, str]) -> tuple[list[int], list[int]] | None:
        """The first group of slots that share all their candidates, if they are equally many.

        Nothing but a choice settles such a group; where candidates overlap in another way, a choice
        might be wrong. Groups that begin with a slot of `skip` are passed over.
        """
        for a in np.flatnonzero(self.fits.sum(1) > 1):
            right = np.flatnonzero(self.fits[a])
            left = np.flatnonzero((self.fits == self.fits[a]).all(1))
            with_any_of_these = np.flatnonzero(self.fits[:, right].any(1))
            if int(a) not in skip and len(left) == len(right) == len(with_any_of_these):
                return left.tolist(), right.tolist()
        return None


def _described(above: Array, known: Array) -> Array:
    """(slots, bytes): which known slots flow into each slot, and which it flows into."""
    return np.packbits(np.concatenate([above[:, known], above[known].T], axis=1), axis=1)


# Steps 3 and 4


def _break_ties(
    candidates: _Candidates, both: tuple[SlottedSide, SlottedSide], partial: bool, seen: Array
) -> tuple[dict[int, bool], dict[int, str]]:
    """Pairs interchangeable slots by the order of first use, where nothing speaks against it.

    Returns, by Linen slot, whether the names agreed where it was paired, and why it was not.
    """
    linen, nnx = both
    named: dict[int, bool] = {}
    disputed: dict[int, str] = {}
    while tied := candidates.tied(disputed):
        # Slots are numbered by first use, so the first of either list are used first.
        left, right = tied
        scores = _shared_words(linen.first[left[0]], [nnx.first[slot] for slot in right])
        if partial or not seen[left[0]]:
            # What no output sees is not interchangeable: it is unknown.
            why = "no output sees it, and several places fit it"
            disputed |= dict.fromkeys(left, why)
        elif max(scores) > scores[0]:
            why = "the order of first use and the names disagree on which is whose"
            disputed |= dict.fromkeys(left, why)
        else:
            named[left[0]] = scores.count(scores[0]) == 1
            # One pair a time: the dataflow may settle the others of the group by it.
            candidates.choose(left[0], right[0])
    return named, disputed


def _shared_words(name: str, others: Sequence[str]) -> list[int]:
    """How many words each of the others shares with a name that not all of them share.

    Example:
        >>> _shared_words("params/left/kernel", ["left/kernel", "right/kernel"])
        [1, 0]
    """
    words_of = [words(other) for other in others]
    common = set.intersection(*words_of)
    return [len(words(name) & (own - common)) for own in words_of]


# What is left


def _open_slots(
    sides: tuple[SlottedSide, SlottedSide],
    paired: set[int],
    fits: Array,
    gaps: Array,
    prints: Prints,
) -> OpenSlots:
    """The slots of the first side without a pair, each with its candidates and the reason."""
    side, other = sides
    result: OpenSlots = {}
    for slot in sorted(set(range(len(gaps))) - paired):
        form = side.forms[slot]
        near = _nearest(side, other, slot, gaps)
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


def _nearest(side: SlottedSide, other: SlottedSide, slot: int, gaps: Array) -> list[int]:
    """The slots of the other side with the form of a slot, likeliest first.

    They are sorted by fingerprint, and by rank where fingerprints are equal: for the third slot of
    a form, the third slot of that form on the other side comes first.
    """
    form = side.forms[slot]
    rank = side.forms[:slot].count(form)
    alike = _slots_of_form(other, form)
    return sorted(alike, key=lambda k: (gaps[slot, k], abs(alike.index(k) - rank)))
