"""Pairs whole leaves where the two models compute the same in different ways.

`assign.py` pairs slots, which must be equal on both sides. Where one model rotates halves and the
other a whole, or scales before a product and not after it, they are not. The gradient of each leaf
is equal all the same, element by element, at values that fit every way to pair the leaves:

    Linen q/kernel  [[.1 .2] [.3 .4]]     nnx a/kernel  [[.1 .2] [.3 .4]]    a rename
    Linen k/kernel  [[.5 .6] [.7 .8]]     nnx b/kernel  [[.5 .7] [.6 .8]]    a transpose
    Linen e         [[.4 .4]]             nnx s, t      [[.1 .3]], [[.3 .1]] their sum: copies
    Linen w         [.1 .2 .3]            nnx u, v      [.1 .2], [.3]        its parts: a concat

Each round goes through three steps, and ends when one finds rules:

    propose     rules of one kind that fit the gradients, alternatives included (`proposals.py`)
    try         leaves get numbers that differ from leaf to leaf, by these rules: the outputs of
                both sides must agree (`trial.py`)
    confirm     at these numbers the gradients must agree again, and in one way alone

Where all inputs of a product are one number, as beside constants, no gradient shows the order of
its rows. Such rules wait, whether they are new or come from slots, until more is known.

Then the leaves that are settled keep their own numbers, and the next round sees more. Beside leaves
that are all one constant, a matrix and its transpose have one gradient; beside leaves with numbers
of their own they have not.

The twin of `example.py` would not need this, but it can be paired so, too:

    >>> from linen_nnx.infer.example import two_layers
    >>> from linen_nnx.infer.ground import common_ground
    >>> from linen_nnx.infer.sides import sides
    >>> from linen_nnx.infer.trace import trace_linen, trace_nnx
    >>> both = sides(trace_linen(two_layers()), trace_nnx(two_layers()), {})
    >>> trial = Trial(common_ground(both), tolerance=1e-8)
    >>> found, _, _ = pair_leaves(trial, [], (set(both[0].paths), set(both[1].paths)))
    >>> for each in found:
    ...     print(each.rule, each.rule.ops)
    `params/down/kernel` <-> `last` (Transpose(perm=(1, 0)),)
    `params/up/bias` <-> `first/bias` ()
    `params/up/kernel` <-> `first/kernel` ()
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from linen_nnx.book.rules import RuleBook
from linen_nnx.infer.elements import gap, orders, positions, size, table
from linen_nnx.infer.found import FoundRule, SidedPath
from linen_nnx.infer.proposals import (
    PROPOSALS,
    Alternatives,
    OpenGradients,
    OpenLeaves,
    joined_in_no_known_way,
)
from linen_nnx.infer.run import rounding
from linen_nnx.infer.sides import Both
from linen_nnx.infer.trial import Point, Trial, has_copies

Array = np.ndarray
_AGREES = 1e-3  # gap of gradients where numbers differ from leaf to leaf: a wrong rule is 1 away
_TRIED = 64  # combinations of alternatives
Blind = tuple[set[str], set[str]]
"""The Linen and the nnx leaves whose gradient is nothing but rounding."""


def pair_leaves(
    trial: Trial, rules: Sequence[FoundRule], open_: OpenLeaves
) -> tuple[list[FoundRule], list[FoundRule], Blind | None]:
    """Finds rules for leaves that have none.

    Args:
      trial: tries rules out, on common ground.
      rules: the rules that hold already.
      open_: the leaves without one, of either side.

    Returns:
      the rules that hold, new ones included; rules that seem to hold, but whose order of elements
      nothing shows; and the open leaves that were blind in the last round.
    """
    found = list(rules)
    # Constants in the open leaves hide the order of some. They wait until more is known.
    waiting: list[FoundRule] = []
    if open_[0] and open_[1]:
        waiting = trial.hidden(found, found)
        found = [rule for rule in found if rule not in waiting]
        for rule in waiting:
            open_ = open_[0] | rule.linen, open_[1] | rule.nnx
    assumed: list[FoundRule] = []
    view = None
    while open_[0] and open_[1]:
        view = _View(trial, found, open_, view.point if view else None)
        new = _first_that_holds(view, waiting)
        if not new and not assumed:
            # What waits is taken as it seems to be, once: it may be what hides the rest.
            new = assumed = trial.grown(found, _apart(_free(waiting, open_)))[len(found) :]
            view.forget()
        if not new:
            break
        found += new
        for rule in new:
            open_ = open_[0] - rule.linen, open_[1] - rule.nnx
    hidden = trial.hidden(found, assumed) if assumed else []
    proven = [rule for rule in found if rule not in hidden]
    return proven, [*hidden, *_free(waiting, open_)], view.blind if view else None


def sharing(
    trial: Trial, rules: Sequence[FoundRule], open_: OpenLeaves
) -> dict[SidedPath, list[str]]:
    """By open leaf the open leaves of the other side with its elements, for which there are no ops.

    Args:
      trial, rules, open_: as for `pair_leaves`, behind which this is asked.
    """
    if not (open_[0] and open_[1]):
        return {}
    point = trial.point(rules, by=open_)
    return joined_in_no_known_way(_open_gradients(trial.ground.sides, point, open_))


def _free(rules: Iterable[FoundRule], open_: OpenLeaves) -> list[FoundRule]:
    """The rules all of whose leaves are open."""
    return [rule for rule in rules if rule.linen <= open_[0] and rule.nnx <= open_[1]]


def _apart(rules: Iterable[FoundRule]) -> list[FoundRule]:
    """Some of the rules, the first of any that have a leaf in common."""
    chosen: list[FoundRule] = []
    taken: set[SidedPath] = set()
    for rule in rules:
        if taken.isdisjoint(rule.leaves):
            chosen.append(rule)
            taken.update(rule.leaves)
    return chosen


class _View:
    """The gradients of the open leaves, while some rules are known.

    All gradients of both sides take four times the memory of a model in float32. So they are not
    kept while rules are tried, and looked at anew where none of these held.

    Attributes:
      trial, known, open_: as for `pair_leaves`.
      point: where the rules that hold were confirmed: it has the gradients of the next round, too.
      blind: the leaves that were blind, once gradients were looked at.
    """

    def __init__(
        self, trial: Trial, known: Sequence[FoundRule], open_: OpenLeaves, point: Point | None
    ) -> None:
        self.trial, self.known, self.open_ = trial, known, open_
        self.point = point
        self.blind: Blind | None = None
        self._gradients: OpenGradients | None = None

    def gradients(self) -> OpenGradients:
        """The gradients, looked at if they are not known."""
        if self._gradients is None:
            point = self.point or self.trial.point(self.known, by=self.open_)
            self._gradients = _open_gradients(self.trial.ground.sides, point, self.open_)
            self.blind = self._gradients.blind
        return self._gradients

    def forget(self) -> None:
        """Gives the gradients' memory back."""
        self.point = self._gradients = None


