"""Pairs the slots of two models on the evidence, and leaves open what the evidence leaves open.

A *twin* is one model in Linen and in nnx: which numbers of the one are which of the other? The
words of the answer:

    slot          elements of a leaf (an array of weights), at the place where the model first uses
                  them: a fused `qkv` has three slots. Numbered in that order (`dataflow.py`)
    form          what two slots must share to be a pair: collection, and (N, K), the numbers of
                  outputs and inputs of the product that uses them (`sides.py`)
    HELD          in place of a form: the slot's leaf is on one side alone, and is held at a value
                  (its constructor's, say) at which both sides compute the same
    fingerprint   two vectors: one from the gradient of the outputs with respect to the slot, one
                  from the new value that the call gives it (batch statistics), else zeros. All
                  slots of a form have the same numbers in them meanwhile (`fingerprints.py`)
    gap           the relative difference of two fingerprints; up to `EXACT` it is rounding
    rich          a form with numbers of its own. If there are others, evidence is *partial*: their
                  numbers (a constant, say) tell nothing, and may hide what tells slots apart
    seen          a slot on which an output, or its own new value, depends
    flows into    what the slot gives reaches another, directly or through others
    candidate     a slot of the other side that may be a slot's own

Steps 1 to 3 leave ever fewer candidates. Two slots are a pair once each is the only candidate of
the other. Step 4 may forbid step 3.

1. **Fingerprints.** A candidate has the same form and a small gap: one that the difference of the
   twins' outputs explains, and at most ten times the smallest. For the twin of `example.py`, whose
   nnx side keeps its last kernel in an attribute `last`, that is enough. The gaps, "-" for slots of
   different forms:

                           nnx 0 first/kernel   1 first/bias   2 last
    Linen 0 up/kernel            0                   -           0.98
          1 up/bias              -                   0           -
          2 down/kernel          0.98                -           0

    >>> from linen_nnx.infer.example import two_layers
    >>> from linen_nnx.infer.fingerprints import fingerprints
    >>> from linen_nnx.infer.ground import common_ground
    >>> from linen_nnx.infer.sides import sides
    >>> from linen_nnx.infer.trace import trace_linen, trace_nnx
    >>> twin = two_layers()                               # has both models
    >>> both = sides(trace_linen(twin), trace_nnx(twin), alone={})
    >>> ground = common_ground(both)                      # numbers at which both compute the same
    >>> [(pair.linen, pair.nnx) for pair in assign(*ground.sides, fingerprints(ground)).pairs]
    [(0, 0), (1, 1), (2, 2)]

2. **Dataflow.** If A is paired with A', and B with B', then A must flow into B exactly when A'
   flows into B'. (Where no candidate of a slot agrees, the models differ there, and all stay.)
   Say that e0, e1, e0' and e1' have one fingerprint, that f and f' have another and g and g' a
   third:

    Linen   e0 -> f    e1 -> g          e0 and e1 each fit e0' and e1'
    nnx     e1' -> f'  e0' -> g'        f is paired with f', so e0 is with e1'

   Below, the slots e0, e1, f and g have the numbers 0 to 3, and `linen[2, 0]` says that e0 flows
   into f. In `fits`, each row is a Linen slot with its candidates.

    >>> linen = np.array([[0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]], bool)
    >>> nnx = np.array([[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0], [1, 0, 0, 0]], bool)
    >>> fits = np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], bool)
    >>> _Candidates((linen, nnx), fits).pairs()
    [(0, 1), (1, 0), (2, 2), (3, 3)]

3. **Order of first use.** What is left may be interchangeable: two towers whose results are added
   give the same output whichever is whose. Then the slot that is used first on one side is paired
   with the one that is used first on the other. Slots that no output sees, and all under partial
   evidence, stay open: nothing shows that they are interchangeable.

    >>> nothing_flows = np.zeros((2, 2), bool)
    >>> towers = _Candidates((nothing_flows, nothing_flows), fits=np.ones((2, 2), bool))
    >>> towers.tied(skip={})
    ([0, 1], [0, 1])
    >>> towers.choose(0, 0)
    >>> towers.pairs()
    [(0, 0), (1, 1)]

4. **Names** have a veto, no more. Before the first slot of a group is paired, its path is compared
   with those of its candidates. If a later candidate shares more distinguishing words with it than
   the first does, every slot still in the group stays open: a wrong pair does more harm than a
   missing one.
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
"""By slot without a pair: slots of the other side for a person to look at, and why it is open.

