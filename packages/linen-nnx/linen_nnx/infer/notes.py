"""Says in words what a rule rests on, and what was found out about both models as wholes.

A rule of the twin of `example.py` gets this note:

    2 uses in the same dataflow, 2 in the same order; fingerprints equal (exactly), the nearest
    other 1 away
"""

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from linen_nnx.book.grammar import Rule
from linen_nnx.infer.assign import Pair
from linen_nnx.infer.found import FoundRule
from linen_nnx.infer.ground import Ground
from linen_nnx.infer.sides import SlottedSide


def with_notes(
    shown: Iterable[FoundRule], found: Iterable[FoundRule], linen: SlottedSide, tolerance: float
) -> list[Rule]:
    """The rules of a book, each with the evidence for it.

    Args:
      shown: the rules of the book.
      found: the rules before they were merged: their pairs tell which are in order.
      linen: the Linen side.
      tolerance: fingerprints that differ by no more are equal.
    """
    pairs = [pair for rule in found for pair in rule.evidence]
    ordered = _in_order_of_use(pairs)
    return [replace(rule.rule, note=_note(rule, linen, ordered, tolerance)) for rule in shown]


def _in_order_of_use(pairs: list[Pair]) -> set[Pair]:
    """The pairs that follow the one before them in the order of first use on both sides."""
    by_linen = sorted(pairs, key=lambda pair: pair.linen)
    ordered = set(by_linen[:1])
    for before, after in itertools.pairwise(by_linen):
        if before.nnx < after.nnx:
            ordered.add(after)
    return ordered


def _note(found: FoundRule, linen: SlottedSide, ordered: set[Pair], tolerance: float) -> str:
    """The evidence for a rule, in a sentence."""
    # Rules for whole leaves, and those by name, rest on no pairs of slots.
    pairs = found.evidence
    if not pairs:
        unused = "not used in the forward pass: no evidence but the equal name"
        return "; ".join(found.reasons) or unused
    seen: list[Pair] = []
    alike: list[Pair] = []
    blind: list[str] = []
    for pair in pairs:
        if not pair.seen:
            blind.append(linen.first_leaf[pair.linen])
            continue
        seen.append(pair)
        # Another slot had the same fingerprint, and no choice was made: the dataflow told.
        if pair.margin <= tolerance and not pair.chosen:
            alike.append(pair)
    in_order = ordered.intersection(pairs)
    plural = "s" if len(pairs) > 1 else ""
    texts = [f"{len(pairs)} use{plural} in the same dataflow, {len(in_order)} in the same order"]
    if seen:
        texts.append(_of_fingerprints(seen, tolerance))
    if alike:
        texts.append(f"{len(alike)} told from others alike by the dataflow alone")
    if blind:
        texts.append(f"no output sees {_named_once(blind)}: placed by the dataflow alone")
    chosen = [pair for pair in pairs if pair.chosen]
    if chosen:
        named = "and names" if all(pair.names_agree for pair in chosen) else "alone"
        texts.append(f"{len(chosen)} interchangeable to all outputs: by order of first use {named}")
    return "; ".join([*texts, *found.reasons])


def _named_once(paths: Sequence[str]) -> str:
    """Paths in one text, the same leaf of every block named once.

    Example:
        >>> _named_once(["blocks/0/bias", "blocks/1/bias"]), _named_once(["blocks/0/bias"])
        ('blocks/*/bias', 'blocks/0/bias')
    """
    named = set(paths)
    if len(named) > 1:
        named = {re.sub(r"\d+", "*", path) for path in paths}
    return ", ".join(sorted(named))


def _of_fingerprints(seen: Sequence[Pair], tolerance: float) -> str:
    """How equal the fingerprints of some pairs are, and how unlike all others."""
    gap = 0.0
    others: list[float] = []  # how far the nearest other is, where there is one that differs
    are_alone = True
    for pair in seen:
        gap = max(gap, pair.gap)
        if pair.margin < np.inf:
            are_alone = False
        if tolerance < pair.margin < np.inf:
            others.append(pair.margin)
    text = f"fingerprints equal ({f'to {gap:.0e}' if gap else 'exactly'})"
    if others:
        return f"{text}, the nearest other {min(others):.1g} away"
    return f"{text}, none other of their form" if are_alone else text


def notes_of_book(ground: Ground, lossy: Sequence[dict[str, str]]) -> tuple[str, ...]:
    """Notes on the two models as wholes.

    Args:
      lossy: for Linen and nnx the leaves that no rule can translate, with the reason.
    """
    linen, nnx = (side.trace for side in ground.sides)
    notes = [*linen.chosen, *nnx.chosen, *ground.notes]
    if ground.problem is not None:
        notes.append(f"no rule is proven: {ground.problem}")
    # Listed, so that nobody looks for their rules. Arrays of lossy layers are listed as open.
    bare = [path for path in nnx.bare if path not in lossy[1]]
    if bare:
        notes.append(
            f"plain arrays of the nnx code, which need no rule: {', '.join(bare)} "
            "(no Variables, and so no weights)"
        )
    return tuple(notes)
