"""Proposes a rule book for a twin: from the two models' code alone, without weights.

    book = suggest(twin)
    book.save("rules.yaml")      # each rule with its evidence; what is open, with its candidates

Two independent kinds of evidence must agree for every rule: the place of a leaf in the dataflow of
the forward pass (`dataflow.py`) and its gradient (`fingerprints.py`). Then the whole book is tested
once more on numbers that differ from leaf to leaf. What is left in doubt stays unassigned: a wrong
rule is worse than none.
"""

import itertools
import re
from dataclasses import replace

import numpy as np

from linen_nnx.book.grammar import parse_rule
from linen_nnx.book.rules import RuleBook, Unassigned
from linen_nnx.infer.assign import Assignment, Pair, assign, words
from linen_nnx.infer.compress import Item, compress
from linen_nnx.infer.fingerprints import Prints, difference, distinct, fingerprints, run
from linen_nnx.infer.forms import Group, rule_for
from linen_nnx.infer.lossy import lossy
from linen_nnx.infer.sides import Side, sides
from linen_nnx.infer.trace import Trace, trace_linen, trace_nnx
from linen_nnx.infer.twin import Twin

Array = np.ndarray
Both = tuple[Side, Side]
Leaf = tuple[int, str]  # side (0 Linen, 1 nnx) and path
_CANDIDATES = 8


def suggest(twin: Twin) -> RuleBook:
    """The rules that the evidence proves, each with a note of it; the rest in `unassigned`.

    Raises:
      TwinError: when a part of the twin cannot be built or called.
    """
    return propose(trace_linen(twin), trace_nnx(twin))


def propose(linen: Trace, nnx: Trace) -> RuleBook:
    """The same for a twin whose sides are traced already."""
    losses = lossy(linen, nnx)
    both = sides(linen, nnx, losses.alone)
    prints = fingerprints(*both)
    found = assign(*both, prints)
    why = {(side, path): text for side in (0, 1) for path, text in losses.reasons[side].items()}
    items = _items(both, found, why)
    while items and (problem := _contradiction(both, items, prints)):
        firm = [item for item in items if not any(pair.chosen for pair in item.evidence)]
        kept = firm if len(firm) < len(items) else []  # first what only the order of use decided
        for item in items:
            if item not in kept:
                why |= dict.fromkeys(_leaves_of(item), problem)
        items = kept
    items += _unused(both)
    shown = compress(items, both[0].paths, both[1].paths)
    ordered = _in_order([pair for item in items for pair in item.evidence])
    rules = [
        replace(item.rule, note=_note(item, both[0], ordered, prints.tolerance)) for item in shown
    ]
    return RuleBook(rules, _unassigned(both, items, found, why))


def _items(both: Both, found: Assignment, why: dict[Leaf, str]) -> list[Item]:
    """A rule for each group of leaves that share elements; where there is none, `why` says so."""
    linen, nnx = both
    numbers = np.full(nnx.owner.size, -1)
    groups: dict[Leaf, tuple[set[Leaf], list[Pair]]] = {}
    for pair in found.pairs:
        ids = linen.flow.slots[pair.linen].ids, nnx.flow.slots[pair.nnx].ids
        numbers[ids[1].ravel()] = ids[0].ravel()
        leaves = {(side, path) for side in (0, 1) for path in both[side].leaves_of(ids[side])}
        joined = {id(group): group for leaf in leaves if (group := groups.get(leaf))}.values()
        evidence = sorted([pair, *(other for _, pairs in joined for other in pairs)])
        group = leaves.union(*(others for others, _ in joined)), evidence
        groups |= dict.fromkeys(sorted(group[0]), group)

    items = []
    for group, evidence in {id(each): each for each in groups.values()}.values():  # by first use
        leaves = sorted(group)
        arrays = Group(
            {path: linen.trace.numbers[path] for side, path in leaves if side == 0},
            {path: numbers[nnx.trace.numbers[path]] for side, path in leaves if side == 1},
        )
        reason = _refusal(both, leaves, found, why)
        rule = None if reason else rule_for(arrays)
        if rule is None:
            reason = reason or "its elements correspond to the candidates', but no ops say how"
            why |= dict.fromkeys(leaves, reason)
        else:
            matched = frozenset(arrays.linen), frozenset(arrays.nnx)
            items.append(Item(rule, *matched, tuple(evidence)))
    return items


def _refusal(
    both: Both, leaves: list[Leaf], found: Assignment, refused: dict[Leaf, str]
) -> str | None:
    """Why leaves that correspond must not get a rule all the same."""
    if known := next((refused[leaf] for leaf in leaves if leaf in refused), None):
        return known
    for side, path in leaves:
        for slot in both[side].slots_of[path]:
            if slot in found.open[side]:
                return f"a part of `{path}` is open: {found.open[side][slot][1]}"
    kinds = {str(both[side].trace.leaves[path].dtype) for side, path in leaves}
    return f"the dtypes differ: {', '.join(sorted(kinds))}" if len(kinds) > 1 else None


