"""Proposes rules for whole leaves, each from one kind of likeness between their gradients.

    `equal_leaves`     one leaf has the gradient of one leaf, up to the order of its elements
    `copies`           one leaf has the sum of the gradients of several: they hold the same
    `parts`            one leaf has the elements of several: a concat, a stack
    `siblings`         one leaf is the last of its shape in a module whose others are settled
    `interchangeable`  a few leaves all have one gradient: some order of them is right

A proposal proves nothing yet: `leafwise.py` tries and confirms it. Where several rules fit one leaf
(its gradient is symmetric, say), all are proposed as alternatives.
"""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from linen_nnx.book.grammar import Rule
from linen_nnx.book.ops import Copy
from linen_nnx.infer.assign import words
from linen_nnx.infer.contrast import contrast
from linen_nnx.infer.elements import EQUAL, gap, orders, positions, table, turned_back, turns
from linen_nnx.infer.fit_ops import Group, rule_for
from linen_nnx.infer.found import FoundRule, SidedPath, rule_of
from linen_nnx.infer.trial import Trial

Array = np.ndarray
Leaves = dict[str, Array]
OpenLeaves = tuple[set[str], set[str]]
"""The Linen and the nnx leaves that have no rule."""
Alternatives = list[FoundRule]
"""Rules for the same leaves, the plainest first, of which one at most is right."""
_COUNTS = 1e-4  # a part of a sum has at least this share of the sum's largest element
_KEPT = 6  # alternatives for one pair of leaves
_HOMES = 3  # of one leaf, at most
_ALIKE = 4  # leaves that nothing tells apart and whose every order is tried: 24 orders
_MANY = 24  # leaves of one size among which copies are looked for: 2,300 choices of up to three


class OpenGradients(NamedTuple):
    """The gradients of the leaves without a rule, by side.

    Attributes:
      seen: the gradients, in the shapes of the leaves.
      blind: the leaves whose gradient is nothing but rounding.
    """

    seen: tuple[Leaves, Leaves]
    blind: tuple[set[str], set[str]]


# One leaf, one leaf


def equal_leaves(
    trial: Trial, known: Sequence[FoundRule], gradients: OpenGradients, _open: OpenLeaves
) -> list[Alternatives]:
    """Leaves whose gradients are equal to one another's and to no other's."""
    fits = _fits(trial, known, gradients)
    of_linen, of_nnx = Counter[str](), Counter[str]()
    for linen, nnx in fits:
        of_linen[linen] += 1
        of_nnx[nnx] += 1
    proposed: list[Alternatives] = []
    for (linen, nnx), alternatives in fits.items():
        if of_linen[linen] == of_nnx[nnx] == 1:
            proposed.append(alternatives)
    return proposed


def _fits(
    trial: Trial, known: Sequence[FoundRule], gradients: OpenGradients
) -> dict[tuple[str, str], Alternatives]:
    """All pairs of leaves with equal gradients, with the rules that move one into the other."""
    found: dict[tuple[str, str], Alternatives] = {}
    for linen, nnx in itertools.product(*gradients.seen):
        before, after = gradients.seen[0][linen], gradients.seen[1][nnx]
        if not _comparable(trial, linen, nnx) or not _same_sums(before, after):
            continue
        alternatives: Alternatives = []
        for ops in orders(before, after, EQUAL).values():
            rule = rule_of([linen], [nnx], ops)
            why = "gradients equal element by element"
            alternatives.append(_found(trial, known, rule, ([linen], [nnx]), why))
        if alternatives:
            found[linen, nnx] = alternatives[:_KEPT]
    return found


def _comparable(trial: Trial, linen: str, nnx: str) -> bool:
    """Whether two leaves could hold the same: as many elements, of one dtype."""
    one, two = (side.trace.leaves for side in trial.ground.sides)
    before, after = one[linen], two[nnx]
    return np.prod(before.shape) == np.prod(after.shape) and before.dtype == after.dtype


def _same_sums(one: Array, two: Array) -> bool:
    """Whether sums over all elements agree, as they do in whatever order the elements stand.

    It takes microseconds, and spares most pairs the trying of every order.
    """
    sums = np.array([[a.sum(), (a * a).sum(), np.abs(a).sum()] for a in (one, two)])
    sizes = np.maximum(np.abs(one).sum(), np.abs(sums).max(0))
    return bool((np.abs(sums[0] - sums[1]) <= 1e-6 * sizes).all())


# Several leaves that are one


