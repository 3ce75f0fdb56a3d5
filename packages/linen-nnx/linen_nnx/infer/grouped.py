"""Makes rules of pairs of slots: one for each group of leaves that share elements.

A pair says of some elements of one Linen leaf which elements of an nnx leaf they are. Leaves that
pairs connect belong to one group, and get one rule:

    pair    Linen q/kernel <-> columns 0 to 7 of nnx qkv/kernel      one group: q/kernel, k/kernel,
    pair    Linen k/kernel <-> columns 8 to 15                       v/kernel, qkv/kernel
    pair    Linen v/kernel <-> columns 16 to 23
    pair    Linen o/kernel <-> nnx o/kernel                          another

Leaves that no forward pass uses have no slots; they are paired by name alone.
"""

from collections.abc import Iterable

import numpy as np

from linen_nnx.book.grammar import parse_rule
from linen_nnx.infer.assign import Assignment, Pair, words
from linen_nnx.infer.fit_ops import Group, rule_for
from linen_nnx.infer.found import FoundRule, SidedPath
from linen_nnx.infer.sides import Both
from linen_nnx.infer.trace import LeafSpec

Reasons = dict[SidedPath, str]
"""Why a leaf has no rule."""


class _Connected:
    """Leaves that pairs of slots connect, and these pairs."""

    def __init__(self, leaves: Iterable[SidedPath], pairs: Iterable[Pair]) -> None:
        self.leaves = sorted(leaves)
        self.pairs = sorted(pairs)


def rules_of_pairs(both: Both, assignment: Assignment, why: Reasons) -> list[FoundRule]:
    """Finds a rule for each group of leaves; where there is none, adds to `why` the reason."""
    rules: list[FoundRule] = []
    for group in _groups(both, assignment.pairs):
        reason = _refusal(both, group.leaves, assignment, why)
        rule = None if reason else rule_for(_numbered(both, group))
        if rule is None:
            reason = reason or "its elements correspond to the candidates', but no ops say how"
            why |= dict.fromkeys(group.leaves, reason)
            continue
        linen = frozenset(path for side, path in group.leaves if side == 0)
        nnx = frozenset(path for side, path in group.leaves if side == 1)
        rules.append(FoundRule(rule, linen, nnx, tuple(group.pairs)))
    return rules


def _numbered(both: Both, connected: _Connected) -> Group:
    """The leaves of a group, both sides with the numbers of Linen's elements."""
    linen, nnx = both
    group = Group({}, {})
    for side, path in connected.leaves:
        if side == 0:
            group.linen[path] = linen.trace.numbers(path)
        else:
            group.nnx[path] = np.full_like(nnx.trace.numbers(path), -1)
    for pair in connected.pairs:
        ours = linen.flow.slots[pair.linen].numbers()
        theirs = nnx.flow.slots[pair.nnx].numbers()
        for path in nnx.leaves_of_slot[pair.nnx]:
            span = nnx.trace.spans[path]
            inside = (theirs >= span.start) & (theirs < span.stop)
            group.nnx[path].reshape(-1)[theirs[inside] - span.start] = ours[inside]
    return group


def _groups(both: Both, pairs: Iterable[Pair]) -> list[_Connected]:
    """The groups, by first use."""
    linen, nnx = both
    group_of: dict[SidedPath, _Connected] = {}
    for pair in pairs:
        ours, theirs = linen.leaves_of_slot[pair.linen], nnx.leaves_of_slot[pair.nnx]
        leaves: set[SidedPath] = {(0, path) for path in ours} | {(1, path) for path in theirs}
        # The groups of these leaves become one.
        connected = [pair]
        for group in {group_of[leaf] for leaf in leaves if leaf in group_of}:
            connected += group.pairs
            leaves.update(group.leaves)
        group_of |= dict.fromkeys(sorted(leaves), _Connected(leaves, connected))
    # A leaf keeps its place in the dict when its group grows: so groups are in order of first use.
    return list(dict.fromkeys(group_of.values()))


def _refusal(
    both: Both, leaves: list[SidedPath], assignment: Assignment, refused: Reasons
) -> str | None:
    """Why leaves that correspond must not get a rule all the same."""
    for leaf in leaves:
        if leaf in refused:
            return refused[leaf]
    for side, path in leaves:
        for slot in both[side].slots_of[path]:
            if slot in assignment.open[side]:
                _, reason = assignment.open[side][slot]
                return f"a part of `{path}` is open: {reason}"
    dtypes = {str(both[side].trace.leaves[path].dtype) for side, path in leaves}
    return f"the dtypes differ: {', '.join(sorted(dtypes))}" if len(dtypes) > 1 else None


# By name


def rules_by_name(both: Both) -> list[FoundRule]:
    """Rules for leaves that no forward pass uses: by name alone, where the name is the same.

    Nothing that the models compute depends on them, so a wrong rule could do little; but a
    checkpoint has them, and a rule book must say where they go.
    """
    linen, nnx = _unused(both, 0), _unused(both, 1)
    rules: list[FoundRule] = []
    for path, leaf in linen.items():
        name = _name(path)
        alike: list[str] = []
        for other, spec in nnx.items():
            if words(other) == name and _is_same_kind(leaf, spec):
                alike.append(other)
        # Two Linen leaves of one name and one of nnx: it is not known which of them is meant.
        rivals = [other for other in linen if _name(other) == name]
        if len(alike) == len(rivals) == 1:
            rule = parse_rule({"linen": path, "nnx": alike[0]})
            rules.append(FoundRule(rule, frozenset([path]), frozenset(alike), ()))
    return rules


def _unused(both: Both, number: int) -> dict[str, LeafSpec]:
    """The leaves of a side that its forward pass does not use."""
    side = both[number]
    return {path: side.trace.leaves[path] for path in side.paths if not side.slots_of[path]}


def _name(path: str) -> set[str]:
    """The words of a Linen path without its collection, which nnx paths lack."""
    return words(path.split("/", 1)[1])


def _is_same_kind(one: LeafSpec, two: LeafSpec) -> bool:
    """Whether two leaves have one shape and dtype, and are parameters both or neither."""
    are_params = {leaf.collection == "params" for leaf in (one, two)}
    return (one.shape, one.dtype) == (two.shape, two.dtype) and len(are_params) == 1
