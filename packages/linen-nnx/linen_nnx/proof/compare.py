"""Compares two values of a model: equal in every bit, apart by rounding, or by more than that.

Two correct twins often differ in the last bits, because they add in another order. A fault differs
in the last bits, too, if it is small: an epsilon of 1e-5 for 1e-6. The values in float32 cannot
tell the two. So every value comes in three modes (`record.py`), and float64 decides:

    in float32        in float64        verdict
    equal bits        -                 exact
    1 ulp apart       equal             rounding: one function, computed in another order
    1 ulp apart       1e-7 apart        DIVERGES: two functions, however near each other
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from linen_nnx.book.specs import Spec
from linen_nnx.infer.dataflow import Use, unbroadcast
from linen_nnx.infer.run import EXACT

Array = np.ndarray
Verdict = Literal["exact", "rounding", "absorbed", "other form", "DIVERGES", "NaN"]

# Twins may differ by so many times what rounding does to the better of them. A sum of n terms in
# another order wanders by a few times its own error, not by its whole bound.
_ROUNDING = 16


class Error(NamedTuple):
    """How far apart two arrays are.

    Attributes:
      exact: the two are equal in dtype and in every bit.
      ulps: the largest difference, in units in the last place of the value where it occurs. The
        unit is that of the dtype with fewer bits.
      absolute: the largest difference.
      relative: the same, as a share of the largest value of both arrays.
    """

    exact: bool
    ulps: float
    absolute: float
    relative: float


class Value(NamedTuple):
    """One array of a model, computed in the three modes of `record`."""

    own: Array
    wide: Array
    nudged: Array

    @classmethod
    def of(cls, *arrays: Any) -> "Value":
        """A value from arrays of jax; a random key is compared by its numbers."""
        return cls(*map(_array, arrays))

    def at(self, places: Array) -> "Value":
        """Some of its elements, by their numbers in row-major order."""
        return Value(*(array.reshape(-1)[places] for array in self))


def judge(one: Value, two: Value) -> tuple[Error, Verdict]:
    """The error between two values of one shape, and its verdict (any but `absorbed`).

    A difference is rounding if two things hold. In float64 the values agree, or are no further
    apart than rounded constants explain: one model alone may hold a constant that was rounded to
    its dtype, and nudging all constants shows how much that can do. And in the model's dtype they
    are at most 16 times as far apart as the better side is from its own float64 run.

    Example:
        >>> wide = np.linspace(1.0, 2.0, 9)
        >>> own = wide.astype(np.float32)
        >>> one_ulp_up = np.nextafter(own, np.float32(9))
        >>> judge(Value(own, wide, wide), Value(one_ulp_up, wide, wide))[1]
        'rounding'
        >>> apart = wide * (1 + 1e-7)
        >>> judge(Value(own, wide, wide), Value(one_ulp_up, apart, apart))[1]
        'DIVERGES'
    """
    error = difference(one.own, two.own)
    if np.isnan(error.absolute):
        return error, "NaN"
    if error.exact:
        return error, "exact"

    # Is it one function? If nudging the constants moves the gap, they may have caused all of it.
    real = difference(one.wide, two.wide).absolute
    gap_wide = _doubled(one.wide) - _doubled(two.wide)
    gap_nudged = _doubled(one.nudged) - _doubled(two.nudged)
    constants = difference(gap_wide, gap_nudged).absolute
    is_one_function = real <= _ROUNDING * constants + EXACT * _size(one.wide, two.wide)

    # The better side counts: a fault that makes one of them noisy must not excuse itself.
    noise = min(
        difference(one.own, one.wide).absolute,
        difference(two.own, two.wide).absolute,
    )
    # A side may be exact by luck (noise 0), where its twin rounds once or twice.
    unit = min(epsilon(one.own), epsilon(two.own)) * _size(one.own, two.own)
    is_close = error.absolute <= _ROUNDING * noise + 4 * unit
    return error, "rounding" if is_one_function and is_close else "DIVERGES"


def difference(one: Array, two: Array) -> Error:
    """The error between two arrays of one shape; NaN anywhere makes it NaN.

    Example:
        >>> difference(np.array([1.0, 4.0]), np.array([1.0, 3.0])).relative
        0.25
    """
    left, right = _doubled(one), _doubled(two)
    exact = same(one, two)
    if not left.size:
        return Error(exact, 0.0, 0.0, 0.0)

    with np.errstate(invalid="ignore", over="ignore"):
        # Two equal infinities are 0 apart, though their difference is NaN.
        gaps = np.where(left == right, 0.0, np.abs(left - right)).reshape(-1)
    if np.isnan(gaps).any():
        return Error(False, np.nan, np.nan, np.nan)

    place = int(gaps.argmax())
    worst = float(gaps[place])
    near = max(abs(left.reshape(-1)[place]), abs(right.reshape(-1)[place]))
    # Integers have no epsilon: their unit is 1.
    eps = max(epsilon(one), epsilon(two))
    exponent = float(np.floor(np.log2(near))) if eps and 0 < near < np.inf else 0.0
    ulp = (eps or 1.0) * 2.0**exponent
    size = _size(one, two)
    relative = worst / size if worst and size else float(worst > 0)
    return Error(exact, worst / ulp, worst, relative)


def same(one: Array, two: Array) -> bool:
    """Whether two arrays of one shape are equal in dtype and in every bit.

    Example:
        >>> same(np.array([0.0]), np.array([-0.0]))
        False
    """
    return one.dtype == two.dtype and one.tobytes() == two.tobytes()


def aligned(
    values: tuple[Value, Value], uses: tuple[Use, Use], numbers: tuple[Array, Array]
) -> tuple[Value, Value] | None:
    """The parts of two values that stand for the same leaf elements, in the same order.

    One side may compute `q`, `k` and `v` in three products and the other in one. Then each of the
    three is compared with a third of the one.

    Args:
      values: what the two equations gave.
      uses: which leaf elements stand where in the two values.
      numbers: for each side (elements,), the number that each of its elements shares with its
        mate on the other side, -1 where it has none.

    Returns:
      The two parts, flat. Where the elements do not fit, as under a wrong rule, the values as they
      are if they have one shape, else None.
    """
    one, two = values
    ours, theirs = _keys(uses[0], numbers[0]), _keys(uses[1], numbers[1])
    if ours.shape == one.own.shape and theirs.shape == two.own.shape:
        of_one, of_two = _known(ours), _known(theirs)
        common = np.intersect1d(of_one, of_two)
        # One of them must be there as a whole: a few shared elements are a wrong rule's.
        if len(common) and len(common) in (len(of_one), len(of_two)):
            places, places_two = _places(ours, common), _places(theirs, common)
            if len(places) == len(places_two):
                return one.at(places), two.at(places_two)
    return values if one.own.shape == two.own.shape else None


def spec(array: Any) -> str:
    """The dtype and shape of an array as text; `missing` for None.

    Example:
        >>> spec(np.zeros((2, 3), np.float32)), spec(None)
        ('float32[2,3]', 'missing')
    """
    return "missing" if array is None else str(Spec.of(array))


def epsilon(array: Array) -> float:
    """The distance from 1 to the next number of an array's dtype; 0 for integers and booleans."""
    return float(jnp.finfo(array.dtype).eps) if jnp.issubdtype(array.dtype, jnp.inexact) else 0.0


