"""A rule that the search has found, with its evidence."""

from collections.abc import Iterable
from dataclasses import dataclass

from linen_nnx.book.grammar import Rule
from linen_nnx.book.ops import Op
from linen_nnx.book.patterns import Pattern
from linen_nnx.infer.assign import Pair

SidedPath = tuple[int, str]
"""A leaf: its side (0 Linen, 1 nnx) and its path."""


@dataclass(frozen=True)
class FoundRule:
    """A rule without a note, the leaves of both sides that it matches, and the evidence for it.

    Attributes:
      evidence: the pairs of slots that led to the rule; none where whole leaves were compared.
      reasons: what else speaks for it, one sentence each.
    """

    rule: Rule
    linen: frozenset[str]
    nnx: frozenset[str]
    evidence: tuple[Pair, ...]
    reasons: tuple[str, ...] = ()

    @property
    def leaves(self) -> list[SidedPath]:
        """The leaves of both sides."""
        return [*((0, path) for path in self.linen), *((1, path) for path in self.nnx)]


def rule_of(linen: Iterable[str], nnx: Iterable[str], ops: tuple[Op, ...]) -> Rule:
    """The rule with these patterns, as text, and these ops.

    Raises:
      ValueError: when a pattern is none, or the ops do not go with it.

    Example:
        >>> print(rule_of(["params/up/kernel"], ["first/kernel"], ()))
        `params/up/kernel` <-> `first/kernel`
    """
    return Rule(tuple(map(Pattern, linen)), tuple(map(Pattern, nnx)), ops)
