"""The operations of a rule: what each does to shapes when planned, and to arrays when run.

An op of a rule book (`Stack`, `Concat`, ...) is written in the Linen -> nnx order and knows both
directions. Planned for one direction, for arrays of given shapes and for the number of parts on the
other side, it becomes an *action* (`Gather`, `Spread`, ...), which is all that the converter sees.

Between ops the arrays of one rule are a `Block`: a row-major grid over coordinates (the part of a
concat, a layer index), held as a flat list. A gather removes one coordinate, a spread adds one at
the end. Nothing here casts; nothing here imports jax: arrays bring their own namespace. Nor is
numpy imported before it is needed, as plain re-keying does without.
"""

import base64
import math
import operator
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from linen_nnx.errors import Refusal

PART = "part"
"""The coordinate of the parts of a concat; too long to collide with an integer capture."""

Side = Literal["linen", "nnx"]


class Mismatch(Refusal):
    """Arrays that an op cannot take; the planner adds the rule and the paths."""


class Spec(NamedTuple):
    """Shape and dtype of one leaf."""

    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def of(cls, leaf: Any) -> "Spec":
        """The spec of anything that has `.shape` and `.dtype`."""
        return cls(tuple(leaf.shape), leaf.dtype)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def same(self, other: "Spec") -> bool:
        """Whether shape and dtype agree, whichever library the dtypes come from."""
        return self.shape == other.shape and str(self.dtype) == str(other.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Block(NamedTuple):
    """Specs in row-major order over named coordinates of given sizes."""

    coords: dict[str, int]
    specs: tuple[Spec, ...]


# Actions: concrete, one direction, run on lists of arrays.


@dataclass(frozen=True)
class Gather:
    """Joins `count` arrays into one, by a new axis (`stack`) or along one (`concat`).

    The list it takes is `(outer, count, inner)` in row-major order; it returns `(outer, inner)`.
    """

    kind: Literal["stack", "concat"]
    axis: int
    count: int
    inner: int

    def groups(self, items: Sequence[Any]) -> list[list[Any]]:
        """The items that go into each result, in order."""
        width = self.count * self.inner
        return [
            list(items[start + column : start + width : self.inner])
            for start in range(0, len(items), width)
            for column in range(self.inner)
        ]

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        space = arrays[0].__array_namespace__()
        join = space.stack if self.kind == "stack" else space.concat
        return [join(group, axis=self.axis) for group in self.groups(arrays)]


@dataclass(frozen=True)
class Spread:
    """Cuts each array along `axis` into pieces of `sizes`; a `stack` loses the axis as well."""

    kind: Literal["stack", "concat"]
    axis: int
    sizes: tuple[int, ...]

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        before = (slice(None),) * self.axis
        pieces = []
        for array in arrays:
            start = 0
            for size in self.sizes:
                cut = start if self.kind == "stack" else slice(start, start + size)
                pieces.append(array[(*before, cut)])
                start += size
        return pieces


@dataclass(frozen=True)
class Permute:
    """Transposes every array."""

    perm: tuple[int, ...]

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        return [a.__array_namespace__().permute_dims(a, self.perm) for a in arrays]


@dataclass(frozen=True)
class Reform:
    """Gives every array the shape listed for it."""

    shapes: tuple[tuple[int, ...], ...]

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        pairs = zip(arrays, self.shapes, strict=True)
        return [a.__array_namespace__().reshape(a, shape) for a, shape in pairs]


@dataclass(frozen=True)
class Multiply:
    """Multiplies (or divides, on the way back) in the arrays' own dtype. Changes values."""

    factor: float
    divide: bool

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        factors = [a.__array_namespace__().asarray(self.factor, dtype=a.dtype) for a in arrays]
        return list(map(operator.truediv if self.divide else operator.mul, arrays, factors))


@dataclass(frozen=True)
class Copies:
    """Gives every array once for each of `perms`, its axes in that order (None: as they are)."""

    perms: tuple[tuple[int, ...] | None, ...]

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        return [_permuted(array, perm) for array in arrays for perm in self.perms]


@dataclass(frozen=True)
class Agree:
    """The way back from `Copies`: one array of several, which must be equal in every bit.

    The list it takes is `(outer, count, inner)` in row-major order; it returns `(outer, inner)`.
    """

    perms: tuple[tuple[int, ...] | None, ...]
    inner: int

    def groups(self, items: Sequence[Any]) -> list[list[Any]]:
        """The items that must be equal, in order."""
        return Gather("stack", 0, len(self.perms), self.inner).groups(items)

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        import numpy as np

        found = []
        for group in self.groups(arrays):
            turned = [_permuted(a, perm) for a, perm in zip(group, self.perms, strict=True)]
            try:
                first, *others = (np.asarray(array) for array in turned)
            except Exception as error:  # of jax, which this module does not import
                raise Mismatch(
                    f"copies cannot be compared while they are traced: {error}"
                ) from None
            different = [k for k, other in enumerate(others, 2) if not _same_bits(first, other)]
            if different:
                shown = ", ".join(f"copy {k}" for k in different)
                raise Mismatch(
                    f"{shown} differs from copy 1 of one leaf ({Spec.of(first)}): only equal "
                    "copies become one. Write a plain rule for the one that is to be kept, and a "
                    "`drop` rule for each other one"
                )
            found.append(turned[0])
        return found


@dataclass(frozen=True)
class Fill:
    """Makes one array from nothing: zeros, ones, normal numbers fixed by seed and path, or data.

    data: the numbers of `constructor`, as `Init` has them.
    """

    fill: "Filling"
    stddev: float
    seed: int
    path: str
    spec: Spec
    data: str | None = None

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        import ml_dtypes  # noqa: F401  (teaches numpy the names bfloat16, float8_*, int4)
        import numpy as np

        if self.fill == "constructor":
            assert self.data is not None
            numbers = np.frombuffer(unpacked(self.data), np.dtype(self.spec.dtype))
            return [numbers.reshape(self.spec.shape)]
        if self.fill != "normal":
            make = np.zeros if self.fill == "zeros" else np.ones
            return [make(self.spec.shape, self.spec.dtype)]
        import hashlib

        digest = hashlib.sha256(self.path.encode()).digest()
        generator = np.random.default_rng([self.seed, *digest])
        numbers = generator.standard_normal(self.spec.shape, np.float32) * np.float32(self.stddev)
        return [np.asarray(numbers).astype(self.spec.dtype)]


@dataclass(frozen=True)
class Cast:
    """Gives integers another dtype that holds them exactly (steps, which differ by framework)."""

    dtype: str

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        import numpy as np

        cast = [np.asarray(array).astype(self.dtype) for array in arrays]
        for old, new in zip(arrays, cast, strict=True):
            if (old != new).any():
                raise Mismatch(f"{self.dtype} cannot hold the value {old}")
        return cast


Action = Gather | Spread | Permute | Reform | Multiply | Copies | Agree | Fill | Cast


# Ops: as written in a rule book, both directions.


@dataclass(frozen=True)
class Stack:
    """`{op: stack, capture: i, axis: 0}`: the side without `{i}` holds all `i` on one axis."""

    capture: str
    axis: int

    def plan(self, block: Block, to: Side, parts: int) -> tuple[Action, Block]:
        if self.capture in block.coords:
            axis = _axis(self.axis, len(block.specs[0].shape) + 1)
            gather, coords = _gather("stack", axis, block, self.capture)
            what = f"the arrays that `{{{self.capture}}}` counts"
            ones = [_common(group, what) for group in gather.groups(block.specs)]
            return gather, Block(coords, tuple(_resized(s, axis, (gather.count,)) for s in ones))
        axis = _common_axis(self.axis, block)
        counts = {spec.shape[axis] for spec in block.specs}
        if len(counts) > 1 or counts == {0}:
            raise Mismatch(f"axis {axis} of {_listed(block.specs)} must hold equally many layers")
        count = counts.pop()
        specs = [_resized(s, axis, (), drop=1) for s in block.specs for _ in range(count)]
        coords = {**block.coords, self.capture: count}
        return Spread("stack", axis, (1,) * count), Block(coords, tuple(specs))


@dataclass(frozen=True)
class Concat:
    """`{op: concat, axis: -1, sizes: [...]}`: the side that is no list holds all parts in one.

    Without `sizes` the parts are equal.
    """

    axis: int
    sizes: tuple[int, ...] | None = None

    def plan(self, block: Block, to: Side, parts: int) -> tuple[Action, Block]:
        axis = _common_axis(self.axis, block)
        if PART in block.coords:
            gather, coords = _gather("concat", axis, block, PART)
            specs = [self._join(group, axis) for group in gather.groups(block.specs)]
            return gather, Block(coords, tuple(specs))
        fused = _common(block.specs, "the fused arrays")
        length = fused.shape[axis]
        sizes = self.sizes or (length // parts,) * parts
        if sum(sizes) != length:
            how = f"sizes {list(sizes)}" if self.sizes else f"{parts} equal parts"
            raise Mismatch(f"axis {axis} of {fused} has length {length}, which is not {how}")
        specs = [_resized(s, axis, (size,), drop=1) for s in block.specs for size in sizes]
        return Spread("concat", axis, sizes), Block({**block.coords, PART: parts}, tuple(specs))

    def _join(self, group: list[Spec], axis: int) -> Spec:
        lengths = [spec.shape[axis] for spec in group]
        shown = f"parts {_listed(group)}"
        _common([_resized(s, axis, (), drop=1) for s in group], f"{shown} without axis {axis}")
        if self.sizes and lengths != list(self.sizes):
            raise Mismatch(f"{shown} have other sizes than {list(self.sizes)}")
        if not self.sizes and len(set(lengths)) > 1:
            raise Mismatch(f"{shown} are unequal on axis {axis}: give the op its `sizes`")
        return _resized(group[0], axis, (sum(lengths),), drop=1)


@dataclass(frozen=True)
class Transpose:
    """`{op: transpose, perm: [1, 0]}`: axes of the Linen array in the nnx order."""

    perm: tuple[int, ...]

    def plan(self, block: Block, to: Side, parts: int) -> tuple[Action, Block]:
        perm = self.perm if to == "nnx" else _inverse(self.perm)
        specs = [_turned(spec, perm) for spec in block.specs]
        return Permute(perm), Block(block.coords, tuple(specs))


@dataclass(frozen=True)
class Reshape:
    """`{op: reshape, linen: [-1, 4, 8], nnx: [-1, 32]}`: shapes; one -1 on each side may vary."""

    linen: tuple[int, ...]
    nnx: tuple[int, ...]

    def plan(self, block: Block, to: Side, parts: int) -> tuple[Action, Block]:
        old, new = (self.linen, self.nnx) if to == "nnx" else (self.nnx, self.linen)
        specs = []
        for spec in block.specs:
            fits = len(spec.shape) == len(old) and all(
                want in (-1, have) for want, have in zip(old, spec.shape, strict=True)
            )
            known = math.prod(size for size in new if size != -1)
            free = spec.size // known if -1 in new and known else 1
            if not fits or known * free != spec.size:
                raise Mismatch(f"{spec} cannot be reshaped from {list(old)} to {list(new)}")
            shape = tuple(free if size == -1 else size for size in new)
            specs.append(Spec(shape, spec.dtype))
        return Reform(tuple(s.shape for s in specs)), Block(block.coords, tuple(specs))


@dataclass(frozen=True)
class Scale:
    """`{op: scale, factor: 0.5}`: nnx value = factor x Linen value. Changes values."""

    factor: float

    def plan(self, block: Block, to: Side, parts: int) -> tuple[Action, Block]:
        for spec in block.specs:
            if not str(spec.dtype).startswith(("float", "bfloat", "complex")):
                raise Mismatch(f"{spec} cannot be scaled: its dtype holds no fractions")
        return Multiply(self.factor, divide=to == "linen"), block


@dataclass(frozen=True)
class Copy:
    """`{op: copy}`: a leaf with several homes on the side that is a list; all equal.

    perms: for each home the axes of the one leaf in its order, `null` where they are as they are:
      `{op: copy, perms: [null, [1, 0]]}` for an embedding, and its transpose as a head's kernel.
    """

    perms: tuple[tuple[int, ...] | None, ...] | None = None

    def plan(self, block: Block, to: Side, parts: int) -> tuple[Action, Block]:
        if PART in block.coords:
            gather, coords = _gather("stack", 0, block, PART)
            ways = self.perms or (None,) * gather.count
            back = tuple(None if perm is None else _inverse(perm) for perm in ways)
            agree = Agree(back, gather.inner)
            specs = []
            for group in agree.groups(block.specs):
                pairs = zip(group, agree.perms, strict=True)
                specs.append(_common([_turned(s, perm) for s, perm in pairs], "the copies"))
            return agree, Block(coords, tuple(specs))
        ways = self.perms or (None,) * parts
        specs = [_turned(spec, perm) for spec in block.specs for perm in ways]
        return Copies(ways), Block({**block.coords, PART: parts}, tuple(specs))


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

    fill: "Filling"
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


Filling = Literal["zeros", "ones", "normal", "constructor"]
Op = Stack | Concat | Transpose | Reshape | Scale | Copy | Drop | Init


def packed(data: bytes) -> str:
    """Bytes as text for a rule book: compressed, in base64."""
    return base64.b64encode(zlib.compress(data, 9)).decode()


def unpacked(text: str, limit: int | None = None) -> bytes:
    """The bytes of such text. Raises `ValueError` for what is none, or longer than `limit`."""
    try:
        stream = zlib.decompressobj()
        data = stream.decompress(base64.b64decode(text, validate=True), (limit or -1) + 1)
    except (ValueError, zlib.error) as error:
        raise ValueError(f"no packed bytes: {error}") from None
    if not stream.eof or stream.unused_data or (limit is not None and len(data) > limit):
        raise ValueError("packed bytes of another length")
    return data


def _permuted(array: Any, perm: tuple[int, ...] | None) -> Any:
    return array if perm is None else array.__array_namespace__().permute_dims(array, perm)


def _inverse(perm: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(perm.index(axis) for axis in range(len(perm)))


def _turned(spec: Spec, perm: tuple[int, ...] | None) -> Spec:
    if perm is None:
        return spec
    if len(perm) != len(spec.shape):
        raise Mismatch(f"{spec} has {len(spec.shape)} axes, perm {list(perm)} {len(perm)}")
    return Spec(tuple(spec.shape[axis] for axis in perm), spec.dtype)


def _same_bits(one: Any, two: Any) -> bool:
    return one.dtype == two.dtype and one.tobytes() == two.tobytes()


def _axis(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise Mismatch(f"axis {axis} is out of range for {ndim} axes")
    return axis % ndim


def _gather(
    kind: Literal["stack", "concat"], axis: int, block: Block, coord: str
) -> tuple[Gather, dict[str, int]]:
    """The gather that removes a coordinate, and the coordinates that are left."""
    sizes = list(block.coords.values())[list(block.coords).index(coord) :]
    left = {name: size for name, size in block.coords.items() if name != coord}
    return Gather(kind, axis, sizes[0], math.prod(sizes[1:])), left


def _resized(spec: Spec, axis: int, sizes: tuple[int, ...], drop: int = 0) -> Spec:
    """`spec` with `drop` axes at `axis` replaced by axes of `sizes`."""
    return Spec((*spec.shape[:axis], *sizes, *spec.shape[axis + drop :]), spec.dtype)


def _common(specs: Sequence[Spec], what: str) -> Spec:
    """The one spec of all."""
    if any(not spec.same(specs[0]) for spec in specs):
        raise Mismatch(f"{what} must be equal in shape and dtype, got {_listed(specs)}")
    return specs[0]


def _common_axis(axis: int, block: Block) -> int:
    if len({len(spec.shape) for spec in block.specs}) > 1:
        raise Mismatch(f"{_listed(block.specs)} differ in their number of axes")
    return _axis(axis, len(block.specs[0].shape))


def _listed(specs: Sequence[Spec]) -> str:
    return ", ".join(str(spec) for spec in dict.fromkeys(specs))
