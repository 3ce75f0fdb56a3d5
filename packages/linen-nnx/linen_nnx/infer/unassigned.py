"""Says of each leaf without a rule why it has none, and which leaves it may go with.

    unassigned: params/down/bias
      reason: 2 uses of the other side fit it, and the evidence does not tell which
      candidates: [last/bias, first/bias]          the likeliest first
      likely: {linen: params/down/bias, nnx: last/bias}

A candidate comes from the evidence: from the slots that the leaf's own slots may go with. Names say
only which of them comes first, and which rule is proposed, unproven, for a person to judge.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

from linen_nnx.book.grammar import Rule, parse_rule
from linen_nnx.book.rules import Unassigned
from linen_nnx.infer.additions import addition
from linen_nnx.infer.assign import Assignment
from linen_nnx.infer.found import FoundRule, SidedPath
from linen_nnx.infer.sides import Both

_CANDIDATES = 8


def unassigned(
    both: Both,
    rules: Sequence[FoundRule],
    extra: Sequence[Rule],
    known: tuple[Assignment, Mapping[SidedPath, list[str]]],
    why: Mapping[SidedPath, str],
) -> dict[str, Unassigned]:
    """Every leaf without a rule, with the reason and its candidates, by path.

    Args:
      both: the two sides.
      rules, extra: the rules of the book; `extra` fills leaves that only one side has.
      known: the pairs of slots, and why other slots have none; and by leaf those that share its
        elements, for which there are no ops.
      why: the reasons that are known of whole leaves; they count before those of slots.
    """
    free = _without_rule(both, rules, extra)
    assignment, shared = known
    partners = _partners(assignment)
    homes = _module_homes(rules)
    result: dict[str, Unassigned] = {}
    for number, side in enumerate(both):
        other = both[1 - number]
        for path in side.paths:
            if path not in free[number]:
                continue
            if side.slots_of[path]:
                near, reason = _from_slots(
                    (side, other), path, assignment.open[number], partners[number]
                )
            else:
                near, reason = _idle_alike((side, other), path), "the forward pass does not use it"
            reason = why.get((number, path), reason)
            near = shared.get((number, path), near)
            home = homes[number].get(_module((number, path)))
            near.sort(key=partial(_strangeness, (number, path), home))
            candidates = tuple(dict.fromkeys(near))[:_CANDIDATES]
            likely = _likely((side, other), path, candidates, free[1 - number])
            result[_key(path, result)] = Unassigned(side.trace.side, reason, candidates, likely)
    # Arrays that are no Variables need no rule, unless their layer is one that loses something.
    for path in both[1].trace.bare:
        if (1, path) in why:
            result[_key(path, result)] = Unassigned("nnx", why[1, path], ())
    return result


def _without_rule(
    both: Both, rules: Iterable[FoundRule], extra: Iterable[Rule]
) -> tuple[set[str], set[str]]:
    """The Linen and the nnx leaves that no rule of the book has."""
    linen, nnx = set(both[0].paths), set(both[1].paths)
    for found in rules:
        linen -= found.linen
        nnx -= found.nnx
    # A rule that fills a leaf names it: its pattern has no captures.
    for rule in extra:
        for pattern in rule.linen:
            linen.discard(pattern.text)
        for pattern in rule.nnx:
            nnx.discard(pattern.text)
    return linen, nnx


# Candidates


def _partners(assignment: Assignment) -> tuple[dict[int, int], dict[int, int]]:
    """For each paired slot of Linen the slot of nnx, and the reverse."""
    of_linen: dict[int, int] = {}
    of_nnx: dict[int, int] = {}
    for pair in assignment.pairs:
        of_linen[pair.linen] = pair.nnx
        of_nnx[pair.nnx] = pair.linen
    return of_linen, of_nnx


def _from_slots(
    both: Both,
    path: str,
    open_: Mapping[int, tuple[list[int], str]],
    partners: Mapping[int, int],
) -> tuple[list[str], str]:
    """The leaves that a leaf's slots may go with, and why the last of its open slots is open."""
    side, other = both
    near: list[str] = []
    reason = "the forward pass does not use it"
    for slot in side.slots_of[path]:
        if slot in open_:
            slots, reason = open_[slot]
        else:
            slots = [partners[slot]]
        near += [other.first_leaf[k] for k in slots]
    return near, reason


