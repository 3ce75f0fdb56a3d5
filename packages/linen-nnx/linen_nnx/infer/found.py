"""A rule that the search has found, with what it rests on."""

from dataclasses import dataclass

from linen_nnx.book.grammar import Rule
from linen_nnx.infer.assign import Pair


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
