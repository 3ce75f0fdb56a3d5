"""Proposes a rule book for a twin: from the two models' code alone, without weights.

    book = suggest(twin)
    book.save("rules.yaml")      # each rule with its evidence; what is open, with its candidates

Two independent kinds of evidence must agree for every rule: the place of a leaf in the dataflow of
the forward pass (`dataflow.py`) and its gradient (`fingerprints.py`). Then the whole book is tested
once more on numbers that differ from leaf to leaf. What is left in doubt stays unassigned: a wrong
rule is worse than none.
"""

import itertools
from dataclasses import replace

import numpy as np

from linen_nnx.assign import Assignment, Pair, assign, words
from linen_nnx.compress import Item, compress
from linen_nnx.fingerprints import Prints, difference, distinct, fingerprints, run
from linen_nnx.forms import Group, rule_for
from linen_nnx.grammar import parse_rule
from linen_nnx.lossy import Losses, lossy
from linen_nnx.rules import RuleBook, Unassigned
from linen_nnx.sides import Side, sides
from linen_nnx.twin import Twin, trace_linen, trace_nnx

Array = np.ndarray
Leaf = tuple[int, str]  # side (0 Linen, 1 nnx) and path
_CANDIDATES = 8


def suggest(twin: Twin) -> RuleBook:
    """The rules that the evidence proves, each with a note of it; the rest in `unassigned`.

    Raises:
      TwinError: when a part of the twin cannot be built or called.
    """
    traces = trace_linen(twin), trace_nnx(twin)
    losses = lossy(*traces)
    both = sides(*traces, losses.alone)
    prints = fingerprints(*both)
    found = assign(*both, prints)
    items, why = _items(both, found, losses)
    while items and (problem := _contradiction(both, items, prints)):
        firm = [item for item in items if not any(pair.tie for pair in item.evidence)]
        kept = firm if len(firm) < len(items) else []  # first what only the order of use decided
        for item in items:
            if item not in kept:
                why |= dict.fromkeys(_leaves_of(item), problem)
        items = kept
    items += _unused(both)
    shown = compress(items, both[0].paths, both[1].paths)
    ordered = _in_order([pair for item in items for pair in item.evidence])
    rules = [replace(item.rule, note=_note(item, both, ordered)) for item in shown]
    return RuleBook(rules, _unassigned(both, items, found, why))


def _items(
    both: tuple[Side, Side], found: Assignment, losses: Losses
) -> tuple[list[Item], dict[Leaf, str]]:
    """A rule for each group of leaves that share elements; for the others the reason why not."""
    linen, nnx = both
    numbers = np.full(nnx.flow.size, -1)
    parent: dict[Leaf, Leaf] = {}
    members: dict[Leaf, list[Leaf]] = {}

    def root(leaf: Leaf) -> Leaf:
        while parent.setdefault(leaf, leaf) != leaf:
            leaf = parent[leaf]
        return leaf

    for pair in found.pairs:
        ids = linen.flow.slots[pair.linen].ids, nnx.flow.slots[pair.nnx].ids
        numbers[ids[1].ravel()] = ids[0].ravel()
        first, *others = [
            (k, path) for k, side in enumerate(both) for path in side.leaves_of(ids[k])
        ]
        for other in others:
            parent[root(other)] = root(first)
    for leaf in sorted(parent):
        members.setdefault(root(leaf), []).append(leaf)
    pairs: dict[Leaf, list[Pair]] = {}
    for pair in found.pairs:
        pairs.setdefault(root((0, linen.first[pair.linen])), []).append(pair)

    items, why = [], {}
    for top in pairs:  # by first use
        leaves = members[top]
        group = Group(
            {path: linen.elements(path) for side, path in leaves if side == 0},
            {path: numbers[nnx.elements(path)] for side, path in leaves if side == 1},
        )
        reason = _refusal(both, leaves, found, losses)
        rule = None if reason else rule_for(group)
        if rule is None:
            no_ops = "its elements correspond to the candidates', but no ops say how"
            why |= dict.fromkeys(leaves, reason or no_ops)
        else:
            items.append(
                Item(rule, frozenset(group.linen), frozenset(group.nnx), tuple(pairs[top]))
            )
    for side, refused in enumerate((losses.linen, losses.nnx)):
        why |= {(side, path): reason for path, reason in refused.items()}
    return items, why


def _refusal(
    both: tuple[Side, Side], leaves: list[Leaf], found: Assignment, losses: Losses
) -> str | None:
    """Why leaves that correspond must not get a rule all the same."""
    refused = (losses.linen, losses.nnx)
    missing = (found.open_linen, found.open_nnx)
    for side, path in leaves:
        if path in refused[side]:
            return refused[side][path]
    for side, path in leaves:
        for slot in both[side].slots_of[path]:
            if slot in missing[side]:
                return f"a part of `{path}` is open: {missing[side][slot][1]}"
    kinds = {str(both[side].trace.leaves[path].dtype) for side, path in leaves}
    return f"the dtypes differ: {', '.join(sorted(kinds))}" if len(kinds) > 1 else None


