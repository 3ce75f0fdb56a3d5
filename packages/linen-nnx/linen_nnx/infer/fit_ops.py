"""From elements that belong together to the rule that says so.

Pairs of slots tell which element of a Linen leaf is which element of an nnx leaf. For each group of
leaves that share elements a rule is found whose ops put every element where it belongs: rename,
transpose, reshape, concat, stack, or several of them. A rule is kept only if running it on the
element numbers themselves gives exactly the numbers expected.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from linen_nnx.book.grammar import Rule
from linen_nnx.book.ops import Concat, Op, Reshape, Stack, Transpose
from linen_nnx.book.patterns import Pattern
from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook

Array = np.ndarray
Ops = tuple[Op, ...]
_LETTERS = "ijklmn"


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
    """The rule that translates a group, if the grammar has one."""
    for draft in _drafts(group, 0):
        try:
            rule = Rule(tuple(map(Pattern, draft.linen)), tuple(map(Pattern, draft.nnx)), draft.ops)
            got = RuleBook([rule]).to_nnx(group.linen)
        except (ValueError, RuleError):
            continue
        if set(got) == set(group.nnx) and all(
            got[path].shape == due.shape and ((got[path] == due) | (due < 0)).all()
            for path, due in group.nnx.items()
        ):
            return rule
    return None


def _drafts(group: Group, depth: int) -> Iterator[_Draft]:
    """Candidates, the plainest first; not all of them are right."""
    if len(group.nnx) > 1:
        for ops, inner in _stacks(group.linen, group.nnx, depth):
            for draft in _drafts(Group(*inner), depth + 1):
                yield draft._replace(ops=(*ops, *draft.ops))
    if len(group.linen) > 1:
        for ops, (slices, first) in _stacks(group.nnx, group.linen, depth):
            for draft in _drafts(Group(first, slices), depth + 1):
                yield draft._replace(ops=(*draft.ops, *ops))
    if len(group.nnx) == 1:
        (path, whole) = next(iter(group.nnx.items()))
        for order, ops in _chains(group.linen, whole):
            yield _Draft(order, [path], ops)
    elif len(group.linen) == 1:
        (path, whole) = next(iter(group.linen.items()))
        for order, ops in _chains(group.nnx, whole):
            yield _Draft([path], order, tuple(_turned(op) for op in reversed(ops)))


def _stacks(
    one: Mapping[str, Array], many: Mapping[str, Array], depth: int
) -> Iterator[tuple[Ops, tuple[dict[str, Array], dict[str, Array]]]]:
    """Ways to read `many` as a list indexed by an axis of `one`: the op, and entry 0 of both."""
    letter = _LETTERS[depth % len(_LETTERS)]
    for lists in _listed(many, letter):
        count = len(next(iter(lists.values())))
        first = {pattern: many[paths[0]] for pattern, paths in lists.items()}
        wanted = np.concatenate([array.ravel() for array in first.values()])
        for axis in range(min(array.ndim for array in one.values())):
            if all(array.shape[axis] == count for array in one.values()):
                slices = {path: array.take(0, axis) for path, array in one.items()}
                given = np.concatenate([array.ravel() for array in slices.values()])
                if np.isin(wanted[wanted >= 0], given).any():
                    yield (Stack(letter, axis),), (slices, first)


def _listed(leaves: Mapping[str, Array], letter: str) -> Iterator[dict[str, list[str]]]:
    """Ways to read one integer of every path as an index 0..n-1: {pattern: paths by index}."""
    spans = {path: [found.span() for found in re.finditer(r"\d+", path)] for path in leaves}
    for place in range(min(len(each) for each in spans.values())):
        lists: dict[str, dict[int, str]] = {}
        for path, each in spans.items():
            low, high = each[place]
            pattern = f"{path[:low]}{{{letter}}}{path[high:]}"
            lists.setdefault(pattern, {})[int(path[low:high])] = path
        count = len(leaves) // len(lists)
        if count > 1 and all(set(paths) == set(range(count)) for paths in lists.values()):
            yield {p: [paths[k] for k in range(count)] for p, paths in lists.items()}


def _chains(parts: Mapping[str, Array], whole: Array) -> Iterator[tuple[list[str], Ops]]:
    """Ways to make `whole` of `parts`: their order, and the ops in the order parts -> whole."""
    names = list(parts)
    if len(names) == 1:
        for ops in _moves(parts[names[0]], whole):
            yield names, ops
        return
    owner = np.full(whole.shape, -1)
    for number, path in enumerate(names):
        owner[np.isin(whole, parts[path][parts[path] >= 0])] = number
    for axis in range(whole.ndim):
        lanes = np.moveaxis(owner, axis, 0).reshape(whole.shape[axis], -1)
        most = lanes.max(axis=1, keepdims=True)
        if (most >= 0).all() and ((lanes == most) | (lanes < 0)).all():
            yield from _joined(parts, names, whole, most[:, 0], axis)
    if (owner < 0).any():
        return
    flat = owner.ravel()
    ends = np.flatnonzero(np.diff(flat)) + 1
    width = int(ends[len(names) - 1]) if len(ends) >= len(names) else flat.size
    if flat.size % width == 0 and (flat.reshape(-1, width) == flat[:width]).all():
        lead = parts[names[0]].shape[:-1]  # keep the parts as they are, if that will do
        for before in ([lead] if np.prod(lead) * width == flat.size else []) + [(-1,)]:
            shaped = whole.reshape(*before, width)
            for order, ops in _joined(parts, names, shaped, flat[:width], len(before)):
                yield order, (*ops, *_reshape(shaped, whole))


def _joined(
    parts: Mapping[str, Array], names: list[str], whole: Array, owners: Array, axis: int
) -> Iterator[tuple[list[str], Ops]]:
    """Ways to concatenate parts, moved alike, along an axis of `whole`."""
    runs = [(int(number), len(list(run))) for number, run in itertools.groupby(owners)]
    if len(runs) != len(names):
        return
    sizes = tuple(size for _, size in runs)
    cuts = np.split(whole, np.cumsum(sizes)[:-1], axis=axis)
    order = [names[number] for number, _ in runs]
    moves = [list(_moves(parts[path], cut)) for path, cut in zip(order, cuts, strict=True)]
    concat = Concat(axis - whole.ndim, None if len(set(sizes)) == 1 else sizes)
    for ways in itertools.islice(itertools.product(*moves), 1000):
        ops = ways[0] if len(set(ways)) == 1 else _common(ways)
        if ops is not None:
            yield order, (*ops, concat)


def _common(ways: Sequence[Ops]) -> Ops | None:
    """One reshape for parts of unequal length, with -1 where they differ."""
    if not all(len(ops) == 1 and isinstance(ops[0], Reshape) for ops in ways):
        return None
    shapes = []
    for side in ("linen", "nnx"):
        each = [getattr(ops[0], side) for ops in ways]
        if len(set(map(len, each))) > 1:
            return None
        shape = tuple(sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*each, strict=True))
        if shape.count(-1) != 1:
            return None
        shapes.append(shape)
    return (Reshape(*shapes),)


def _moves(part: Array, whole: Array) -> Iterator[Ops]:
    """Ways to move the elements of one array to their places in another of the same size."""
    if part.size != whole.size:
        return
    yield _reshape(part, whole)
    if part.ndim == whole.ndim:
        for perm in itertools.permutations(range(part.ndim)):
            if part.transpose(perm).shape == whole.shape and perm != tuple(range(part.ndim)):
                yield (Transpose(perm),)
    if part.size > 1 and (whole >= 0).all() and (part >= 0).all():
        yield from _factored(part, whole)


def _factored(part: Array, whole: Array) -> Iterator[Ops]:
    """Reshape, transpose, reshape: for orders that walk over factors of the axes."""
    rank = np.argsort(part.ravel())
    places = np.searchsorted(part.ravel(), whole.ravel(), sorter=rank) % part.size
    index = rank[places]
    if not (part.ravel()[index] == whole.ravel()).all():
        return
    dims: list[tuple[int, int]] = []  # (length, stride in the part), the innermost first
    while index.size > 1:
        step = int(index[1] - index[0])
        uneven = np.flatnonzero(np.diff(index) != step)
        length = int(uneven[0]) + 1 if uneven.size else index.size
        if step < 1 or index.size % length:
            return
        dims.insert(0, (length, step))
        index = index[::length]
    order = sorted(range(len(dims)), key=lambda k: -dims[k][1])
    split = part.reshape([dims[k][0] for k in order])
    perm = tuple(order.index(k) for k in range(len(dims)))
    yield (*_reshape(part, split), Transpose(perm), *_reshape(split.transpose(perm), whole))


def _reshape(before: Array, after: Array) -> Ops:
    return () if before.shape == after.shape else (Reshape(before.shape, after.shape),)


def _turned(op: Op) -> Op:
    """The op that goes back."""
    if isinstance(op, Transpose):
        return Transpose(tuple(int(axis) for axis in np.argsort(op.perm)))
    return Reshape(op.nnx, op.linen) if isinstance(op, Reshape) else op
