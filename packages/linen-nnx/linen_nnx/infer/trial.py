"""Tries rules out: every leaf gets numbers of its own, and both sides must give the same.

    params/a -> one      a = 0.3, 1.1, ...   one = 0.3, 1.1, ...     outputs equal: they hold
    params/b -> two      b = 0.9, 0.7, ...   two = 0.9, 0.7, ...

What has no rule yet keeps the values of the common ground (`ground.py`), which fit however it is
paired. A wrong rule moves the outputs apart, unless no output sees its leaves.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from linen_nnx.book.actions import Agree
from linen_nnx.book.grammar import Rule
from linen_nnx.book.ops import Copy
from linen_nnx.book.rules import RuleBook
from linen_nnx.infer.elements import even_axes
from linen_nnx.infer.found import FoundRule
from linen_nnx.infer.ground import Ground
from linen_nnx.infer.memory import give_back
from linen_nnx.infer.run import Run, difference, distinct, run

Array = np.ndarray


class Point(NamedTuple):
    """Both sides on the numbers that some rules give, and how far apart their outputs are."""

    runs: tuple[Run, Run]
    gap: float

    def gradients(self, number: int, paths: Iterable[str]) -> dict[str, Array]:
        """The gradients by some leaves of one side, of those that were asked for."""
        return {path: self.runs[number].slopes[path] for path in paths}


class Trial:
    """Tries rules on common ground; outputs may differ relatively by `tolerance`."""

    def __init__(self, ground: Ground, tolerance: float) -> None:
        self.ground, self.tolerance = ground, tolerance

    def hidden(self, rules: Sequence[FoundRule], among: Sequence[FoundRule]) -> list[FoundRule]:
        """The rules of `among` whose order of elements no gradient shows, while `rules` are known.

        Beside leaves that are one constant the inputs of a product may be one number: the rows of
        its kernel could stand in any order. Numbers of their own would tell them apart.
        """
        known = {path for found in rules for path in found.linen}
        slopes = self._slopes(known, {path for found in among for path in found.linen})
        hidden: list[FoundRule] = []
        for found in among:
            if self.hides({path: slopes[path] for path in found.linen}):
                hidden.append(found)
        return hidden

    def hides(self, slopes: Mapping[str, Array]) -> bool:
        """Whether gradients by Linen leaves hide an order that other numbers would show."""
        return any(even_axes(slope) - self._even[path] for path, slope in slopes.items())

    @cached_property
    def _even(self) -> dict[str, frozenset[int]]:
        """The `even_axes` of each Linen leaf where all leaves have numbers of their own."""
        paths = set(self.ground.sides[0].paths)
        slopes = self._slopes(paths, paths)
        return {path: even_axes(slope) for path, slope in slopes.items()}

    def _slopes(self, known: set[str], by: set[str]) -> dict[str, Array]:
        """The gradients by some Linen leaves, where those that are known have their own numbers."""
        linen = self.ground.sides[0]
        values = distinct(linen, self.ground.values(0), known)
        return run(linen, self.ground.inputs, values, by).slopes

    def holds(self, rules: Sequence[FoundRule]) -> bool:
        """Whether the outputs agree with some rules."""
        return self.point(rules).gap <= self.tolerance

    def point(
        self,
        rules: Sequence[FoundRule],
        by: tuple[Collection[str], Collection[str]] = ((), ()),
        fixed: Mapping[str, Array] | None = None,
    ) -> Point:
        """Runs both sides with numbers that differ from leaf to leaf.

        Args:
          rules: which leaves get numbers of their own, and what they become on the nnx side.
          by: the Linen and the nnx leaves whose gradients are wanted, too.
          fixed: values for more leaves of nnx.
        """
        linen, nnx = self.ground.sides
        book = RuleBook([found.rule for found in rules])
        translated = {path for found in rules for path in found.linen}
        ours = distinct(linen, self.ground.values(0), translated)  # the others are as they were
        before = {path: linen.trace.part(ours, path) for path in linen.paths}
        # Leaves that become one leaf of nnx must be equal, or no rule could translate them.
        for path, array in equalised(book, before).items():
            if array is not before[path]:
                before[path][...] = array
        one = run(linen, self.ground.inputs, ours, by[0])
        theirs = self.ground.values(1)
        new = {**book.to_nnx(before, partial=True), **(fixed or {})}
        for path, array in new.items():
            nnx.trace.part(theirs, path)[...] = array
        # What the Linen call has updated (batch statistics), translated: nnx must update alike.
        if one.updates:
            new = book.to_nnx(equalised(book, {**before, **one.updates}), partial=True)
        after = {path: np.array(new[path]) for path in nnx.trace.updates if path in new}
        del ours, before, new  # each is as large as the model
        give_back()
        two = run(nnx, self.ground.inputs, theirs, by[1])
        expected, got = list(one.outputs), list(two.outputs)
        for path, value in two.updates.items():
            if path in after:
                expected.append(after[path])
                got.append(value)
        return Point((one, two), difference(expected, got))

    def sound(self, rules: Sequence[FoundRule]) -> list[FoundRule]:
        """The rules that hold together.

        What only the order of use decided comes last: should it not go with the rest, it goes.
        """
        firm: list[FoundRule] = []
        chosen: list[FoundRule] = []
        for found in rules:
            is_chosen = any(pair.chosen for pair in found.evidence)
            (chosen if is_chosen else firm).append(found)
        return self.grown(self.grown([], firm), chosen)

    def grown(self, kept: list[FoundRule], more: Sequence[FoundRule]) -> list[FoundRule]:
        """`kept` with as many more as hold: all, or what each half adds.

        Nearly always all hold: that takes one run. One wrong rule among 64 takes 13.
        """
        if not more or self.holds([*kept, *more]):
            return [*kept, *more]
        if len(more) == 1:
            return kept
        half = len(more) // 2
        return self.grown(self.grown(kept, more[:half]), more[half:])


def equalised(book: RuleBook, leaves: Mapping[str, Array]) -> dict[str, Array]:
    """The Linen leaves, with equal values in leaves that a rule joins into one leaf of nnx.

    Example:
        >>> from linen_nnx.infer.found import rule_of
        >>> book = RuleBook([rule_of(["params/a", "params/b"], ["one"], (Copy(),))])
        >>> equalised(book, {"params/a": np.zeros(2), "params/b": np.ones(2)})["params/b"]
        array([0., 0.])
    """
    result = dict(leaves)
    joining = [rule for rule in book.rules if joins(rule)]
    if not joining:
        return result
    for move in RuleBook(joining).plan(leaves, "nnx", partial=True).moves:
        for action in move.actions:
            if not isinstance(action, Agree) or len(move.actions) != 1:
                continue
            # The first is the one that counts; the others hold it turned, each in its own way.
            one = _turned(leaves[move.sources[0]], action.perms[0])
            for path, perm in zip(move.sources, action.perms, strict=True):
                result[path] = one if perm is None else one.transpose(np.argsort(perm))
    return result


def joins(rule: Rule) -> bool:
    """Whether a rule makes several equal Linen leaves one of nnx."""
    return len(rule.linen) > 1 and has_copies(rule)


def has_copies(rule: Rule) -> bool:
    """Whether a rule says that several leaves of one side are one leaf of the other."""
    return any(isinstance(op, Copy) for op in rule.ops)


def _turned(array: Array, perm: tuple[int, ...] | None) -> Array:
    """The array with its axes in the order `perm`; None leaves them."""
    return array if perm is None else array.transpose(perm)