def copies(
    trial: Trial, known: Sequence[FoundRule], gradients: OpenGradients, _open: OpenLeaves
) -> list[Alternatives]:
    """Leaves whose gradient is a sum of gradients of several leaves on the other side, its homes.

    An embedding that is also the head is used twice, and its gradient is the sum over both uses. A
    port that unties them has two leaves with one term each.
    """
    proposed: list[Alternatives] = []
    taken: set[str] = set()
    for one, many in ((0, 1), (1, 0)):
        for path, whole in gradients.seen[one].items():
            homes: Leaves = {}
            for other, slope in gradients.seen[many].items():
                linen, nnx = (path, other) if one == 0 else (other, path)
                if _comparable(trial, linen, nnx):
                    homes[other] = slope
            for chosen, perms in _sums_to(whole, homes):
                # One proposal a leaf: all proposals of a round are tried together.
                if not taken.isdisjoint({path, *chosen}):
                    continue
                taken |= {path, *chosen}
                ops = (Copy(perms if any(perms) else None),)
                sides = ([path], chosen) if one == 0 else (chosen, [path])
                why = "its gradient is the sum of theirs: one leaf with several homes"
                proposed.append([_found(trial, known, rule_of(*sides, ops), sides, why)])
    return proposed


def _sums_to(
    whole: Array, parts: Leaves
) -> Iterator[tuple[list[str], tuple[tuple[int, ...] | None, ...]]]:
    """Ways to add some arrays, as they are or turned, to a whole one."""
    # Each part must count: next to nothing could be added to any sum.
    least = _COUNTS * float(np.abs(whole).max())
    parts = {path: part for path, part in parts.items() if np.abs(part).max() >= least}
    if len(parts) > _MANY:
        return
    size = np.abs(whole).sum()
    for count in range(2, _HOMES + 1):
        for chosen in itertools.combinations(parts, count):
            # Sums over all elements do not depend on turns: they rule most choices out.
            arrays = [parts[path] for path in chosen]
            if abs(whole.sum() - sum(array.sum() for array in arrays)) > 1e-6 * size:
                continue
            ways = [turns(array.shape, whole.shape) for array in arrays]
            for perms in itertools.product(*ways):
                total = sum(map(turned_back, arrays, perms))
                if gap(np.asarray(total), whole) <= EQUAL:
                    yield list(chosen), perms
                    break


def parts(
    trial: Trial, known: Sequence[FoundRule], gradients: OpenGradients, _open: OpenLeaves
) -> list[Alternatives]:
    """Leaves that hold the elements of several leaves of the other side, or the reverse.

    One of the parts may have no gradient (softmax cancels the bias of keys), if it is the one leaf
    beside the others that fills what they leave of the whole.
    """
    proposed: list[Alternatives] = []
    taken: set[str] = set()
    for one, many in ((0, 1), (1, 0)):
        for path, whole in gradients.seen[one].items():
            at = _positions_in(whole, gradients.seen[many])
            why = "gradients equal element by element, of the parts and of the whole"
            left = whole.size - sum(places.size for places in at.values())
            dark = _dark_part(trial, known, gradients, (one, path), (set(at), left))
            if dark is not None:
                shape = trial.ground.sides[many].trace.leaves[dark].shape
                at[dark] = np.full(shape, -1)
                why += f"; `{dark}` is what is left of it, and has no gradient, either"
            # The parts must be all of the whole, or some element would have no source.
            filled = sum(places.size for places in at.values()) == whole.size
            if not filled or not taken.isdisjoint({path, *at}):
                continue
            taken |= {path, *at}
            numbers = np.arange(whole.size).reshape(whole.shape)
            if one == 0:
                group = Group({path: numbers}, at)
                sides = [path], list(at)
            else:
                group = _numbered(path, numbers, at)
                sides = list(at), [path]
            rule = rule_for(group)
            if rule is not None:
                proposed.append([_found(trial, known, rule, sides, why)])
    return proposed


def joined_in_no_known_way(gradients: OpenGradients) -> dict[SidedPath, list[str]]:
    """By leaf the leaves of the other side that share its elements, though no ops say how.

    A kernel for all gates of [x, h] holds eight of Linen's: a concat of concats, which is no rule.
    A fused bias of keys and values may hold one of Linen's, and keys' own that Linen lacks.
    """
    shared: dict[SidedPath, list[str]] = {}
    for one, many in ((0, 1), (1, 0)):
        for path, whole in gradients.seen[one].items():
            at = _positions_in(whole, gradients.seen[many])
            # A single part as large as the whole is no part.
            largest = max((places.size for places in at.values()), default=whole.size)
            if largest < whole.size and _is_rest_dark(whole, at):
                shared[one, path] = sorted(at)
                shared |= {(many, part): [path] for part in at}
    return shared


