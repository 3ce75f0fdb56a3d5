"""Tells from two gradients which element of one array is which element of another.

The gradient of an element is its name, as far as it is no other's:

    of a Linen leaf          of an nnx leaf
    [[.5 .6]                 [[.5 .7]          by a transpose: element (0, 1) is (1, 0)
     [.7 .8]]                 [.6 .8]]

    >>> linen, nnx = np.array([[0.5, 0.6], [0.7, 0.8]]), np.array([[0.5, 0.7], [0.6, 0.8]])
    >>> list(orders(linen, nnx, 1e-7).values())
    [(Transpose(perm=(1, 0)),)]
    >>> positions(nnx[0], *table(linen))          # where in `linen` the elements .5 and .7 are
    array([0, 2])
"""

import itertools
from collections.abc import Iterator

import numpy as np

from linen_nnx.book.ops import Op, Reshape, Transpose
from linen_nnx.book.rules import RuleBook
from linen_nnx.infer.found import rule_of

Array = np.ndarray
Ops = tuple[Op, ...]
Shape = tuple[int, ...]
EQUAL = 1e-7  # relative to a leaf's largest gradient
_MOST_AXES = 4  # of arrays whose every order of axes is tried: 24 orders


def size(array: Array) -> float:
    """The size of the largest element; 0 for an empty array."""
    return float(np.abs(array).max(initial=0))


def gap(one: Array, two: Array) -> float:
    """The largest difference of two arrays, relative to the largest element.

    Example:
        >>> gap(np.array([1.0, 4.0]), np.array([1.0, 5.0]))
        0.2
    """
    return size(one - two) / max(size(one), size(two), 1e-300)


def even_axes(slope: Array) -> frozenset[int]:
    """The axes along which a gradient is one number.

    Along these the order of the elements shows in no gradient.

    Example:
        >>> even_axes(np.array([[1.0, 2.0], [1.0, 2.0]]))
        frozenset({0})
    """
    near = EQUAL * size(slope)
    axes = range(slope.ndim)
    return frozenset(a for a in axes if slope.shape[a] > 1 and np.ptp(slope, axis=a).max() <= near)


# Whole arrays


def orders(before: Array, after: Array, near: float) -> dict[bytes, Ops]:
    """The orders in which the elements of one array are those of another, and ops for each.

    Two orders where the gradients are symmetric: `[[.1 .2] [.2 .4]]` and its transpose are equal.

    Args:
      before: the gradient of a Linen leaf.
      after: the gradient of an nnx leaf with as many elements.
      near: the largest `gap` of equal gradients.

    Returns:
      the ops, by the order in bytes; the plainest ops for each. Orders that walk over factors of an
      axis are listed only where no other one fits.
    """
    plain = _fitting(before, after, near, _ways_to_move(before.shape, after.shape))
    if plain or before.ndim > 2:
        return plain
    return _fitting(before, after, near, _ways_to_walk(before.shape, after.shape))


def _fitting(before: Array, after: Array, near: float, ways: Iterator[Ops]) -> dict[bytes, Ops]:
    """The ways that move one array into the other, by the order in bytes."""
    found: dict[bytes, Ops] = {}
    numbers = np.arange(before.size).reshape(before.shape)
    for ops in ways:
        book = RuleBook([rule_of(["linen"], ["nnx"], ops)])
        moved = book.to_nnx({"linen": before})["nnx"]
        if gap(moved, after) <= near:
            # Axes of length 1 move without moving an element: that is no other order.
            order = book.to_nnx({"linen": numbers})["nnx"].tobytes()
            found.setdefault(order, ops)
    return found


def _ways_to_move(before: Shape, after: Shape) -> Iterator[Ops]:
    """Ways to move the elements of one shape into another, the plainest first.

    As they stand; with axes turned, then reshaped; reshaped, then turned.
    """
    if before == after:
        yield ()
    else:
        yield (Reshape(before, after),)
    if max(len(before), len(after)) > _MOST_AXES:
        return
    as_they_stand = tuple(range(len(before)))
    for perm in itertools.permutations(as_they_stand):
        turned = tuple(before[axis] for axis in perm)
        if perm == as_they_stand:
            continue
        if turned == after:
            yield (Transpose(perm),)
        else:
            yield (Transpose(perm), Reshape(turned, after))
    if before == after:
        return
    as_they_stand = tuple(range(len(after)))
    for perm in itertools.permutations(as_they_stand):
        start = tuple(after[perm.index(axis)] for axis in as_they_stand)
        if perm != as_they_stand and start != before:
            yield (Reshape(before, start), Transpose(perm))


def _ways_to_walk(before: Shape, after: Shape) -> Iterator[Ops]:
    """Ways in which two factors of one axis change places, as a flattened image has them.

    The input of a dense layer, 24 channels and pixels: 4 pixels of 6 channels each in Linen, 6
    channels of 4 pixels each in the port of a model that had channels first.

    Example:
        >>> next(_ways_to_walk((4, 3), (4, 3)))[1]
        Transpose(perm=(1, 0, 2))
    """
    axes = range(len(before))
    for axis, perm in itertools.product(axes, itertools.permutations(axes)):
        if tuple(before[each] for each in perm) != after:
            continue
        # (24, 3) as (4, 6, 3): the axis has two places, all behind it move on by one.
        swapped: list[int] = []
        for each in perm:
            swapped += [axis + 1, axis] if each == axis else [each + (each > axis)]
        for outer in range(2, before[axis]):
            inner, rest = divmod(before[axis], outer)
            if rest == 0:
                split = (*before[:axis], outer, inner, *before[axis + 1 :])
                turned = tuple(split[place] for place in swapped)
                yield Reshape(before, split), Transpose(tuple(swapped)), Reshape(turned, after)


def turns(home: Shape, whole: Shape) -> list[tuple[int, ...] | None]:
    """The orders of axes in which an array of shape `home` may hold one of shape `whole`.

    None stands for axes as they are.

    Example:
        >>> turns((2, 3), (3, 2)), turns((2, 2), (2, 2))
        ([(1, 0)], [None, (1, 0)])
    """
    as_they_stand = tuple(range(len(whole)))
    found: list[tuple[int, ...] | None] = [None] if home == whole else []
    for perm in itertools.permutations(as_they_stand):
        turned = tuple(whole[axis] for axis in perm)
        if turned == home and perm != as_they_stand:
            found.append(perm)
    return found


def turned_back(array: Array, perm: tuple[int, ...] | None) -> Array:
    """An array whose axes were turned by `perm`, with its axes as they were."""
    return array if perm is None else array.transpose(np.argsort(perm))


# Parts of an array


def table(whole: Array) -> tuple[Array, Array, float]:
    """The table in which `positions` looks elements up.

    Returns:
      the sorted elements, the place of each in the array, and by how much equal ones may differ.
    """
    order = np.argsort(whole, axis=None)
    return whole.ravel()[order], order, EQUAL * float(np.abs(whole).max())


def positions(part: Array, values: Array, order: Array, near: float) -> Array | None:
    """Which element of a whole each element of a part is; the rest is the `table` of the whole.

    Returns:
      flat positions in the shape of the part, -1 where several elements have its value. None if
      some element of the part is nowhere in the whole.
    """
    # Two binary searches: between them stand the elements that are equal but for rounding.
    low = np.searchsorted(values, part.ravel() - near, side="left")
    high = np.searchsorted(values, part.ravel() + near, side="right")
    if (low == high).any():
        return None
    is_alone = high - low == 1
    at = order[np.minimum(low, len(order) - 1)]
    return np.where(is_alone, at, -1).reshape(part.shape)
