"""The operations of a rule, as a rule book writes them, and what each does to shapes.

An op (`Stack`, `Concat`, ...) is written in the Linen -> nnx order and knows both directions.
Planned for one direction, for arrays of given shapes and for the number of parts on the other side,
it becomes an action (`actions.py`), which is all that the converter sees.

A Linen model has two layers with a query and a key kernel each, four leaves. Its nnx twin has one
array of all four: query and key fused along the last axis, the layers stacked on a new first one.

    - linen: ["params/l_{i}/q", "params/l_{i}/k"]         four of (4, 3)
      nnx: layers/qk                                      one of (2, 4, 6)
      ops: [{op: concat, axis: -1}, {op: stack, capture: i, axis: 0}]

While the rule is planned, its arrays form a `SpecGrid` over coordinates. `part` is the pattern of
the list that a leaf matches, `i` its layer:

              i = 0    i = 1
    part = 0  l_0/q    l_1/q          listed row by row: l_0/q, l_1/q, l_0/k, l_1/k
    part = 1  l_0/k    l_1/k

Going to nnx, each op becomes a gather, which joins the arrays along one coordinate:

    >>> grid = SpecGrid({PART: 2, "i": 2}, (Spec((4, 3), "float32"),) * 4)
    >>> gather, grid = Concat(axis=-1).plan(grid, to="nnx", parts=1)
    >>> gather.groups(["l_0/q", "l_1/q", "l_0/k", "l_1/k"])
    [['l_0/q', 'l_0/k'], ['l_1/q', 'l_1/k']]
    >>> grid.coords, [str(spec) for spec in grid.specs]
    ({'i': 2}, ['float32[4,6]', 'float32[4,6]'])
    >>> gather, grid = Stack("i", axis=0).plan(grid, to="nnx", parts=1)
    >>> grid.coords, [str(spec) for spec in grid.specs]
    ({}, ['float32[2,4,6]'])

Going back, the ops are planned in reverse. Each becomes a spread, which cuts every array and adds a
coordinate at the end, so that the four leaves come out layer by layer:

    >>> spread, grid = Stack("i", axis=0).plan(grid, to="linen", parts=2)
    >>> spread, grid = Concat(axis=-1).plan(grid, to="linen", parts=2)
    >>> grid.coords, spread
    ({'i': 2, 'part': 2}, Spread(kind='concat', axis=1, sizes=(3, 3)))

Nothing here casts, and nothing here imports jax.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from linen_nnx.book.actions import (
    Action,
    Agree,
    Copies,
    Filling,
    Gather,
    Multiply,
    Permute,
    Reform,
    Spread,
)
from linen_nnx.book.specs import PART, Mismatch, Side, Spec, SpecGrid


@dataclass(frozen=True)
class Stack:
    """`{op: stack, capture: i, axis: 0}`: the side without `{i}` holds all `i` on one axis."""

    capture: str
    axis: int

    def plan(self, grid: SpecGrid, to: Side, parts: int) -> tuple[Action, SpecGrid]:
        # Either side may be the stacked one: the leaves at hand have the capture, or lack it.
        return self._gather(grid) if self.capture in grid.coords else self._spread(grid)

    def _gather(self, grid: SpecGrid) -> tuple[Action, SpecGrid]:
        # A negative axis counts in the result, which has one more.
        axis = _axis(self.axis, len(grid.specs[0].shape) + 1)
        gather, coords = _gather("stack", axis, grid, self.capture)
        what = f"the arrays that `{{{self.capture}}}` counts"
        stacked = []
        for group in gather.groups(grid.specs):
            layer = _common(group, what)
            stacked.append(_resized(layer, axis, (gather.count,)))
        return gather, SpecGrid(coords, tuple(stacked))

    def _spread(self, grid: SpecGrid) -> tuple[Action, SpecGrid]:
        axis = _common_axis(self.axis, grid)
        counts = {spec.shape[axis] for spec in grid.specs}
        # Leaves of one rule stand in one grid, so all have as many layers. None at all would leave
        # the rule without a leaf to write.
        if len(counts) > 1 or counts == {0}:
            raise Mismatch(f"axis {axis} of {_listed(grid.specs)} must hold equally many layers")
        count = counts.pop()
        layers: list[Spec] = []
        for spec in grid.specs:
            layers += [_resized(spec, axis, (), drop=1)] * count
        coords = {**grid.coords, self.capture: count}
        return Spread("stack", axis, (1,) * count), SpecGrid(coords, tuple(layers))


@dataclass(frozen=True)
class Concat:
    """`{op: concat, axis: -1, sizes: [...]}`: the side that is no list holds all parts in one.

    Without `sizes` the parts are equal.
    """

    axis: int
    sizes: tuple[int, ...] | None = None

    def plan(self, grid: SpecGrid, to: Side, parts: int) -> tuple[Action, SpecGrid]:
        axis = _common_axis(self.axis, grid)
        if PART in grid.coords:
            gather, coords = _gather("concat", axis, grid, PART)
            fused = [self._joined(group, axis) for group in gather.groups(grid.specs)]
            return gather, SpecGrid(coords, tuple(fused))
        sizes = self._sizes(_common(grid.specs, "the fused arrays"), axis, parts)
        pieces: list[Spec] = []
        for spec in grid.specs:
            pieces += [_resized(spec, axis, (size,), drop=1) for size in sizes]
        return Spread("concat", axis, sizes), SpecGrid({**grid.coords, PART: parts}, tuple(pieces))

    def _sizes(self, fused: Spec, axis: int, parts: int) -> tuple[int, ...]:
        """The lengths of the parts of a fused array along its axis."""
        length = fused.shape[axis]
        sizes = self.sizes or (length // parts,) * parts
        if sum(sizes) != length:
            how = f"sizes {list(sizes)}" if self.sizes else f"{parts} equal parts"
            raise Mismatch(f"axis {axis} of {fused} has length {length}, which is not {how}")
        return sizes

    def _joined(self, group: list[Spec], axis: int) -> Spec:
        """The spec of the parts of one fused array, joined."""
        lengths = [spec.shape[axis] for spec in group]
        shown = f"parts {_listed(group)}"
        _common([_resized(s, axis, (), drop=1) for s in group], f"{shown} without axis {axis}")
        if self.sizes and lengths != list(self.sizes):
            raise Mismatch(f"{shown} have other sizes than {list(self.sizes)}")
        # On the way back nothing would say where to cut.
        if not self.sizes and len(set(lengths)) > 1:
            raise Mismatch(f"{shown} are unequal on axis {axis}: give the op its `sizes`")
        return _resized(group[0], axis, (sum(lengths),), drop=1)


@dataclass(frozen=True)
class Transpose:
    """`{op: transpose, perm: [1, 0]}`: axes of the Linen array in the nnx order."""

    perm: tuple[int, ...]

    def plan(self, grid: SpecGrid, to: Side, parts: int) -> tuple[Action, SpecGrid]:
        perm = self.perm if to == "nnx" else _inverse(self.perm)
        specs = [_turned(spec, perm) for spec in grid.specs]
        return Permute(perm), SpecGrid(grid.coords, tuple(specs))


@dataclass(frozen=True)
class Reshape:
    """`{op: reshape, linen: [-1, 4, 8], nnx: [-1, 32]}`: shapes; one -1 on each side may vary."""

    linen: tuple[int, ...]
    nnx: tuple[int, ...]

    def plan(self, grid: SpecGrid, to: Side, parts: int) -> tuple[Action, SpecGrid]:
        old, new = (self.linen, self.nnx) if to == "nnx" else (self.nnx, self.linen)
        specs = [self._reshaped(spec, old, new) for spec in grid.specs]
        return Reform(tuple(spec.shape for spec in specs)), SpecGrid(grid.coords, tuple(specs))

    @staticmethod
    def _reshaped(spec: Spec, old: Sequence[int], new: Sequence[int]) -> Spec:
        # The length that -1 stands for follows from the number of elements.
        known = math.prod([size for size in new if size != -1])
        free = spec.size // known if -1 in new and known else 1
        if not _is_shape(spec.shape, old) or known * free != spec.size:
            raise Mismatch(f"{spec} cannot be reshaped from {list(old)} to {list(new)}")
        return Spec(tuple([free if size == -1 else size for size in new]), spec.dtype)


@dataclass(frozen=True)
class Scale:
    """`{op: scale, factor: 0.5}`: nnx value = factor x Linen value. Changes values."""

    factor: float

    def plan(self, grid: SpecGrid, to: Side, parts: int) -> tuple[Action, SpecGrid]:
        for spec in grid.specs:
            if not str(spec.dtype).startswith(("float", "bfloat", "complex")):
                raise Mismatch(f"{spec} cannot be scaled: its dtype holds no fractions")
        # Dividing is not multiplying by the inverse, of which a third, say, has no exact value.
        return Multiply(self.factor, divide=to == "linen"), grid


@dataclass(frozen=True)
class Copy:
    """`{op: copy}`: a leaf with several homes on the side that is a list; all equal.

    perms: for each home the axes of the one leaf in its order, `null` where they are as they are:
      `{op: copy, perms: [null, [1, 0]]}` for an embedding, and its transpose as a head's kernel.
    """

    perms: tuple[tuple[int, ...] | None, ...] | None = None

    def plan(self, grid: SpecGrid, to: Side, parts: int) -> tuple[Action, SpecGrid]:
        # From the homes to the one leaf, or from the one leaf to its homes.
        return self._join(grid) if PART in grid.coords else self._spread(grid, parts)

    def _join(self, grid: SpecGrid) -> tuple[Action, SpecGrid]:
        gather, coords = _gather("stack", 0, grid, PART)
        perms = self.perms or (None,) * gather.count
        back = tuple([None if perm is None else _inverse(perm) for perm in perms])
        agree = Agree(back, gather.inner)
        specs = []
        for group in agree.groups(grid.specs):
            turned = [_turned(spec, perm) for spec, perm in zip(group, back, strict=True)]
            specs.append(_common(turned, "the copies"))
        return agree, SpecGrid(coords, tuple(specs))

    def _spread(self, grid: SpecGrid, parts: int) -> tuple[Action, SpecGrid]:
        perms = self.perms or (None,) * parts
        specs: list[Spec] = []
        for spec in grid.specs:
            specs += [_turned(spec, perm) for perm in perms]
        return Copies(perms), SpecGrid({**grid.coords, PART: parts}, tuple(specs))


@dataclass(frozen=True)
class Drop:
    """`{op: drop}`: the leaf has no home on the other side, and that is meant."""


@dataclass(frozen=True)
class Init:
    """`{op: init, fill: normal, stddev: 0.02, seed: 0}`: a leaf that only one side has.

    Filled on the way there, dropped on the way back. Shape and dtype come from the target tree,
    or from `shape` and `dtype` where none is given. `{op: init, fill: constructor, shape: [4, 2],
    dtype: float32, data: ...}` holds the numbers that the model's own constructor gives the leaf:
    `packed` bytes, row by row, the lowest byte of each number first. `collection` says what a leaf
    of nnx is, if it is no parameter: then no optimizer keeps anything of it.
    """

    fill: Filling
    stddev: float = 1.0
    seed: int = 0
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    data: str | None = None
    collection: str | None = None

    @property
    def spec(self) -> Spec | None:
        """The spec that the rule itself states, if it does."""
        if self.shape is None:
            return None
        import ml_dtypes  # noqa: F401
        import numpy as np

        return Spec(self.shape, np.dtype(self.dtype))


Op = Stack | Concat | Transpose | Reshape | Scale | Copy | Drop | Init


def _inverse(perm: tuple[int, ...]) -> tuple[int, ...]:
    """The transposition that undoes another.

    Example:
      >>> _inverse((2, 0, 1))
      (1, 2, 0)
    """
    return tuple([perm.index(axis) for axis in range(len(perm))])


def _turned(spec: Spec, perm: tuple[int, ...] | None) -> Spec:
    if perm is None:
        return spec
    if len(perm) != len(spec.shape):
        raise Mismatch(f"{spec} has {len(spec.shape)} axes, perm {list(perm)} {len(perm)}")
    return Spec(tuple([spec.shape[axis] for axis in perm]), spec.dtype)


def _is_shape(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    """Whether a shape is the one that a rule is for, in which -1 stands for any length."""
    # numpy would reshape any array of as many elements.
    if len(shape) != len(wanted):
        return False
    return all(want in (-1, have) for want, have in zip(wanted, shape, strict=True))


def _axis(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise Mismatch(f"axis {axis} is out of range for {ndim} axes")
    return axis % ndim


def _gather(
    kind: Literal["stack", "concat"], axis: int, grid: SpecGrid, coord: str
) -> tuple[Gather, dict[str, int]]:
    """The gather that removes a coordinate, and the coordinates that are left."""
    # From this coordinate on: what follows it varies faster, and lies between its members.
    sizes = list(grid.coords.values())[list(grid.coords).index(coord) :]
    left = {name: size for name, size in grid.coords.items() if name != coord}
    return Gather(kind, axis, sizes[0], math.prod(sizes[1:])), left


def _resized(spec: Spec, axis: int, sizes: tuple[int, ...], drop: int = 0) -> Spec:
    """`spec` with `drop` axes at `axis` replaced by axes of `sizes`."""
    return Spec((*spec.shape[:axis], *sizes, *spec.shape[axis + drop :]), spec.dtype)


def _common(specs: Sequence[Spec], what: str) -> Spec:
    """The one spec of all."""
    if any(not spec.same(specs[0]) for spec in specs):
        raise Mismatch(f"{what} must be equal in shape and dtype, got {_listed(specs)}")
    return specs[0]


def _common_axis(axis: int, grid: SpecGrid) -> int:
    """An axis counted from the front, which has to be the same of all arrays."""
    if len({len(spec.shape) for spec in grid.specs}) > 1:
        raise Mismatch(f"{_listed(grid.specs)} differ in their number of axes")
    return _axis(axis, len(grid.specs[0].shape))


def _listed(specs: Iterable[Spec]) -> str:
    """Specs for a message, each once."""
    return ", ".join(map(str, dict.fromkeys(specs)))