def _idle_alike(both: Both, path: str) -> list[str]:
    """The leaves of the other side with the axes of a leaf, in any order, that are not used either.

    Those with the axes in the same order come first.
    """
    side, other = both
    shape = side.trace.leaves[path].shape
    found: list[str] = []
    for name in other.paths:
        if sorted(other.trace.leaves[name].shape) == sorted(shape) and not other.slots_of[name]:
            found.append(name)
    return sorted(found, key=lambda name: other.trace.leaves[name].shape != shape)


# Which is likely


def _module_homes(rules: Iterable[FoundRule]) -> tuple[dict[str, str], dict[str, str]]:
    """By side, which module of the other side holds what a module does: proven by another leaf."""
    of_linen: dict[str, str] = {}
    of_nnx: dict[str, str] = {}
    for found in rules:
        if len(found.linen) == len(found.nnx) == 1:
            linen, nnx = _module((0, min(found.linen))), _module((1, min(found.nnx)))
            of_linen[linen], of_nnx[nnx] = nnx, linen
    return of_linen, of_nnx


def _module(leaf: SidedPath) -> str:
    """The path of the module that holds a leaf: `a/norm` of `batch_stats/a/norm/mean`."""
    side, path = leaf
    inside = path if side == 1 else path.split("/", 1)[1]
    return inside.rpartition("/")[0]


def _strangeness(leaf: SidedPath, home: str | None, other: str) -> tuple[bool, bool]:
    """How unlikely a candidate is by its names: sorts those of the same name and module first.

    Where the mean of a norm is known to lie in `heads/0/norm`, its scale is likely to lie there.
    """
    side, path = leaf
    is_named_so = path.rpartition("/")[2] == other.rpartition("/")[2]
    is_at_home = home is not None and _module((1 - side, other)) == home
    return not is_named_so, not is_at_home


def _likely(both: Both, path: str, candidates: Sequence[str], free: set[str]) -> Rule | None:
    """The rule that would close an open leaf of the first side: nothing proves it."""
    side, other = both
    # What holds the same in another form is to stay as it is: a rule would change the model.
    if path in side.held and candidates:
        return None
    sizes = sorted(side.trace.leaves[path].shape)
    for name in candidates:
        if name in free and sorted(other.trace.leaves[name].shape) == sizes:
            return likely_pair((side, other), path, name)
    # There are candidates, but each has a rule or another form: a person has to look.
    if candidates:
        return None
    if side.trace.side == "nnx":
        return addition(side.trace, path, "only nnx has it")
    return parse_rule({"linen": path, "ops": [{"op": "drop"}]})


def likely_pair(both: Both, path: str, name: str) -> Rule | None:
    """The rule for a leaf of the first side and one of the other, with its axes in any order.

    None where their axes differ in length, or are several of one length in another order.
    """
    side, other = both
    entry = {side.trace.side: path, other.trace.side: name}
    shapes = {
        side.trace.side: side.trace.leaves[path].shape,
        other.trace.side: other.trace.leaves[name].shape,
    }
    if shapes["linen"] == shapes["nnx"]:
        return parse_rule(entry)
    before = list(shapes["linen"])
    if sorted(before) != sorted(shapes["nnx"]):
        return None
    perm = [before.index(size) for size in shapes["nnx"]]
    # Of two axes of one length it is not known which is which.
    if len(set(perm)) != len(perm):
        return None
    return parse_rule({**entry, "ops": [{"op": "transpose", "perm": perm}]})


def _key(path: str, taken: Mapping[str, Unassigned]) -> str:
    """The path, told apart from an equal one of the other side."""
    return f"{path} (nnx)" if path in taken else path