def _keys(use: Use, numbers: Array) -> Array:
    """The shared number at each place of a use's value, -1 for none.

    An output of a product stands for a whole row of elements: its key is the smallest of theirs.
    """
    table = numbers
    if use.rows is not None:
        of_rows = numbers[use.rows]
        table = np.where((of_rows < 0).any(1), -1, of_rows.min(1))
    # Without the axes of a broadcast: a bias of 512 stands in a value of 64 x 128 x 512.
    columns = unbroadcast(use.columns)
    keys = np.where(columns < 0, -1, table[columns])
    return np.broadcast_to(keys, use.columns.shape)


def _known(keys: Array) -> Array:
    """The different numbers among keys, in order, without the -1 of elements that have none."""
    found = np.unique(unbroadcast(keys))
    return found[found >= 0]


def _places(keys: Array, common: Array) -> Array:
    """The places at which the `common` numbers stand, in the order of the numbers."""
    flat = keys.reshape(-1)
    places = np.flatnonzero(np.isin(flat, common))
    # Stable, so that the copies of an element in a batch keep their order on both sides.
    return places[np.argsort(flat[places], kind="stable")]


def _array(value: Any) -> Array:
    is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(value) if is_key else value)


def _doubled(array: Array) -> Array:
    """An array in float64, or complex128: differences of bfloat16 would be rounded themselves."""
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def _size(*arrays: Array) -> float:
    """The largest finite value of some arrays."""
    largest = 0.0
    for array in arrays:
        sizes = np.abs(_doubled(array))
        largest = max(largest, float(sizes.max(initial=0, where=np.isfinite(sizes))))
    return largest