They are those whose fingerprints fit, whatever the dataflow says; if none fits, all of its form.
"""
SEE_NOTES = "nothing is proven of these two models: `notes` say why"


class Pair(NamedTuple):
    """One pair of slots, by number, and the evidence.

    Attributes:
      gap: the gap between the two.
      margin: the smallest gap between the Linen slot and any other nnx slot, candidate or not;
        infinite if no other has its form.
      seen: whether any output, or its own new value, depends on the Linen slot; False where there
        are no fingerprints.
      chosen: whether the order of first use had to decide, on this pair or on one whose choice
        settled this one.
      names_agree: for a chosen pair, whether the names spoke for the choice, or for all choices if
        this pair followed from others; False if they said nothing.
    """

    linen: int
    nnx: int
    gap: float
    margin: float
    seen: bool
    chosen: bool
    names_agree: bool


class Assignment(NamedTuple):
    """The pairs that were found, and for Linen and nnx the slots that are open."""

    pairs: list[Pair]
    open: tuple[OpenSlots, OpenSlots]


def assign(linen: SlottedSide, nnx: SlottedSide, prints: Prints) -> Assignment:
    """Pairs the slots of both sides; the steps are those at the head of this file."""
    fits, gaps = _compare_fingerprints(linen, nnx, prints)
    # Where the twins cannot be compared there are no fingerprints, and so nothing is seen.
    seen = prints.seen if len(prints.seen) else np.zeros(len(linen.forms), bool)
    candidates = _Candidates((linen.flow.above, nnx.flow.above), fits)
    # What the evidence alone settles. Pairs beyond these rest on a choice, and say so.
    firm = set(candidates.pairs())
    names_agree, disputed = _break_ties(candidates, (linen, nnx), prints.partial, seen)
    pairs: list[Pair] = []
    paired: tuple[set[int], set[int]] = set(), set()
    for a, b in candidates.pairs():
        others = np.delete(gaps[a], b)
        margin = float(others.min(initial=np.inf))
        # A pair may follow from choices made elsewhere. Nobody knows from which: so it is said to
        # have the names' support only if all choices have it.
        agreed = names_agree.get(a, all(names_agree.values()))
        chosen = (a, b) not in firm
        pairs.append(Pair(a, b, float(gaps[a, b]), margin, bool(seen[a]), chosen, agreed))
        paired[0].add(a)
        paired[1].add(b)
    left = candidates.fits
    open_linen = _open_slots((linen, nnx), paired[0], fits, left, gaps, prints)
    open_nnx = _open_slots((nnx, linen), paired[1], fits.T, left.T, gaps.T, prints)
    for slot in disputed.keys() & open_linen.keys():
        near, _ = open_linen[slot]
        open_linen[slot] = near, disputed[slot]
    return Assignment(pairs, (open_linen, open_nnx))


def words(path: str) -> set[str]:
    """The words and numbers of a path, in lower case.

    Capitals in a row are one word with no regard to sense: `MLPBlock` gives `mlpb` and `lock`, on
    either side.

    Example:
        >>> sorted(words("params/ResBlock_0/out_proj"))
        ['0', 'block', 'out', 'params', 'proj', 'res']
    """
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[0-9]+", path)}


def shown(values: Array) -> str:
    """The values that a leaf is held at, in a few words: one number, or its constructor's.

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
    """Two arrays (Linen slots, nnx slots): which slots may be pairs, bool, and the gaps."""
    gaps = np.full((len(linen.forms), len(nnx.forms)), np.inf)
    for form in set(linen.forms) - {HELD}:
        rows, columns = _slots_of_form(linen, form), _slots_of_form(nnx, form)
        block = np.ix_(rows, columns)
        # Slots of forms that are not rich are not compared. They get the gap between some
        # fingerprint and zeros, which never fits, and is less than that between two forms.
        gaps[block] = 1.0
        if form not in prints.rich:
            continue
        left, right = prints.linen[rows], prints.nnx[columns]
        if prints.partial:
            # Numbers of forms that are not rich may hide a slot. That no output depends on two
            # slots is then no evidence that they are a pair.
            left[~left.any((1, 2))] = np.nan
        of_gradients = distances(left[:, 0], right[:, 0])
        of_new_values = distances(left[:, 1], right[:, 1])
        gaps[block] = np.nan_to_num(np.maximum(of_gradients, of_new_values), nan=1.0)
    # If the models' outputs differ slightly (another epsilon, say), the tolerance may be as large
    # as 0.01, and slots that do not belong together could pass it. So a gap must also be at most
    # ten times the smallest gap of its row and of its column, or at most `EXACT`.
    nearest_of_row = gaps.min(1, initial=np.inf, keepdims=True)
    nearest_of_column = gaps.min(0, initial=np.inf, keepdims=True)
    nearest = np.minimum(nearest_of_row, nearest_of_column)
    fits = (gaps <= prints.tolerance) & (gaps <= np.maximum(10 * nearest, EXACT))
    return fits, gaps


