"""Finds the rule that leads from some Linen leaves to some nnx leaves, element by element.

Pairs of slots tell which element of a Linen leaf is which element of an nnx leaf. So both sides of
a group of leaves can be written with the same numbers, and the question is which ops of a rule turn
the left into the right:

    Linen                                     nnx                           ops
    params/down/kernel [[0 1]                 last     [[0 2]               transpose
                        [2 3]]                          [1 3]]
    params/q [[0 1]    params/k [[4 5]        qk       [[0 1 4 5]           concat
              [2 3]]             [6 7]]                 [2 3 6 7]]
    params/w [[0 1]                           l/0/w    [0 1]                stack: `l/{i}/w` is
              [2 3]]                          l/1/w    [2 3]                params/w[i]

    >>> down, last = np.array([[0, 1], [2, 3]]), np.array([[0, 2], [1, 3]])
    >>> rule_for(Group({"params/down/kernel": down}, {"last": last})).ops
    (Transpose(perm=(1, 0)),)
    >>> stacked = rule_for(Group({"params/w": down}, {"l/0/w": down[0], "l/1/w": down[1]}))
    >>> print(stacked, stacked.ops)
    `params/w` <-> `l/{i}/w` (Stack(capture='i', axis=0),)

Candidates are made from the plainest to the most involved: stacks are taken off first, then parts
are joined, then single arrays are moved. No candidate needs to be right. Each is run on the numbers
themselves, and the first whose result has every number where it belongs is the rule.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from linen_nnx.book.grammar import Rule
from linen_nnx.book.ops import Concat, Op, Reshape, Stack, Transpose
from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.infer.found import rule_of

Array = np.ndarray
Leaves = Mapping[str, Array]
Ops = tuple[Op, ...]
_LETTERS = "ijklmn"
_TRIED = 1000  # combinations of ways to move several parts


class Group(NamedTuple):
    """Leaves of both sides that share elements: `{path: array of element numbers}`.

    Numbers are those of the Linen side, on both sides; -1 in nnx leaves where no use tells.
    """

    linen: dict[str, Array]
    nnx: dict[str, Array]


class _Draft(NamedTuple):
    """A rule in the making: patterns of both sides, and ops in the Linen -> nnx order."""

    linen: list[str]
    nnx: list[str]
    ops: Ops


def rule_for(group: Group) -> Rule | None:
    """The rule that translates a group, if the grammar has one; examples are above."""
    for draft in _drafts(group, 0):
        try:
            rule = rule_of(draft.linen, draft.nnx, draft.ops)
            got = RuleBook([rule]).to_nnx(group.linen)
        except (ValueError, RuleError):  # a draft whose shapes do not fit: no rule
            continue
        if _is_due(got, group.nnx):
            return rule
    return None


def _is_due(got: Leaves, due: Leaves) -> bool:
    """Whether a draft put every number where it belongs; anything fits an unknown place."""
    if set(got) != set(due):
        return False
    for path, numbers in due.items():
        if got[path].shape != numbers.shape:
            return False
        if not ((got[path] == numbers) | (numbers < 0)).all():
            return False
    return True


def _drafts(group: Group, depth: int) -> Iterator[_Draft]:
    """Candidates, the plainest first; `depth` counts the stacks that were taken off."""
    if len(group.nnx) > 1:
        for op, slices, first in _stacks(group.linen, group.nnx, depth):
            for draft in _drafts(Group(slices, first), depth + 1):
                yield draft._replace(ops=(op, *draft.ops))
    if len(group.linen) > 1:
        for op, slices, first in _stacks(group.nnx, group.linen, depth):
            for draft in _drafts(Group(first, slices), depth + 1):
                yield draft._replace(ops=(*draft.ops, op))
    # Many against many is for stacks alone: no other op joins and parts at once.
    if len(group.nnx) == 1:
        ((path, whole),) = group.nnx.items()
        for order, ops in _chains(group.linen, whole):
            yield _Draft(order, [path], ops)
    elif len(group.linen) == 1:
        ((path, whole),) = group.linen.items()
        for order, ops in _chains(group.nnx, whole):
            yield _Draft([path], order, tuple(_turned(op) for op in reversed(ops)))


# Stacks


def _stacks(
    one: Leaves, many: Leaves, depth: int
) -> Iterator[tuple[Stack, dict[str, Array], dict[str, Array]]]:
    """Ways to read `many` as a list that is indexed by an axis of `one`.

    Yields the op, entry 0 of every leaf of `one`, and the leaves of `many` that are entry 0 of
    their list, by pattern. What leads from these to those is left to be found.
    """
    letter = _LETTERS[depth % len(_LETTERS)]
    for lists in _lists(many, letter):
        count = len(next(iter(lists.values())))
        first = {pattern: many[paths[0]] for pattern, paths in lists.items()}
        wanted = _all_numbers(first)
        for axis in range(min(array.ndim for array in one.values())):
            if any(array.shape[axis] != count for array in one.values()):
                continue
            slices = {path: array.take(0, axis) for path, array in one.items()}
            # Square arrays fit along every axis. One that shares no element is not even tried.
            if np.isin(wanted[wanted >= 0], _all_numbers(slices)).any():
                yield Stack(letter, axis), slices, first


def _all_numbers(leaves: Leaves) -> Array:
    return np.concatenate([array.ravel() for array in leaves.values()])


def _lists(leaves: Leaves, letter: str) -> Iterator[dict[str, list[str]]]:
    """Ways to read one integer of every path as an index 0..n-1: {pattern: paths by index}.

    Example:
        >>> paths = dict.fromkeys(["l/0/w", "l/1/w"], np.zeros(1))
        >>> list(_lists(paths, "i"))
        [{'l/{i}/w': ['l/0/w', 'l/1/w']}]
    """
    spans: dict[str, list[tuple[int, int]]] = {}
    for path in leaves:
        spans[path] = [found.span() for found in re.finditer(r"\d+", path)]
    for place in range(min(map(len, spans.values()))):
        lists: dict[str, dict[int, str]] = {}
        for path, each in spans.items():
            low, high = each[place]
            pattern = f"{path[:low]}{{{letter}}}{path[high:]}"
            lists.setdefault(pattern, {})[int(path[low:high])] = path
        count = len(leaves) // len(lists)
        whole = set(range(count))
        if count > 1 and all(paths.keys() == whole for paths in lists.values()):
            # By index, and not in the order of paths: "10" sorts before "2".
            yield {pattern: [paths[k] for k in range(count)] for pattern, paths in lists.items()}


# Parts


def _chains(parts: Leaves, whole: Array) -> Iterator[tuple[list[str], Ops]]:
    """Ways to make `whole` of `parts`: their order, and the ops in the order parts -> whole."""
    names = list(parts)
    if len(names) == 1:
        for ops in _moves(parts[names[0]], whole):
            yield names, ops
        return
    owner = np.full(whole.shape, -1)
    for number, path in enumerate(names):
        owner[np.isin(whole, parts[path][parts[path] >= 0])] = number
    # One part of which nothing is known: it is all that belongs to no other.
    dark = [number for number in range(len(names)) if not (owner == number).any()]
    if len(dark) == 1 and (owner < 0).sum() == parts[names[dark[0]]].size:
        owner[owner < 0] = dark[0]
    # Parts along an axis: each slice across it belongs to one part.
    for axis in range(whole.ndim):
        slices = np.moveaxis(owner, axis, 0).reshape(whole.shape[axis], -1)
        most = slices.max(axis=1, keepdims=True)
        if not ((slices == most) | (slices < 0)).all():
            continue
        owners = _completed(most[:, 0], [parts[path].size for path in names], whole.size)
        if owners is not None:
            yield from _joined(parts, names, whole, owners, axis)
    if (owner < 0).any():
        return
    # Parts that take turns within an axis: heads of queries, keys and values in one kernel stand
    # as q0 k0 v0 q1 k1 v1. One period is as long as the first run of every part.
    flat = owner.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    period = int(ends[len(names) - 1]) if len(ends) >= len(names) else flat.size
    if flat.size % period or not (flat.reshape(-1, period) == flat[:period]).all():
        return
    befores: list[tuple[int, ...]] = [(-1,)]
    lead = parts[names[0]].shape[:-1]
    if np.prod(lead) * period == flat.size:
        befores.insert(0, lead)  # the parts stay as they are, if that will do
    for before in befores:
        shaped = whole.reshape(*before, period)
        for order, ops in _joined(parts, names, shaped, flat[:period], len(before)):
            yield order, (*ops, *_reshape(shaped, whole))


def _completed(owners: Array, sizes: Sequence[int], total: int) -> Array | None:
    """The part that each slice belongs to, where that is known of some slices alone.

    Args:
      owners: for each slice the number of its part, -1 where that is not known.
      sizes: the number of elements of each part.
      total: the number of elements of all slices.

    Returns:
      The parts in the order of their first known slices, each as many slices as it has elements;
      None where that contradicts what is known.

    Example:
        >>> _completed(np.array([0, -1, -1, 1, -1]), [3, 2], 5)
        array([0, 0, 0, 1, 1])
    """
    order = list(dict.fromkeys(owners[owners >= 0].tolist()))
    if len(order) != len(sizes) or sum(sizes) != total:
        return None
    counts = [sizes[number] * len(owners) // total for number in order]
    completed = np.repeat(order, counts)
    if completed.size != owners.size or (completed != owners)[owners >= 0].any():
        return None
    return completed


def _joined(
    parts: Leaves, names: list[str], whole: Array, owners: Array, axis: int
) -> Iterator[tuple[list[str], Ops]]:
    """Ways to concatenate parts, moved alike, along an axis of `whole`.

    Args:
      owners: for each index of the axis the number of the part that it belongs to.
    """
    order: list[str] = []
    sizes: tuple[int, ...] = ()
    for number, run in itertools.groupby(owners):
        order.append(names[int(number)])
        sizes = (*sizes, len(list(run)))
    if len(order) != len(names):
        return
    cuts = np.split(whole, np.cumsum(sizes)[:-1], axis=axis)
    moves = [list(_moves(parts[path], cut)) for path, cut in zip(order, cuts, strict=True)]
    concat = Concat(axis - whole.ndim, None if len(set(sizes)) == 1 else sizes)
    for ways in itertools.islice(itertools.product(*moves), _TRIED):
        # A rule has one list of ops for all its parts.
        ops = ways[0] if len(set(ways)) == 1 else _common(ways)
        if ops is not None:
            yield order, (*ops, concat)


def _common(ways: Sequence[Ops]) -> Ops | None:
    """One reshape for parts of unequal length, with -1 where they differ.

    Heads of queries and of fewer keys: (8, 4, 2) -> (8, 8) and (8, 2, 2) -> (8, 4) are both
    (8, -1, 2) -> (8, -1).
    """
    reshapes: list[Reshape] = []
    for ops in ways:
        if len(ops) != 1 or not isinstance(ops[0], Reshape):
            return None
        reshapes.append(ops[0])
    linen = _common_shape([op.linen for op in reshapes])
    nnx = _common_shape([op.nnx for op in reshapes])
    return None if linen is None or nnx is None else (Reshape(linen, nnx),)


def _common_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...] | None:
    """The shapes as one, with -1 for the one axis in which they differ.

    Example:
        >>> _common_shape([(8, 4, 2), (8, 2, 2)])
        (8, -1, 2)
    """
    if len(set(map(len, shapes))) > 1:
        return None
    common: list[int] = []
    for sizes in zip(*shapes, strict=True):
        common.append(sizes[0] if len(set(sizes)) == 1 else -1)
    return tuple(common) if common.count(-1) == 1 else None


# Single arrays


def _moves(part: Array, whole: Array) -> Iterator[Ops]:
    """Ways to move the elements of one array to their places in another of the same size."""
    if part.size != whole.size:
        return
    yield _reshape(part, whole)
    if part.ndim == whole.ndim:
        as_they_stand = tuple(range(part.ndim))
        for perm in itertools.permutations(as_they_stand):
            if perm != as_they_stand and part.transpose(perm).shape == whole.shape:
                yield (Transpose(perm),)
    if part.size > 1 and (whole >= 0).all() and (part >= 0).all():
        yield from _factored(part, whole)


def _factored(part: Array, whole: Array) -> Iterator[Ops]:
    """Reshape, transpose, reshape: for orders that walk over factors of the axes.

    Two heads of two columns, in a kernel (2, 4) and in an array (2 heads, 2 rows, 2 columns):

        part  [[0 1 2 3]     whole  [[[0 1] [4 5]]     places of the whole's elements in the part:
               [4 5 6 7]]            [[2 3] [6 7]]]    0 1 4 5 2 3 6 7

    The places are counted up like the digits of a clock, the innermost fastest: 2 steps of 1, then
    2 of 4, then 2 of 2. With the steps sorted, 4 2 1, that is a reshape to (2, 2, 2), whose axes
    are then turned to the order 2 4 1.

        >>> part, whole = np.arange(8).reshape(2, 4), np.array([[[0, 1], [4, 5]], [[2, 3], [6, 7]]])
        >>> next(_factored(part, whole))[1]
        Transpose(perm=(1, 0, 2))
    """
    sorted_to_place = np.argsort(part.ravel())
    ranks = np.searchsorted(part.ravel(), whole.ravel(), sorter=sorted_to_place) % part.size
    places = sorted_to_place[ranks]
    if not (part.ravel()[places] == whole.ravel()).all():
        return
    digits: list[tuple[int, int]] = []  # (steps, step), the innermost last
    while places.size > 1:
        step = int(places[1] - places[0])
        uneven = np.flatnonzero(np.diff(places) != step)
        steps = int(uneven[0]) + 1 if uneven.size else places.size
        if step < 1 or places.size % steps:
            return
        digits.insert(0, (steps, step))
        places = places[::steps]
    by_step = sorted(range(len(digits)), key=lambda k: -digits[k][1])
    split = part.reshape([digits[k][0] for k in by_step])
    perm = tuple(by_step.index(k) for k in range(len(digits)))
    yield (*_reshape(part, split), Transpose(perm), *_reshape(split.transpose(perm), whole))


def _reshape(before: Array, after: Array) -> Ops:
    """The reshape from one array to another, where there is one to do."""
    return () if before.shape == after.shape else (Reshape(before.shape, after.shape),)


def _turned(op: Op) -> Op:
    """The op that goes back."""
    if isinstance(op, Transpose):
        return Transpose(tuple(np.argsort(op.perm).tolist()))
    return Reshape(op.nnx, op.linen) if isinstance(op, Reshape) else op
