"""The actions of a planned rule: what is done to arrays, in one direction, with every size known.

An op of a rule book knows both directions and no shapes (`ops.py`). Planned for arrays of given
shapes it becomes an action. A rule of two layers that Linen keeps stacked, and its ops each way:

    - {linen: params/layers/w, nnx: "layers/{i}/w", ops: [{op: stack, capture: i, axis: 0}]}

    to nnx      Spread("stack", axis=0, sizes=(1, 1))      one array of (2, 4, 8), two of (4, 8)
    to linen    Gather("stack", axis=0, count=2, inner=1)  and back

    >>> import numpy as np
    >>> stacked = np.arange(64.0).reshape(2, 4, 8)
    >>> layers = Spread("stack", axis=0, sizes=(1, 1)).run([stacked])
    >>> [layer.shape for layer in layers]
    [(4, 8), (4, 8)]
    >>> (again,) = Gather("stack", axis=0, count=2, inner=1).run(layers)
    >>> np.array_equal(again, stacked)
    True

Actions run on lists of arrays of any library: an array brings its own namespace, so that nothing
here imports jax. Nor is numpy imported before it is needed, as plain re-keying does without. But
for `Multiply`, `Fill` and `Cast` no action makes a number: all elements are moved as they are.
"""

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from linen_nnx.book.packing import unpacked
from linen_nnx.book.specs import Mismatch, Spec

Filling = Literal["zeros", "ones", "normal", "constructor"]


@dataclass(frozen=True)
class Gather:
    """Joins `count` arrays into one, by a new axis (`stack`) or along one (`concat`).

    The list it takes is `(outer, count, inner)` in row-major order; it returns `(outer, inner)`.

    Example:
      >>> Gather("concat", axis=0, count=2, inner=3).groups(["q0", "q1", "q2", "k0", "k1", "k2"])
      [['q0', 'k0'], ['q1', 'k1'], ['q2', 'k2']]
    """

    kind: Literal["stack", "concat"]
    axis: int
    count: int
    inner: int

    def groups(self, items: Sequence[Any]) -> list[list[Any]]:
        """The items that go into each result, in order."""
        width = self.count * self.inner
        groups = []
        for start in range(0, len(items), width):
            for column in range(self.inner):
                # The items of one result lie `inner` apart.
                groups.append(list(items[start + column : start + width : self.inner]))
        return groups

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
                # An integer index takes the axis away; a slice keeps it.
                cut = start if self.kind == "stack" else slice(start, start + size)
                pieces.append(array[(*before, cut)])
                start += size
        return pieces


@dataclass(frozen=True)
class Permute:
    """Transposes every array."""

    perm: tuple[int, ...]

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        return [_permuted(array, self.perm) for array in arrays]


@dataclass(frozen=True)
class Reform:
    """Gives every array the shape listed for it."""

    shapes: tuple[tuple[int, ...], ...]

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        results = []
        for array, shape in zip(arrays, self.shapes, strict=True):
            results.append(array.__array_namespace__().reshape(array, shape))
        return results


@dataclass(frozen=True)
class Multiply:
    """Multiplies (or divides, on the way back) in the arrays' own dtype. Changes values."""

    factor: float
    divide: bool

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        change = operator.truediv if self.divide else operator.mul
        results = []
        for array in arrays:
            # numpy makes a float32 of a bfloat16 times a float of Python.
            factor = array.__array_namespace__().asarray(self.factor, dtype=array.dtype)
            results.append(change(array, factor))
        return results


@dataclass(frozen=True)
class Copies:
    """Gives every array once for each of `perms`, its axes in that order (None: as they are)."""

    perms: tuple[tuple[int, ...] | None, ...]

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        copies = []
        for array in arrays:
            copies += [_permuted(array, perm) for perm in self.perms]
        return copies


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
            # A tracer under `jax.jit` has no values yet. Its error is one of jax, which this module
            # does not import.
            try:
                first, *others = [np.asarray(array) for array in turned]
            except Exception as error:
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

    Example:
      >>> (bias,) = Fill("ones", 1.0, 0, "norm/scale", Spec((2,), "float32")).run([])
      >>> bias
      array([1., 1.], dtype=float32)
    """

    fill: Filling
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

        # The path goes into the seed, so that leaves of one rule differ, and so that a leaf's
        # numbers do not depend on which others are filled. `hash` would differ from run to run.
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
            # `astype` wraps a number that is too large round, without a word.
            if (old != new).any():
                raise Mismatch(f"{self.dtype} cannot hold the value {old}")
        return cast


Action = Gather | Spread | Permute | Reform | Multiply | Copies | Agree | Fill | Cast


def _permuted(array: Any, perm: tuple[int, ...] | None) -> Any:
    return array if perm is None else array.__array_namespace__().permute_dims(array, perm)


def _same_bits(one: Any, two: Any) -> bool:
    # Not `==`: NaN would differ from itself, and -0.0 equal 0.0.
    return one.dtype == two.dtype and one.tobytes() == two.tobytes()