def _slots_of_form(side: SlottedSide, form: tuple[object, ...]) -> list[int]:
    """The slots of a form; none for `HELD`, as the other side has nothing to pair them with."""
    return [] if form == HELD else side.slots_of_form(form)


# Step 2


class _Candidates:
    """Which slots may still be pairs, narrowed by the dataflow.

    Attributes:
      fits: (Linen slots, nnx slots) bool; it only ever loses candidates.
      above: for each side (slots, slots) bool: `above[a, b]` says that b flows into a.
    """

    def __init__(self, above: tuple[Array, Array], fits: Array) -> None:
        self.above = above
        self.fits = fits.copy()
        self.narrow()

    def pairs(self) -> list[tuple[int, int]]:
        """Slots with one candidate that is no other's: the only True of its row and column."""
        is_single = (self.fits.sum(1) == 1)[:, None] & (self.fits.sum(0) == 1)[None] & self.fits
        return [(int(a), int(b)) for a, b in np.argwhere(is_single)]

    def choose(self, a: int, b: int) -> None:
        """Makes two slots a pair, and draws the conclusions."""
        self.fits[a] = self.fits[:, b] = False
        self.fits[a, b] = True
        self.narrow()

    def narrow(self) -> None:
        """Rules out what the dataflow between pairs contradicts, until the pairs stay the same.

        Each round looks at all slots at once. A slot is described by the pairs that flow into it
        and those that it flows into; candidates whose description differs are dropped, unless all
        differ. That may make new pairs, which tell more in the next round.
        """
        pairs: list[tuple[int, int]] | None = None
        # One pair may come as another goes: so the pairs are compared, not how many they are.
        while pairs != (pairs := self._drop_contradictions()):
            known = np.array(pairs, int).reshape(-1, 2)
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

    def _drop_contradictions(self) -> list[tuple[int, int]]:
        """Drops pairs that contradict others, the worst first; returns those that remain.

        One wrong pair contradicts many right ones, and these contradict nothing else. So the pair
        with the most contradictions goes, and the rest is looked at again. Of equally many, as when
        two contradict each other, the one that Linen uses first goes.
        """
        while pairs := self.pairs():
            left, right = np.array(pairs).T
            faults = self.above[0][np.ix_(left, left)] != self.above[1][np.ix_(right, right)]
            if not faults.any():
                break
            worst = int((faults.sum(0) + faults.sum(1)).argmax())
            self.fits[left[worst], right[worst]] = False
        return pairs

    # Step 3

    def tied(self, skip: dict[int, str]) -> tuple[list[int], list[int]] | None:
        """The first group of Linen slots with the same candidates, as many as they, all their own.

        Nothing but a choice settles such a group. Where candidates overlap in another way, or fit
        slots outside of the group, a choice might be wrong: such groups are passed over, and those
        that begin with a slot of `skip`.

        Returns the Linen slots and their candidates, either in order of use; None if none is left.
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

    Returns, by Linen slot, whether the names spoke for the choice by which it was paired, and why
    no choice was made.
    """
    linen, nnx = both
    names_agree: dict[int, bool] = {}
    disputed: dict[int, str] = {}
    while tied := candidates.tied(disputed):
        # Slots are numbered by first use, so the first of either list are used first.
        left, right = tied
        if not seen[left[0]]:
            why = "no output sees it, and several uses fit it"
            disputed |= dict.fromkeys(left, why)
            continue
        if partial:
            why = "several uses fit it, and leaves that are not told apart may hide which is its"
            disputed |= dict.fromkeys(left, why)
            continue
        scores = _shared_words(linen.first_leaf[left[0]], [nnx.first_leaf[slot] for slot in right])
        if max(scores) > scores[0]:
            why = "the order of first use and the names disagree on which is whose"
            disputed |= dict.fromkeys(left, why)
            continue
        names_agree[left[0]] = scores.count(scores[0]) == 1
        # One pair a time: the dataflow may settle the others of the group by it.
        candidates.choose(left[0], right[0])
    return names_agree, disputed