def _contradiction(both: Both, items: list[Item], prints: Prints) -> str | None:
    """What is wrong when every leaf has numbers of its own and the rules translate them."""
    linen, nnx = both
    book = RuleBook([item.rule for item in items])
    translated = {path for item in items for path in item.linen}
    values = [distinct(linen, prints.values[0], translated), prints.values[1].copy()]
    before = {path: values[0][numbers] for path, numbers in linen.trace.numbers.items()}
    for path, array in book.to_nnx(before, partial=True).items():
        values[1][nnx.trace.numbers[path]] = array
    one = run(linen, prints.inputs, values[0])
    two = run(nnx, prints.inputs, values[1])
    after = book.to_nnx({**before, **one.updates}, partial=True)
    shared = [path for path in two.updates if path in after]
    gap = difference(
        [*one.outputs, *(after[path] for path in shared)],
        [*two.outputs, *(two.updates[path] for path in shared)],
    )
    if gap <= prints.tolerance:
        return None
    return f"with numbers that differ from leaf to leaf the twins' outputs differ (by {gap:.0e})"


def _unused(both: Both) -> list[Item]:
    """Rules for leaves that no forward pass uses: by name alone, where the name is the same."""
    idle = [
        {path: side.trace.leaves[path] for path in side.paths if not side.slots_of[path]}
        for side in both
    ]
    items = []
    for path, leaf in idle[0].items():
        name = words(path.split("/", 1)[1])
        alike = [other for other in idle[1] if words(other) == name and idle[1][other] == leaf]
        rivals = [other for other in idle[0] if words(other.split("/", 1)[1]) == name]
        if len(alike) == len(rivals) == 1:
            rule = parse_rule({"linen": path, "nnx": alike[0]})
            items.append(Item(rule, frozenset([path]), frozenset(alike), ()))
    return items


def _in_order(pairs: list[Pair]) -> set[Pair]:
    """The pairs that follow the one before them in the order of first use on both sides."""
    left = sorted(pairs, key=lambda pair: pair.linen)
    later = {b for a, b in itertools.pairwise(left) if a.nnx < b.nnx}
    return later | set(left[:1])


def _note(item: Item, linen: Side, ordered: set[Pair], tolerance: float) -> str:
    """The evidence for a rule, in a sentence."""
    pairs = item.evidence
    if not pairs:
        return "not used in the forward pass: no evidence but the equal name"
    same = sum(pair in ordered for pair in pairs)
    plural = "s" if len(pairs) > 1 else ""
    texts = [f"{len(pairs)} use{plural} in the same dataflow, {same} in the same order"]
    if seen := [pair for pair in pairs if pair.seen]:
        gap = max(pair.gap for pair in seen)
        texts.append(f"fingerprints equal ({f'to {gap:.0e}' if gap else 'exactly'})")
        if others := [pair.margin for pair in seen if tolerance < pair.margin < np.inf]:
            texts[-1] += f", the nearest other {min(others):.1g} away"
        elif all(pair.margin == np.inf for pair in seen):
            texts[-1] += ", none other of their form"
    if alike := [pair for pair in seen if pair.margin <= tolerance and not pair.chosen]:
        texts.append(f"{len(alike)} told from others alike by the dataflow alone")
    if blind := {linen.first[pair.linen] for pair in pairs if not pair.seen}:
        paths = sorted(blind if len(blind) == 1 else {re.sub(r"\d+", "*", p) for p in blind})
        texts.append(f"no output sees {', '.join(paths)}: placed by the dataflow alone")
    if chosen := [pair for pair in pairs if pair.chosen]:
        named = "and names" if all(pair.named for pair in chosen) else "alone"
        texts.append(f"{len(chosen)} interchangeable to all outputs: by order of first use {named}")
    return "; ".join(texts)


def _unassigned(
    both: Both, items: list[Item], found: Assignment, why: dict[Leaf, str]
) -> dict[str, Unassigned]:
    """Every leaf without a rule, with the reason and its candidates."""
    done = {leaf for item in items for leaf in _leaves_of(item)}
    mates = {pair.linen: pair.nnx for pair in found.pairs}
    mate_of = (mates, {b: a for a, b in mates.items()})
    result: dict[str, Unassigned] = {}
    for number, (side, other) in enumerate((both, both[::-1])):
        for path in [path for path in side.paths if (number, path) not in done]:
            reason, near = "the forward pass does not use it", list[str]()
            for slot in side.slots_of[path]:
                if slot in found.open[number]:
                    slots, reason = found.open[number][slot]
                else:
                    slots = [mate_of[number][slot]]
                near += [other.first[k] for k in slots]
            if not side.slots_of[path]:
                shape = side.trace.leaves[path].shape
                idle = [name for name in other.paths if not other.slots_of[name]]
                near = [name for name in idle if other.trace.leaves[name].shape == shape]
            reason = why.get((number, path), reason)
            candidates = tuple(dict.fromkeys(near))[:_CANDIDATES]
            result[_key(path, result)] = Unassigned(side.trace.side, reason, candidates)
    for path in both[1].trace.bare:
        reason = "an array that is no nnx.Variable: Linen has no leaf for it"
        result[_key(path, result)] = Unassigned("nnx", why.get((1, path), reason), ())
    return result


def _key(path: str, taken: dict[str, Unassigned]) -> str:
    """The path, told apart from an equal one of the other side."""
    return f"{path} (nnx)" if path in taken else path


def _leaves_of(item: Item) -> list[Leaf]:
    return [*((0, path) for path in item.linen), *((1, path) for path in item.nnx)]