def _is_rest_dark(whole: Array, at: Leaves) -> bool:
    """Whether a whole has no gradient but at the elements of some parts.

    Example:
        >>> whole = np.array([1.0, 2.0, 0.0])
        >>> _is_rest_dark(whole, {"a": np.array([0, 1])})
        True
        >>> _is_rest_dark(whole, {"a": np.array([0])})
        False
    """
    known = np.concatenate([places.ravel() for places in at.values()])
    rest = np.delete(np.abs(whole).ravel(), known[known >= 0])
    return rest.size == 0 or bool(rest.max() <= EQUAL * np.abs(whole).max())


def _dark_part(
    trial: Trial,
    known: Sequence[FoundRule],
    gradients: OpenGradients,
    whole: SidedPath,
    found: tuple[set[str], int],
) -> str | None:
    """The one leaf without a gradient that may fill a whole leaf beside its other parts.

    Args:
      trial, known, gradients: as of a proposal.
      whole: the leaf of one side, whose parts are on the other.
      found: the parts whose gradients are known, and how many elements these leave.
    """
    one, path = whole
    parts_found, left = found
    if not parts_found or not left:
        return None
    leaves = trial.ground.sides[1 - one].trace.leaves
    dtype = trial.ground.sides[one].trace.leaves[path].dtype
    fit: list[str] = []
    for other in gradients.blind[1 - one]:
        if math.prod(leaves[other].shape) == left and leaves[other].dtype == dtype:
            fit.append(other)
    # Beside the others: in a module whose leaves went to the module of the whole, or below the
    # nearest module that holds all the other parts.
    modules: set[str] = set()
    for rule in known:
        mine, theirs = (rule.linen, rule.nnx) if one == 0 else (rule.nnx, rule.linen)
        if _module(path) in map(_module, mine):
            modules.update(map(_module, theirs))
    above = _common_module(parts_found)
    for beside in (
        [other for other in fit if _module(other) in modules],
        [other for other in fit if other.startswith(above)],
    ):
        if len(beside) == 1:
            return beside[0]
    return None


def _common_module(paths: Iterable[str]) -> str:
    """The longest path of a module that holds all leaves, with a slash behind it.

    Example:
        >>> _common_module(["params/attn/query/bias", "params/attn/value/bias"])
        'params/attn/'
    """
    common: list[str] = []
    for names in zip(*(path.split("/")[:-1] for path in paths), strict=False):
        if len(set(names)) > 1:
            break
        common.append(names[0])
    return "".join(f"{name}/" for name in common)


def _positions_in(whole: Array, others: Leaves) -> Leaves:
    """The leaves whose elements are all in a whole, by their gradients, and where each is."""
    known = table(whole)
    found: Leaves = {}
    for path, slope in others.items():
        places = positions(slope, *known) if slope.size <= whole.size else None
        if places is not None:
            found[path] = places
    return found


def _numbered(path: str, numbers: Array, parts: Leaves) -> Group:
    """A group whose whole is on the nnx side: numbered by the Linen parts."""
    mine: Leaves = {}
    mapped = np.full(numbers.size, -1)
    start = 0
    # Element number 5 of a part is element `places[5]` of the whole, which so gets its number.
    for part, places in parts.items():
        mine[part] = np.arange(start, start + places.size).reshape(places.shape)
        is_known = places >= 0
        mapped[places[is_known]] = mine[part][is_known]
        start += places.size
    return Group(mine, {path: mapped.reshape(numbers.shape)})


# What no gradient tells


def siblings(
    trial: Trial, known: Sequence[FoundRule], gradients: OpenGradients, open_: OpenLeaves
) -> list[Alternatives]:
    """The last leaf of its shape in a module whose other leaves are all in one module.

    Softmax cancels the bias of keys: it has no gradient. But where `attn/k/kernel` is `key/kernel`,
    `attn/k/bias` is `key/bias`, if nothing else there has its shape.
    """
    homes_of = _homes(known)
    proposed: list[Alternatives] = []
    for path in sorted(open_[0]):
        module = _module(path)
        homes: set[str] = set()
        for other, nnx_leaves in homes_of.items():
            if _module(other) == module:
                homes.update(map(_module, nnx_leaves))
        # Where the siblings went to several modules, or none has a rule, place tells nothing.
        if len(homes) != 1:
            continue
        (home,) = homes
        fit: list[str] = []
        for other in open_[1]:
            if _module(other) == home and _place_fits(trial, gradients, path, other):
                fit.append(other)
        if len(fit) != 1:
            continue
        # And the other way round: no sibling may fit where this leaf fits.
        rivals: list[str] = []
        for other in open_[0]:
            if _module(other) == module and _place_fits(trial, gradients, other, fit[0]):
                rivals.append(other)
        if rivals != [path]:
            continue
        why = "the last leaf of its shape beside leaves that are settled (elimination)"
        if path not in gradients.seen[0]:
            why += f": no output sees `{path}`, placed by its siblings alone"
        rule = rule_of([path], fit, ())
        proposed.append([_found(trial, known, rule, ([path], fit), why)])
    return proposed