def _first_that_holds(view: _View, waiting: list[FoundRule]) -> list[FoundRule]:
    """The rules of the first kind of proposal some of which hold; the view keeps their point."""
    for propose in PROPOSALS:
        proposed = propose(view.trial, view.known, view.gradients(), view.open_)
        if proposed:
            view.forget()
            new, view.point = _holding(view, proposed, waiting)
            if new:
                return new
    return []


def _open_gradients(both: Both, point: Point, open_: OpenLeaves) -> OpenGradients:
    """The gradients of the open leaves; leaves that no output sees are listed apart."""
    seen: list[dict[str, Array]] = []
    blind: list[set[str]] = []
    for number, side in enumerate(both):
        limit = _limit(point, number)
        seen.append({})
        blind.append(set())
        for path in side.paths:
            if path not in open_[number]:
                continue
            slope = point.runs[number].slopes[path]
            largest = point.runs[number].sizes[path]
            if largest > limit:
                seen[number][path] = slope
            # A gradient of NaN is neither: it tells nothing, not even that no output sees the leaf.
            elif largest <= limit:
                blind[number].add(path)
    return OpenGradients((seen[0], seen[1]), (blind[0], blind[1]))


def _limit(point: Point, number: int) -> float:
    """The largest gradient of a leaf of one side that is none but rounding."""
    return rounding(np.array(list(point.runs[number].sizes.values())))


# Trying and confirming


