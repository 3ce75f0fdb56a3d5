"""Which element of the one side is which of the other: its mate.

    Linen leaf     elements        nnx leaf        elements      mates
    params/q       0               qkv             0  1          0  2
                   1                               2  3          1  3
    params/k       2
                   3

A rule book says how leaves become leaves, and not where an element goes. But it can be run on the
numbers of elements in place of weights, and what comes out is the mate of every element:

    >>> fused = {"linen": ["params/q", "params/k"], "nnx": "qkv",
    ...          "ops": [{"op": "concat", "axis": 1}]}
    >>> book = RuleBook.from_dict({"version": 1, "rules": [fused]})
    >>> numbers = {"params/q": np.array([[0], [1]]), "params/k": np.array([[2], [3]])}
    >>> book.to_nnx(numbers)["qkv"].tolist()
    [[0, 2], [1, 3]]
"""

from collections.abc import Sequence

import numpy as np

from linen_nnx.book.grammar import Rule
from linen_nnx.book.rules import RuleBook
from linen_nnx.infer.dataflow import flow
from linen_nnx.infer.sides import SlottedSide, in_order
from linen_nnx.infer.trace import Trace
from linen_nnx.infer.trial import joins

Array = np.ndarray


def side_of(trace: Trace) -> SlottedSide:
    """A side by itself, its slots as the dataflow has them."""
    found = flow(trace, uses=True)
    side = SlottedSide(trace, found, [])
    for slot, path in zip(found.slots, side.first_leaf, strict=True):
        side.forms.append((trace.leaves[path].collection == "params", *slot.shape))
    return side


def mates(linen: SlottedSide, nnx: SlottedSide, book: RuleBook) -> tuple[Array, list[str]]:
    """The mate of every nnx element, by the rules that keep bits.

    Slots without a rule are paired in the order of their first use, where the two sides have slots
    of the same form in the same order. So `bisect` works while a rule book is being written.

    Returns:
      (nnx elements,): the number of the Linen element that each is, -1 for none; and notes on what
      was guessed, and on what has no mate.
    """
    plan = RuleBook(_one_to_one(book)).plan(
        linen.trace.leaves, "nnx", nnx.trace.leaves, partial=True
    )
    # Lossy rules change numbers, and an element number times two is another element.
    mate = np.full(nnx.trace.size, -1)
    for path, numbers in plan.run(linen.trace.all_numbers()).items():
        nnx.trace.part(mate, path)[...] = numbers

    notes = []
    if guessed := _guess(linen, nnx, mate):
        notes.append(f"{len(guessed)} uses have no rule and were paired by order: {few(guessed)}")
    if alone := _without_mate(linen, mate):
        notes.append(f"Linen leaves without a mate in nnx: {few(alone)}")
    return mate, notes


def few(texts: Sequence[str]) -> str:
    """The first four of some texts, and how many there are if that is not all.

    Example:
        >>> few(["a", "b", "c", "d", "e"])
        'a, b, c, d, ... (5)'
    """
    return ", ".join(texts[:4]) + (f", ... ({len(texts)})" if len(texts) > 4 else "")


def _one_to_one(book: RuleBook) -> list[Rule]:
    """The rules that give each nnx element one Linen element."""
    rules = []
    for rule in book.rules:
        # Where two Linen leaves become one, neither is the mate: each is half of it.
        if rule.linen and rule.nnx and rule.lossless and not joins(rule):
            rules.append(rule)
    return rules


def _guess(linen: SlottedSide, nnx: SlottedSide, mate: Array) -> list[str]:
    """Pairs slots without a rule by their order; writes to `mate`, returns the pairs in words."""
    # Only slots of which no element has a mate: the rest of a slot is no matter of order.
    taken = _taken(linen, mate)
    left = [k for k, slot in enumerate(linen.flow.slots) if not taken[slot.numbers()].any()]
    right = [k for k, slot in enumerate(nnx.flow.slots) if (mate[slot.numbers()] < 0).all()]
    forms = [linen.forms[k] for k in left], [nnx.forms[k] for k in right]
    guessed = []
    for a, b in in_order(*forms):
        mate[nnx.flow.slots[right[b]].numbers()] = linen.flow.slots[left[a]].numbers()
        guessed.append(f"{linen.first_leaf[left[a]]} = {nnx.first_leaf[right[b]]}")
    return guessed


def _without_mate(linen: SlottedSide, mate: Array) -> list[str]:
    """The Linen leaves of which no element is the mate of another."""
    taken = _taken(linen, mate)
    alone = []
    for path in linen.paths:
        own = linen.trace.part(taken, path)
        if own.size and not own.any():
            alone.append(path)
    return alone


def _taken(linen: SlottedSide, mate: Array) -> Array:
    """(Linen elements,) bool: which of them are the mate of another."""
    taken = np.zeros(linen.trace.size, bool)
    taken[mate[mate >= 0]] = True
    return taken