def _module(path: str) -> str:
    """The path of a leaf without its own name."""
    return path.rpartition("/")[0]


def _place_fits(trial: Trial, gradients: OpenGradients, linen: str, nnx: str) -> bool:
    """Whether two leaves have one shape and dtype, both are used, and both are seen or neither."""
    one, two = trial.ground.sides
    are_used = bool(one.slots_of[linen] and two.slots_of[nnx])
    is_same_shape = one.trace.leaves[linen].shape == two.trace.leaves[nnx].shape
    are_seen_alike = (linen in gradients.blind[0]) == (nnx in gradients.blind[1])
    return are_used and is_same_shape and are_seen_alike and _comparable(trial, linen, nnx)


def interchangeable(
    trial: Trial, known: Sequence[FoundRule], gradients: OpenGradients, _open: OpenLeaves
) -> list[Alternatives]:
    """A few leaves with equal gradients, in the one order with which the outputs agree.

    Where several orders will do, the leaves are interchangeable: then the order of first use
    decides, unless the names say otherwise.
    """
    fits = _fits(trial, known, gradients)
    linen, nnx = trial.ground.sides
    rights_of: dict[str, list[str]] = {}
    lefts_of: dict[str, list[str]] = {}
    for left, right in fits:
        rights_of.setdefault(left, []).append(right)
        lefts_of.setdefault(right, []).append(left)
    for first in sorted(rights_of, key=linen.slots_of.__getitem__):
        # The leaves that fit the same ones as the first, on both sides, by first use.
        rights = sorted(rights_of[first], key=nnx.slots_of.__getitem__)
        connected = set(itertools.chain.from_iterable(lefts_of[right] for right in rights))
        lefts = sorted(connected, key=linen.slots_of.__getitem__)
        is_whole = all(pair in fits for pair in itertools.product(lefts, rights))
        if not (is_whole and 1 < len(lefts) == len(rights) <= _ALIKE):
            continue
        holding: list[tuple[Sequence[str], list[Alternatives]]] = []
        for order in itertools.permutations(rights):  # the order of first use comes first
            chosen: list[Alternatives] = []
            plainest: list[FoundRule] = []
            for pair in zip(lefts, order, strict=True):
                chosen.append(fits[pair])
                plainest.append(fits[pair][0])
            if trial.holds([*known, *plainest]):
                holding.append((order, chosen))
        if not holding or _named_otherwise(lefts, [order for order, _ in holding]):
            continue
        why = "told from others with equal gradients by the outputs"
        if len(holding) > 1:
            why = "interchangeable to all outputs: by order of first use"
        _, chosen = holding[0]
        return [_with_reason(alternatives, why) for alternatives in chosen]
    return []


def _with_reason(alternatives: Alternatives, why: str) -> Alternatives:
    """The same rules with one more reason."""
    return [replace(found, reasons=(*found.reasons, why)) for found in alternatives]


def _named_otherwise(lefts: Sequence[str], holding: Sequence[Sequence[str]]) -> bool:
    """Whether the names speak for another order than the first."""
    scores: list[int] = []
    for order in holding:
        score = 0
        for linen, nnx in zip(lefts, order, strict=True):
            score += len(words(linen) & words(nnx))
        scores.append(score)
    return max(scores) > scores[0]


# Rules


def _found(
    trial: Trial,
    known: Sequence[FoundRule],
    rule: Rule,
    leaves: tuple[Iterable[str], Iterable[str]],
    why: str,
) -> FoundRule:
    """A rule for some leaves of both sides, with what speaks for it."""
    linen, nnx = map(frozenset, leaves)
    reasons = [why]
    # Of one leaf against several their number says itself what differs.
    if len(linen) + len(nnx) == 2:
        how = contrast(trial.ground.sides, linen, nnx, _homes(known))
        if how:
            reasons.append(f"the dataflow differs: {how}")
    reasons.append("outputs agree with numbers that differ from leaf to leaf")
    return FoundRule(rule, linen, nnx, (), tuple(reasons))


def _homes(known: Sequence[FoundRule]) -> Mapping[str, frozenset[str]]:
    """For each Linen leaf that has a rule, the nnx leaves that it becomes."""
    homes: dict[str, frozenset[str]] = {}
    for found in known:
        for path in found.linen:
            homes[path] = found.nnx
    return homes


Proposal = Callable[[Trial, Sequence[FoundRule], OpenGradients, OpenLeaves], list[Alternatives]]
PROPOSALS: tuple[Proposal, ...] = (equal_leaves, copies, parts, siblings, interchangeable)
"""The kinds of proposal, the one that rests on most evidence first."""