def _shared_words(name: str, others: Sequence[str]) -> list[int]:
    """How many distinguishing words each of some paths shares with a path `name`.

    A word that all the others have distinguishes none of them, and does not count.

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
    left: Array,
    gaps: Array,
    prints: Prints,
) -> OpenSlots:
    """The slots of the first side without a pair, each with slots to look at and the reason.

    `fits` has the candidates by fingerprints, `left` those that the dataflow and choices left.
    """
    side, other = sides
    own = prints.linen if side.trace.side == "linen" else prints.nnx
    result: OpenSlots = {}
    for slot in sorted(set(range(len(side.forms))) - paired):
        form = side.forms[slot]
        near = _nearest(side, other, slot, gaps)
        fitting = [k for k in near if fits[slot, k]]
        remaining = int(left[slot].sum())
        if prints.problem:
            why = SEE_NOTES
        elif form == HELD:
            near = _in_another_form(side, other, slot)
            why = _why_held(side, other, slot, near)
        elif not near:
            why = "the other side uses nothing of its collection and size"
        elif form not in prints.rich:
            why = "its gradient was not compared: the sides use leaves of its size differently"
        elif not fitting and not own[slot].any():
            why = "no output depends on it at the numbers that were tried"
        elif not fitting:
            gap = gaps[slot].min()
            why = f"no fingerprint of the other side is near enough to its own (nearest {gap:.0e})"
        elif remaining > 1:
            why = f"{remaining} uses of the other side fit it, and the evidence does not tell which"
        elif remaining:
            why = "the one use of the other side that fits it fits others as well"
        else:
            why = "the dataflow contradicts every use of the other side that fits it"
        result[slot] = fitting or near, why
    return result


def _in_another_form(side: SlottedSide, other: SlottedSide, slot: int) -> list[int]:
    """The slots of the other side that may hold what a slot that is held does, likeliest first."""
    shape = side.trace.leaves[side.first_leaf[slot]].shape
    alike: list[int] = []
    for number in other.slots_of_form(HELD):
        leaf = other.trace.leaves[other.first_leaf[number]]
        if leaf.shape == shape and leaf.collection == "params":
            alike.append(number)
    # The third of a shape by order of use is likely to be the third of that shape there.
    rank = 0
    for number in side.slots_of_form(HELD):
        if number < slot and side.trace.leaves[side.first_leaf[number]].shape == shape:
            rank += 1
    return sorted(alike, key=lambda number: abs(alike.index(number) - rank))


def _why_held(side: SlottedSide, other: SlottedSide, slot: int, near: list[int]) -> str:
    """Why a slot that is held has no pair."""
    value = shown(side.held[side.first_leaf[slot]])
    if not near:
        return f"the other side has no leaf for it; both compute the same where it is {value}"
    mate = other.first_leaf[near[0]]
    return (
        f"`{mate}` holds the same in another form, it seems: both compute the same where this is "
        f"{value} and that is {shown(other.held[mate])} (1 + scale against scale, say). No op "
        "translates that: give the nnx model the form that Linen has"
    )


def _nearest(side: SlottedSide, other: SlottedSide, slot: int, gaps: Array) -> list[int]:
    """The slots of the other side with the form of a slot, likeliest first.

    They are sorted by gap, and by rank where gaps are equal: for the third slot of a form, the
    third slot of that form on the other side comes first.
    """
    form = side.forms[slot]
    rank = side.forms[:slot].count(form)
    alike = _slots_of_form(other, form)
    return sorted(alike, key=lambda k: (gaps[slot, k], abs(alike.index(k) - rank)))
