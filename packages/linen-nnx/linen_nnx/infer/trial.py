"""Tries rules out: every leaf gets numbers of its own, and both sides must give the same.

    params/a -> one      a = 0.3, 1.1, ...   one = 0.3, 1.1, ...     outputs equal: they hold
    params/b -> two      b = 0.9, 0.7, ...   two = 0.9, 0.7, ...

What has no rule yet keeps the values of the common ground (`ground.py`), which fit however it is
paired. A wrong rule moves the outputs apart, unless no output sees its leaves.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from linen_nnx.book.grammar import Rule
from linen_nnx.book.ops import Agree, Copy
from linen_nnx.book.rules import RuleBook
from linen_nnx.infer.found import FoundRule
from linen_nnx.infer.ground import Ground
from linen_nnx.infer.run import Run, difference, distinct, run

Array = np.ndarray


class Point(NamedTuple):
    """Both sides on the numbers that some rules give, and how far apart their outputs are."""

    runs: tuple[Run, Run]
    gap: float

    def gradients(self, side: int, numbers: Mapping[str, Array]) -> dict[str, Array]:
        """The gradient by each leaf, in its shape."""
        return {path: self.runs[side].gradient[ids] for path, ids in numbers.items()}


class Trial:
    """Tries rules on common ground; outputs may differ relatively by `tolerance`."""

    def __init__(self, ground: Ground, tolerance: float) -> None:
        self.ground, self.tolerance = ground, tolerance

    def holds(self, items: Sequence[FoundRule]) -> bool:
        """Whether the outputs agree with some rules."""
        return self.point(items).gap <= self.tolerance

    def point(
        self,
        items: Sequence[FoundRule],
        gradient: bool = False,
        fixed: Mapping[str, Array] | None = None,
    ) -> Point:
        """Runs both sides; `fixed` has values for more leaves of nnx."""
        linen, nnx = self.ground.sides
        book = RuleBook([item.rule for item in items])
        translated = {path for item in items for path in item.linen}
        ours = distinct(linen, self.ground.values[0], translated)  # the others are as they were
        before = {path: ours[ids] for path, ids in linen.trace.numbers.items()}
        for path, array in equalised(book, before).items():
            if array is not before[path]:
                ours[linen.trace.numbers[path]] = before[path] = array
        one = run(linen, self.ground.inputs, ours, gradient)
        theirs = self.ground.values[1].copy()
        new = {**book.to_nnx(before, partial=True), **(fixed or {})}
        for path, array in new.items():
            theirs[nnx.trace.numbers[path]] = array
        changed = equalised(book, {**before, **one.updates})
        after = book.to_nnx(changed, partial=True) if one.updates else new
        del ours, before, changed, new  # each is as large as the model
        two = run(nnx, self.ground.inputs, theirs, gradient)
        shared = [path for path in two.updates if path in after]
        gap = difference(
            [*one.outputs, *(after[path] for path in shared)],
            [*two.outputs, *(two.updates[path] for path in shared)],
        )
        return Point((one, two), gap)

    def sound(self, items: Sequence[FoundRule]) -> list[FoundRule]:
        """The rules that hold together; what only the order of use decided comes last."""
        firm = [item for item in items if not any(pair.chosen for pair in item.evidence)]
        rest = [item for item in items if item not in firm]
        return self._grown(self._grown([], firm), rest)

    def _grown(self, kept: list[FoundRule], more: Sequence[FoundRule]) -> list[FoundRule]:
        """`kept` with as many more as hold: all, or what each half adds."""
        if not more or self.holds([*kept, *more]):
            return [*kept, *more]
        if len(more) == 1:
            return kept
        half = len(more) // 2
        return self._grown(self._grown(kept, more[:half]), more[half:])


def equalised(book: RuleBook, leaves: Mapping[str, Array]) -> dict[str, Array]:
    """Linen leaves, with equal values in those that a rule makes one leaf of nnx."""
    result = dict(leaves)
    joining = [rule for rule in book.rules if joins(rule)]
    if not joining:
        return result
    for step in RuleBook(joining).plan(leaves, "nnx", partial=True).steps:
        for action in step.actions:
            if isinstance(action, Agree) and len(step.actions) == 1:
                one = _turned(leaves[step.sources[0]], action.perms[0])
                for path, perm in zip(step.sources, action.perms, strict=True):
                    result[path] = one if perm is None else one.transpose(np.argsort(perm))
    return result


def joins(rule: Rule) -> bool:
    """Whether a rule makes several equal Linen leaves one of nnx."""
    return len(rule.linen) > 1 and any(isinstance(op, Copy) for op in rule.ops)


def _turned(array: Array, perm: tuple[int, ...] | None) -> Array:
    return array if perm is None else array.transpose(perm)