def _contradiction(both: tuple[Side, Side], items: list[Item], prints: Prints) -> str | None:
    """What is wrong when every leaf has numbers of its own and the rules translate them."""
    linen, nnx = both
    book = RuleBook([item.rule for item in items])
    translated = {path for item in items for path in item.linen}
    values = [distinct(linen, prints.values[0], translated), prints.values[1].copy()]
    before = {path: values[0][linen.elements(path)] for path in linen.paths}
    for path, array in book.to_nnx(before, partial=True).items():
        values[1][nnx.elements(path)] = array
    one = run(linen, prints.inputs, values[0], gradient=False)
    two = run(nnx, prints.inputs, values[1], gradient=False)
    gap = difference(one.outputs, two.outputs)
    after = book.to_nnx({**before, **one.updates}, partial=True)
    shared = [path for path in two.updates if path in after]
    gap = max(gap, difference([after[p] for p in shared], [two.updates[p] for p in shared]))
    if gap <= prints.tolerance:
        return None
    return f"with numbers that differ from leaf to leaf the twins' outputs differ (by {gap:.0e})"


def _unused(both: tuple[Side, Side]) -> list[Item]:
    """Rules for leaves that no forward pass uses: by name alone, where the name is the same."""
    idle = [
        {path: side.trace.leaves[path] for path in side.paths if not side.slots_of[path]}
        for side in both
    ]
    items = []
    for path, leaf in idle[0].items():
        alike = [
            other
            for other in idle[1]
            if words(other) == words(path.split("/", 1)[1]) and idle[1][other] == leaf
        ]
        again = [other for other in idle[0] if words(other) == words(path)]
        if len(alike) == 1 and len(again) == 1:
            rule = parse_rule({"linen": path, "nnx": alike[0]})
            items.append(Item(rule, frozenset([path]), frozenset(alike), ()))
    return items


def _in_order(pairs: list[Pair]) -> set[Pair]:
    """The pairs that follow the one before them in the order of first use on both sides."""
    left = sorted(pairs, key=lambda pair: pair.linen)
    later = {b for a, b in itertools.pairwise(left) if a.nnx < b.nnx}
    return later | set(left[:1])


def _note(item: Item, both: tuple[Side, Side], ordered: set[Pair]) -> str:
    """The evidence for a rule, in a sentence."""
    pairs = item.evidence
    if not pairs:
        return "not used in the forward pass: no evidence but the equal name"
    count = len(pairs)
    same = sum(pair in ordered for pair in pairs)
    uses = f"{count} use{'s' * (count > 1)}: same dataflow, {same} in the same order"
    texts = [uses]
    seen = [pair for pair in pairs if pair.seen]
    if seen:
        gap, margin = max(p.gap for p in seen), min(p.margin for p in seen)
        other = f"the nearest other {margin:.1g} away" if np.isfinite(margin) else "no other fits"
        texts.append(f"fingerprints equal ({f'to {gap:.0e}' if gap else 'exactly'}), {other}")
    if blind := [pair for pair in pairs if not pair.seen]:
        paths = sorted({both[0].first[pair.linen] for pair in blind})
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        texts.append(f"no output sees {paths[0]}{more}: placed by dataflow alone")
    if ties := [pair for pair in pairs if pair.tie]:
        named = "and names" if all(pair.named for pair in ties) else "alone"
        texts.append(f"{len(ties)} interchangeable to all outputs: by order of first use {named}")
    return "; ".join(texts)


def _unassigned(
    both: tuple[Side, Side], items: list[Item], found: Assignment, why: dict[Leaf, str]
) -> dict[str, Unassigned]:
    """Every leaf without a rule, with the reason and its candidates."""
    done = {leaf for item in items for leaf in _leaves_of(item)}
    mates = [
        {pair.linen: pair.nnx for pair in found.pairs},
        {pair.nnx: pair.linen for pair in found.pairs},
    ]
    missing = (found.open_linen, found.open_nnx)
    result: dict[str, Unassigned] = {}
    for number, (side, other) in enumerate((both, both[::-1])):
        for path in side.paths:
            if (number, path) in done:
                continue
            slots = side.slots_of[path]
            reasons = [missing[number][slot][1] for slot in slots if slot in missing[number]]
            near = [k for slot in slots for k in missing[number].get(slot, ([], ""))[0]]
            near += [mates[number][slot] for slot in slots if slot in mates[number]]
            candidates = [other.first[k] for k in near]
            if not slots:
                leaf = side.trace.leaves[path]
                reasons = ["the forward pass does not use it"]
                candidates = [
                    p for p in other.paths
                    if not other.slots_of[p] and other.trace.leaves[p].shape == leaf.shape
                ]  # fmt: skip
            reason = why.get((number, path)) or reasons[0]
            key = path if path not in result else f"{path} (nnx)"
            chosen = tuple(dict.fromkeys(candidates))[:_CANDIDATES]
            result[key] = Unassigned("nnx" if number else "linen", reason, chosen)
    return result


def _leaves_of(item: Item) -> list[Leaf]:
    return [*((0, path) for path in item.linen), *((1, path) for path in item.nnx)]
