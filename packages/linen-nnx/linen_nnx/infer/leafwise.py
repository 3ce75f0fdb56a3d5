"""Pairs whole leaves where the two models compute the same in different ways.

The slots of `assign.py` must be equal on both sides. Where one model rotates halves and the other
a whole, or scales before a product and not after it, they are not. What is equal all the same is
the gradient of each leaf, element by element, at values that fit every way to pair them:

    Linen q/kernel  [[.1 .2] [.3 .4]]     nnx a/kernel  [[.1 .2] [.3 .4]]    a rename
    Linen k/kernel  [[.5 .6] [.7 .8]]     nnx b/kernel  [[.5 .7] [.6 .8]]    a transpose
    Linen e         [[.4 .4]]             nnx s, t      [[.1 .3]], [[.3 .1]] their sum: copies
    Linen w         [.1 .2 .3]            nnx u, v      [.1 .2], [.3]        its parts: a concat

A rule is proposed where it is the only one that fits, and kept where the outputs agree with numbers
that differ from leaf to leaf. Each rule that is settled makes the values richer for the next.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from linen_nnx.book.grammar import Rule
from linen_nnx.book.ops import Copy, Op, Reshape, Transpose
from linen_nnx.book.patterns import Pattern
from linen_nnx.book.rules import RuleBook
from linen_nnx.infer.assign import words
from linen_nnx.infer.contrast import contrast
from linen_nnx.infer.fit_ops import Group, rule_for
from linen_nnx.infer.found import FoundRule
from linen_nnx.infer.sides import Both, SlottedSide
from linen_nnx.infer.trial import Point, Trial

Array = np.ndarray
Leaves = dict[str, Array]
_OpenLeaves = tuple[set[str], set[str]]
Way = list[FoundRule]
"""Ways to pair one leaf, the plainest first: its gradient fits all of them."""
_EXACT = 1e-7  # relative to a leaf's largest gradient
_AGREES = 1e-3  # the same, where numbers differ from leaf to leaf: a wrong rule is 1 away
_BLIND = 1e-10  # of the median gradient
_COUNTS = 1e-4  # of the largest element of a sum, what a part of it has at least
_WAYS = 6  # kept for one pair of leaves
_TRIED = 64  # combinations of ways
_HOMES = 3  # of one leaf, at most
_ALIKE = 4  # leaves that nothing tells apart and whose every order is tried
_MANY = 24  # leaves of one size among which copies are looked for


class _Slopes(NamedTuple):
    """What is known of the leaves without a rule: their gradients, those of blind ones aside."""

    slopes: tuple[Leaves, Leaves]
    blind: tuple[set[str], set[str]]


def pair_leaves(
    trial: Trial, items: Sequence[FoundRule], open_: _OpenLeaves
) -> tuple[list[FoundRule], _Slopes | None]:
    """More rules, for whole leaves; and what the gradients of the others are.

    Args:
      items: the rules that hold already; open_: the leaves without one, of either side.
    """
    found: list[FoundRule] = []
    view = point = None
    while open_[0] and open_[1]:
        known = [*items, *found]
        point = point or trial.point(known, gradient=True)
        view = _view(trial.ground.sides, point, open_)
        new: list[FoundRule] = []
        for search in (_pairs, _copies, _groups, _siblings, _alike):
            if ways := search(trial, known, view, open_):
                new, point = _holding(trial, known, ways)
                if new:
                    break
        if not new:
            break
        found += new
        open_ = (
            open_[0] - {path for item in new for path in item.linen},
            open_[1] - {path for item in new for path in item.nnx},
        )
    return found, view


def _view(both: Both, point: Point, open_: _OpenLeaves) -> _Slopes:
    slopes: list[Leaves] = []
    blind: list[set[str]] = []
    for number, side in enumerate(both):
        limit = _limit(point, number, side)
        every = point.gradients(number, {p: side.trace.numbers[p] for p in open_[number]})
        sizes = {path: _size(slope) for path, slope in every.items()}
        mine = [path for path in side.paths if path in open_[number]]
        blind.append({path for path in mine if sizes[path] <= limit})
        slopes.append({path: every[path] for path in mine if sizes[path] > limit})
    return _Slopes((slopes[0], slopes[1]), (blind[0], blind[1]))


def _limit(point: Point, number: int, side: SlottedSide) -> float:
    """The largest gradient of a leaf of one side that is none but rounding."""
    gradient = point.runs[number].gradient
    sizes = [_size(gradient[ids]) for ids in side.trace.numbers.values()]
    seen = [size for size in sizes if size > 0]
    return _BLIND * float(np.median(seen)) if seen else 0.0


def _holding(
    trial: Trial, known: Sequence[FoundRule], ways: Sequence[Way]
) -> tuple[list[FoundRule], Point | None]:
    """One way for each leaf, so that all hold together; else those that hold one by one.

    What outputs hardly see holds in any way. So the gradients must agree again, with numbers that
    differ from leaf to leaf, and in one way alone: beside leaves that are all one constant a matrix
    and its transpose have one gradient. Such a leaf waits for its neighbours. The second result is
    the point where the gradients were seen.
    """
    while ways:
        chosen = _agreeing(trial, known, ways)
        if not chosen:
            break
        point = trial.point([*known, *chosen], gradient=True)
        limit = _limit(point, 0, trial.ground.sides[0])
        left: list[Way] = []
        is_clear = True
        for way in ways:
            fitting = [item for item in way if _confirmed(trial, point, limit, item)]
            taken = [item for item in way if item in chosen]
            if fitting == taken:
                left += [way] * len(taken)
                continue
            is_clear = False
            if len(fitting) == 1:
                left.append(fitting)
        if is_clear:
            return chosen, point
        ways = left
    return [], None


def _agreeing(trial: Trial, known: Sequence[FoundRule], ways: Sequence[Way]) -> list[FoundRule]:
    """One way for each leaf with which the outputs agree."""
    for chosen in itertools.islice(itertools.product(*ways), _TRIED):
        if trial.holds([*known, *chosen]):
            return list(chosen)
    kept: list[FoundRule] = []
    for each in ways:
        holding = (item for item in each if trial.holds([*known, *kept, item]))
        kept += itertools.islice(holding, 1)
    return kept


def _confirmed(trial: Trial, point: Point, limit: float, item: FoundRule) -> bool:
    """Whether the gradients of a rule's leaves correspond by the rule, and by no other.

    Where there are none but rounding, whether nothing but this rule would fit the leaves' shapes.
    """
    if any(isinstance(op, Copy) for op in item.rule.ops):
        return True  # of copies only the sum is known, and `_sums` has seen to it
    linen, nnx = (side.trace for side in trial.ground.sides)
    ours = point.gradients(0, {path: linen.numbers[path] for path in item.linen})
    theirs = point.gradients(1, {path: nnx.numbers[path] for path in item.nnx})
    if max(map(_size, ours.values())) <= limit:
        sizes = [size for path in item.linen for size in linen.leaves[path].shape if size > 1]
        return len(set(sizes)) == len(sizes) and not item.rule.ops
    got = RuleBook([item.rule]).to_nnx(ours)
    if any(_gap(got[path], theirs[path]) > _AGREES for path in theirs):
        return False
    if len(ours) == len(theirs) == 1:
        ((one, before),) = ours.items()
        ((two, after),) = theirs.items()
        return len(_orders((one, before), (two, after), _AGREES)) == 1
    whole, parts = (theirs, ours) if len(theirs) == 1 else (ours, theirs)
    tables = [_table(array) for array in whole.values()]
    dark = 0  # parts none of whose elements is told from others: one may be what is left over
    for part in parts.values():
        found = [_places(part, *table) for table in tables]
        dark += not any(places is not None and (places >= 0).any() for places in found)
    return dark <= 1


def _orders(
    ours: tuple[str, Array], theirs: tuple[str, Array], near: float
) -> dict[bytes, tuple[Op, ...]]:
    """The orders in which the elements of one array are those of another, and ops for each."""
    found: dict[bytes, tuple[Op, ...]] = {}
    (one, before), (two, after) = ours, theirs
    numbers = np.arange(before.size).reshape(before.shape)
    for ops in _ways_to_move(before.shape, after.shape):
        book = RuleBook([_rule([one], [two], ops)])
        if _gap(book.to_nnx({one: before})[two], after) <= near:
            # Axes of length 1 move without moving an element: that is no other order.
            found.setdefault(book.to_nnx({one: numbers})[two].tobytes(), ops)
    return found


# One leaf, one leaf


def _pairs(
    trial: Trial, known: Sequence[FoundRule], view: _Slopes, _open: _OpenLeaves
) -> list[Way]:
    """Leaves whose gradients are equal to one another's and to no other's."""
    fits = _fits(trial, known, view)
    ours = Counter(a for a, _ in fits)
    theirs = Counter(b for _, b in fits)
    return [way for (a, b), way in fits.items() if ours[a] == theirs[b] == 1]


def _fits(trial: Trial, known: Sequence[FoundRule], view: _Slopes) -> dict[tuple[str, str], Way]:
    """All pairs of leaves with equal gradients, with the ways to move one into the other."""
    found: dict[tuple[str, str], Way] = {}
    for ours, theirs in itertools.product(*view.slopes):
        one, two = view.slopes[0][ours], view.slopes[1][theirs]
        if not _comparable(trial, ours, theirs) or not _same_sums(one, two):
            continue
        way: Way = []
        for ops in _orders((ours, one), (theirs, two), _EXACT).values():
            why = "gradients equal element by element"
            rule = _rule([ours], [theirs], ops)
            way.append(_item(trial, known, rule, ([ours], [theirs]), why))
        if way:
            found[ours, theirs] = way[:_WAYS]
    return found


def _comparable(trial: Trial, ours: str, theirs: str) -> bool:
    """Whether two leaves could hold the same: as many elements, of one dtype."""
    linen, nnx = (side.trace.leaves for side in trial.ground.sides)
    one, two = linen[ours], nnx[theirs]
    return np.prod(one.shape) == np.prod(two.shape) and one.dtype == two.dtype


def _same_sums(one: Array, two: Array) -> bool:
    """Whether sums over all elements agree, as they do in whatever order they stand."""
    sums = np.array([[a.sum(), (a * a).sum(), np.abs(a).sum()] for a in (one, two)])
    sizes = np.maximum(np.abs(one).sum(), np.abs(sums).max(0))
    return bool((np.abs(sums[0] - sums[1]) <= 1e-6 * sizes).all())


def _ways_to_move(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[Op, ...]]:
    """Ways to move the elements of one shape into another: plain, turned, and both."""
    if before == after:
        yield ()
    else:
        yield (Reshape(before, after),)
    if len(before) > 4 or len(after) > 4:
        return
    for perm in itertools.permutations(range(len(before))):
        turned = tuple(before[axis] for axis in perm)
        if perm != tuple(range(len(before))):
            yield (Transpose(perm), *([] if turned == after else [Reshape(turned, after)]))
    for perm in itertools.permutations(range(len(after))):
        if perm != tuple(range(len(after))) and before != after:
            start = tuple(after[perm.index(axis)] for axis in range(len(after)))
            if start != before:
                yield (Reshape(before, start), Transpose(perm))


# Several leaves that are one


def _copies(
    trial: Trial, known: Sequence[FoundRule], view: _Slopes, _open: _OpenLeaves
) -> list[Way]:
    """Leaves whose gradient is the sum of those of several on the other side: its homes."""
    ways: list[Way] = []
    taken: set[str] = set()
    for one, many in ((0, 1), (1, 0)):
        for path, whole in view.slopes[one].items():
            homes = [
                other
                for other in view.slopes[many]
                if _comparable(trial, *((path, other) if one == 0 else (other, path)))
            ]
            for chosen, perms in _sums(whole, {p: view.slopes[many][p] for p in homes}):
                if taken.isdisjoint({path, *chosen}):
                    taken |= {path, *chosen}
                    ops = (Copy(perms if any(perms) else None),)
                    sides = ([path], chosen) if one == 0 else (chosen, [path])
                    why = "its gradient is the sum of theirs: one leaf with several homes"
                    ways.append([_item(trial, known, _rule(*sides, ops), sides, why)])
    return ways


def _sums(
    whole: Array, parts: Leaves
) -> Iterator[tuple[list[str], tuple[tuple[int, ...] | None, ...]]]:
    """Ways to add some arrays, as they are or turned, to a whole one.

    Each of them counts: one that is next to nothing would be a home of whatever the others are.
    """
    least = _COUNTS * float(np.abs(whole).max())
    parts = {path: part for path, part in parts.items() if np.abs(part).max() >= least}
    if len(parts) > _MANY:
        return
    size = np.abs(whole).sum()
    for count in range(2, _HOMES + 1):
        for chosen in itertools.combinations(parts, count):
            if abs(whole.sum() - sum(parts[p].sum() for p in chosen)) > 1e-6 * size:
                continue
            turns = [_turns(parts[path].shape, whole.shape) for path in chosen]
            for perms in itertools.product(*turns):
                total = sum(_back(parts[p], perm) for p, perm in zip(chosen, perms, strict=True))
                if _gap(np.asarray(total), whole) <= _EXACT:
                    yield list(chosen), perms
                    break


def _turns(home: tuple[int, ...], whole: tuple[int, ...]) -> list[tuple[int, ...] | None]:
    """The orders of axes in which a home may hold the whole; None for the same."""
    ways: list[tuple[int, ...] | None] = [None] if home == whole else []
    for perm in itertools.permutations(range(len(whole))):
        turned = tuple(whole[axis] for axis in perm)
        if turned == home and perm != tuple(range(len(whole))):
            ways.append(perm)
    return ways


def _back(array: Array, perm: tuple[int, ...] | None) -> Array:
    return array if perm is None else array.transpose(np.argsort(perm))


def _groups(
    trial: Trial, known: Sequence[FoundRule], view: _Slopes, _open: _OpenLeaves
) -> list[Way]:
    """Leaves that hold the elements of several leaves of the other side, or the reverse."""
    ways: list[Way] = []
    taken: set[str] = set()
    for one, many in ((0, 1), (1, 0)):
        for path, whole in view.slopes[one].items():
            table = _table(whole)
            parts = {
                other: places
                for other, slope in view.slopes[many].items()
                if slope.size <= whole.size and (places := _places(slope, *table)) is not None
            }
            filled = sum(places.size for places in parts.values()) == whole.size
            if not filled or not taken.isdisjoint({path, *parts}):
                continue
            taken |= {path, *parts}
            numbers = np.arange(whole.size).reshape(whole.shape)
            group = Group({path: numbers}, parts) if one == 0 else _numbered(path, numbers, parts)
            if (rule := rule_for(group)) is not None:
                why = "gradients equal element by element, of the parts and of the whole"
                sides = ([path], list(parts)) if one == 0 else (list(parts), [path])
                ways.append([_item(trial, known, rule, sides, why)])
    return ways


def _table(whole: Array) -> tuple[Array, Array, float]:
    """The sorted gradient of a leaf, the element of each, and what is no difference."""
    order = np.argsort(whole, axis=None)
    return whole.ravel()[order], order, _EXACT * float(np.abs(whole).max())


def _places(part: Array, values: Array, order: Array, near: float) -> Array | None:
    """Which element of a whole each element of a part is; -1 if several have its gradient.

    None if some element of the part is in the whole nowhere.
    """
    low = np.searchsorted(values, part.ravel() - near, side="left")
    high = np.searchsorted(values, part.ravel() + near, side="right")
    if (low == high).any():
        return None
    alone = high - low == 1
    return np.where(alone, order[np.minimum(low, len(order) - 1)], -1).reshape(part.shape)


def _numbered(path: str, numbers: Array, parts: Leaves) -> Group:
    """A group whose whole is on the nnx side: numbered by the Linen parts."""
    mine: Leaves = {}
    mapped = np.full(numbers.size, -1)
    start = 0
    for part, places in parts.items():
        mine[part] = np.arange(start, start + places.size).reshape(places.shape)
        known = places >= 0
        mapped[places[known]] = mine[part][known]
        start += places.size
    return Group(mine, {path: mapped.reshape(numbers.shape)})


# What no gradient tells


def _siblings(
    trial: Trial, known: Sequence[FoundRule], view: _Slopes, open_: _OpenLeaves
) -> list[Way]:
    """The last leaf of its shape in a module whose other leaves are all in one module."""
    mates = _mates(known)
    ways = []
    for path in sorted(open_[0]):
        module = path.rpartition("/")[0]
        homes = {
            home.rpartition("/")[0]
            for other, homes in mates.items()
            if other.rpartition("/")[0] == module
            for home in homes
        }
        if len(homes) != 1:
            continue
        (home,) = homes
        same = [
            [other for other in open_[side] if other.rpartition("/")[0] == place]
            for side, place in ((0, module), (1, home))
        ]
        fit = [other for other in same[1] if _place_fits(trial, view, path, other)]
        rivals = [other for other in same[0] if fit and _place_fits(trial, view, other, fit[0])]
        if len(fit) == 1 and rivals == [path]:
            seen = path in view.slopes[0]
            why = "the last leaf of its shape beside leaves that are settled (elimination)"
            why += "" if seen else f": no output sees `{path}`, placed by its siblings alone"
            rule = _rule([path], fit, ())
            ways.append([_item(trial, known, rule, ([path], fit), why)])
    return ways


def _place_fits(trial: Trial, view: _Slopes, ours: str, theirs: str) -> bool:
    """Whether two leaves have one shape and dtype, both are used, and both are seen or neither."""
    linen, nnx = trial.ground.sides
    used = linen.slots_of[ours] and nnx.slots_of[theirs]
    alike = linen.trace.leaves[ours].shape == nnx.trace.leaves[theirs].shape
    seen = (ours in view.blind[0]) == (theirs in view.blind[1])
    return bool(used) and alike and seen and _comparable(trial, ours, theirs)


def _alike(
    trial: Trial, known: Sequence[FoundRule], view: _Slopes, _open: _OpenLeaves
) -> list[Way]:
    """A few leaves with equal gradients, in the one order with which the outputs agree.

    Where several orders will do, the leaves are interchangeable: then the order of first use
    decides, unless the names say otherwise.
    """
    fits = _fits(trial, known, view)
    linen, nnx = trial.ground.sides
    for ours in sorted({a for a, _ in fits}, key=lambda path: linen.slots_of[path]):
        rights = sorted((b for a, b in fits if a == ours), key=lambda path: nnx.slots_of[path])
        lefts = sorted({a for a, b in fits if b in rights}, key=lambda path: linen.slots_of[path])
        whole = all((a, b) in fits for a in lefts for b in rights)
        if not (whole and 1 < len(lefts) == len(rights) <= _ALIKE):
            continue
        orders = []
        for order in itertools.permutations(rights):
            chosen = [fits[pair] for pair in zip(lefts, order, strict=True)]
            if trial.holds([*known, *(way[0] for way in chosen)]):
                orders.append((order, chosen))
        if not orders or _named_otherwise(lefts, [order for order, _ in orders]):
            continue
        why = "told from others with equal gradients by the outputs"
        if len(orders) > 1:
            why = "interchangeable to all outputs: by order of first use"
        return [
            [replace(item, reasons=(*item.reasons, why)) for item in way] for way in orders[0][1]
        ]
    return []


def _named_otherwise(lefts: Sequence[str], orders: Sequence[Sequence[str]]) -> bool:
    """Whether the names speak for another order than the first."""
    scores = [
        sum(len(words(a) & words(b)) for a, b in zip(lefts, order, strict=True)) for order in orders
    ]
    return max(scores) > scores[0]


# Rules


def _rule(linen: Sequence[str], nnx: Sequence[str], ops: tuple[Op, ...]) -> Rule:
    return Rule(tuple(map(Pattern, linen)), tuple(map(Pattern, nnx)), ops)


def _item(
    trial: Trial,
    known: Sequence[FoundRule],
    rule: Rule,
    leaves: tuple[Iterable[str], Iterable[str]],
    why: str,
) -> FoundRule:
    """A rule for some leaves of both sides, with what speaks for it."""
    linen, nnx = map(frozenset, leaves)
    several = len(linen) + len(nnx) > 2  # their number says itself what differs
    mates = _mates(known)
    how = None if several else contrast(trial.ground.sides, linen, nnx, mates)
    reasons = [why, "outputs agree with numbers that differ from leaf to leaf"]
    reasons[1:1] = [f"the dataflow differs: {how}"] if how else []
    return FoundRule(rule, linen, nnx, (), tuple(reasons))


def _mates(items: Sequence[FoundRule]) -> Mapping[str, frozenset[str]]:
    return {path: item.nnx for item in items for path in item.linen}


def _size(array: Array) -> float:
    """The largest element."""
    return float(np.abs(array).max(initial=0))


def _gap(one: Array, two: Array) -> float:
    """The largest difference, relative to the largest element."""
    return _size(one - two) / max(_size(one), _size(two), 1e-300)