def _holding(
    view: _View, proposed: Sequence[Alternatives], waiting: list[FoundRule]
) -> tuple[list[FoundRule], Point | None]:
    """One rule for each leaf, so that all hold together and are confirmed by their gradients.

    The agreement of outputs is not enough: what outputs hardly see holds in any way. Where some
    leaf is not confirmed, it is given up or, if the gradients now speak for one of its other
    alternatives, tried with that; then all begins anew. What is confirmed but for the order of its
    elements, which nothing shows, is put to `waiting`.

    Returns:
      the rules, and the point where their gradients were seen.
    """
    trial, known = view.trial, view.known
    while proposed:
        chosen = _agreeing(trial, known, proposed)
        if not chosen:
            break
        point = trial.point([*known, *chosen], by=view.open_)
        limit = _limit(point, 0)
        left: list[Alternatives] = []
        is_clear = True
        for alternatives in proposed:
            fitting = [rule for rule in alternatives if _confirmed(trial, point, limit, rule)]
            taken = [rule for rule in alternatives if rule in chosen]
            is_right = fitting == taken
            if is_right and fitting and trial.hides(point.gradients(0, fitting[0].linen)):
                if fitting[0].rule not in [rule.rule for rule in waiting]:
                    waiting += fitting
                is_clear = False
                continue
            if is_right:
                # Confirmed; or neither chosen nor fitting, and then given up.
                left += [alternatives] * len(taken)
                continue
            is_clear = False
            # Several still fit: the leaf waits for a round in which its neighbours are settled.
            if len(fitting) == 1:
                left.append(fitting)
        if is_clear:
            return chosen, point
        proposed = left
    return [], None


def _agreeing(
    trial: Trial, known: Sequence[FoundRule], proposed: Sequence[Alternatives]
) -> list[FoundRule]:
    """One rule for each leaf with which the outputs agree; failing that, rules that hold alone."""
    for chosen in itertools.islice(itertools.product(*proposed), _TRIED):
        if trial.holds([*known, *chosen]):
            return list(chosen)
    kept: list[FoundRule] = []
    for alternatives in proposed:
        for rule in alternatives:
            if trial.holds([*known, *kept, rule]):
                kept.append(rule)
                break
    return kept


def _confirmed(trial: Trial, point: Point, limit: float, found: FoundRule) -> bool:
    """Whether the gradients of a rule's leaves correspond by the rule, and by no other."""
    # Of copies only the sum of the gradients is known, and the proposal has seen to it.
    if has_copies(found.rule):
        return True
    linen = trial.ground.sides[0].trace
    ours = point.gradients(0, found.linen)
    theirs = point.gradients(1, found.nnx)
    if max(map(size, ours.values())) <= limit:
        # No output sees the leaves. Then their shapes must fit in this way alone: two axes of equal
        # length could be swapped.
        lengths: list[int] = []
        for path in found.linen:
            lengths += [length for length in linen.leaves[path].shape if length > 1]
        return len(set(lengths)) == len(lengths) and not found.rule.ops
    got = RuleBook([found.rule]).to_nnx(ours)
    # By the rule, the gradients of the Linen leaves become those of the nnx leaves. One of several
    # may be nothing but rounding, which differs.
    for path, after in theirs.items():
        is_none = max(size(got[path]), size(after)) <= limit
        if not is_none and gap(got[path], after) > _AGREES:
            return False
    if len(ours) == len(theirs) == 1:
        (before,), (after,) = ours.values(), theirs.values()
        return len(orders(before, after, _AGREES)) == 1
    return _parts_are_told_apart(ours, theirs)


def _parts_are_told_apart(ours: dict[str, Array], theirs: dict[str, Array]) -> bool:
    """Whether each part of a leaf has some element that is one element of the whole.

    But for one part: what is left over once the others are known.
    """
    # Several leaves on one side: they are parts of the one on the other.
    whole, parts = (theirs, ours) if len(theirs) == 1 else (ours, theirs)
    tables = [table(array) for array in whole.values()]
    dark = 0
    for part in parts.values():
        is_dark = True
        for each in tables:
            places = positions(part, *each)
            if places is not None and (places >= 0).any():
                is_dark = False
        dark += is_dark
    return dark <= 1
