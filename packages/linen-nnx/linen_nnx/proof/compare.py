"""Compares two values of a model: equal in every bit, apart by rounding, or by more than that."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from linen_nnx.book.ops import Spec
from linen_nnx.infer.dataflow import Use, unbroadcast
from linen_nnx.infer.run import EXACT

Array = np.ndarray
Verdict = Literal["exact", "rounding", "absorbed", "other form", "DIVERGES", "NaN"]
_ROUNDING = 16  # times what rounding does to one side: what twins may differ by


class Error(NamedTuple):
    """How far apart two arrays are; `exact`: equal in dtype and in every bit.

    absolute: the largest difference; relative: to the largest value of both; ulps: in units in the
    last place of the value where it occurs, in the dtype of the two that has fewer bits.
    """

    exact: bool
    ulps: float
    absolute: float
    relative: float


class Value(NamedTuple):
    """An array in the three modes of `record`."""

    own: Array
    wide: Array
    nudged: Array

    @classmethod
    def of(cls, *arrays: Any) -> "Value":
        return cls(*map(_array, arrays))

    def at(self, places: Array) -> "Value":
        """Some of its elements, by number."""
        return Value(*(array.reshape(-1)[places] for array in self))


def judge(one: Value, two: Value) -> tuple[Error, Verdict]:
    """The error between two values of one shape, and its verdict: all but `absorbed`.

    Rounding is what two ways to compute one function may do. In float64 they agree, but for
    constants that one of them alone has and that were rounded to the model's dtype: what those may
    do shows when all constants are nudged. In the model's dtype they are no farther apart than 16
    times what the better side is from its own float64 run.
    """
    error = difference(one.own, two.own)
    if np.isnan(error.absolute):
        return error, "NaN"
    if error.exact:
        return error, "exact"
    noise = min(difference(value.own, value.wide).absolute for value in (one, two))
    unit = min(epsilon(one.own), epsilon(two.own)) * _size(one.own, two.own)
    real = difference(one.wide, two.wide).absolute
    gaps = (_doubled(a) - _doubled(b) for a, b in ((one.wide, two.wide), (one.nudged, two.nudged)))
    constants = difference(*gaps).absolute
    same = real <= _ROUNDING * constants + EXACT * _size(one.wide, two.wide)
    close = error.absolute <= _ROUNDING * noise + 4 * unit
    return error, "rounding" if same and close else "DIVERGES"


def difference(one: Array, two: Array) -> Error:
    """The error between two arrays of one shape; NaN anywhere makes it NaN."""
    left, right = (_doubled(array) for array in (one, two))
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.where(left == right, 0.0, np.abs(left - right)).reshape(-1)
    exact = same(one, two)
    if not gaps.size or np.isnan(gaps).any():
        worst = np.nan if gaps.size else 0.0
        return Error(exact and not gaps.size, worst, worst, worst)
    place = int(gaps.argmax())
    worst = float(gaps[place])
    near = max(abs(left.reshape(-1)[place]), abs(right.reshape(-1)[place]))
    eps = max(epsilon(one), epsilon(two))
    exponent = float(np.floor(np.log2(near))) if eps and 0 < near < np.inf else 0.0
    ulp = (eps or 1.0) * 2.0**exponent
    size = _size(one, two)
    relative = worst / size if worst and size else float(worst > 0)
    return Error(exact, worst / ulp, worst, relative)


def same(one: Array, two: Array) -> bool:
    """Whether two arrays of one shape are equal in dtype and in every bit."""
    return one.dtype == two.dtype and one.tobytes() == two.tobytes()


def aligned(
    values: tuple[Value, Value], uses: tuple[Use, Use], numbers: tuple[Array, Array]
) -> tuple[Value, Value] | None:
    """The parts of two values that stand for the same leaf elements, in the same order.

    numbers: for each side, the common number of each of its elements, -1 where it has none. Where
    the elements do not fit (a wrong rule), the whole values if they have one shape, else None.
    """
    keys = [_keys(use, mapped) for use, mapped in zip(uses, numbers, strict=True)]
    shapes = [value.own.shape for value in values]
    if [key.shape for key in keys] == shapes:
        small = [np.unique(unbroadcast(key)) for key in keys]
        known = [each[each >= 0] for each in small]
        common = np.intersect1d(known[0], known[1])
        if len(common) and len(common) in map(len, known):
            order = [_places(key, common) for key in keys]
            if len(order[0]) == len(order[1]):
                return values[0].at(order[0]), values[1].at(order[1])
    return values if shapes[0] == shapes[1] else None


def spec(array: Any) -> str:
    """Dtype and shape as text; `missing` for None."""
    return "missing" if array is None else str(Spec.of(array))


def _keys(use: Use, numbers: Array) -> Array:
    """The common number at each place of a use; of a row of elements, its smallest."""
    table = numbers
    if use.rows is not None:
        of_rows = numbers[use.rows]
        table = np.where((of_rows < 0).any(1), -1, of_rows.min(1))
    columns = unbroadcast(use.columns)
    return np.broadcast_to(np.where(columns < 0, -1, table[columns]), use.columns.shape)


def _places(keys: Array, common: Array) -> Array:
    flat = keys.reshape(-1)
    places = np.flatnonzero(np.isin(flat, common))
    return places[np.argsort(flat[places], kind="stable")]


def _array(value: Any) -> Array:
    is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(value) if is_key else value)


def _doubled(array: Array) -> Array:
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def epsilon(array: Array) -> float:
    """The spacing of numbers at 1; 0 for integers and booleans."""
    return float(jnp.finfo(array.dtype).eps) if jnp.issubdtype(array.dtype, jnp.inexact) else 0.0


def _size(*arrays: Array) -> float:
    """The largest finite value."""
    sizes = [np.abs(_doubled(array)) for array in arrays]
    return max(float(size.max(initial=0, where=np.isfinite(size))) for size in sizes)
