"""Compares the arrays that two models give: exact in every bit, close by rounding, or not equal.

    array             float32 against float32      float64 against float64      word
    output 0          every bit                    -                            exact
    output 1          2.5 ulps apart               8e-10 apart                  close, not exact
    output 2          2.5 ulps apart               3e-6 apart                   not equal

Rounding differs from one order of sums to another, and in float32 it is as large as a small fault.
In float64 it is 1e9 times smaller: two models of one function agree there, but for constants that
were rounded to float32 in one of them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from linen_nnx.proof.checks import Check
from linen_nnx.proof.compare import difference, epsilon, same, spec
from linen_nnx.proof.routes import name_of
from linen_nnx.proof.subject import Arrays

# An optimizer's step on equal gradients has no float64 run. What rounds in it are a division, a
# root, and norms, which are sums over leaves in another order.
_STEP_ULPS = 16
_SHOWN = 8


class Bound(NamedTuple):
    """What counts as rounding in float64.

    Attributes:
      relative: the error, as a share of an array's largest element.
      floor: that element counts as at least this share of the largest element of all arrays. A
        gradient near 0 is large terms that cancel, and its own size says nothing of its rounding.
    """

    relative: float
    floor: float


def check_arrays(
    name: str,
    both: Callable[[bool], tuple[Arrays, Arrays]],
    exact: bool,
    bound: Bound | None = None,
) -> Check:
    """Compares the arrays of two sides.

    Args:
      name: of the check.
      both: returns the two mappings, in the models' own dtypes or (given True) in float64.
      exact: whether every bit must be equal.
      bound: what is rounding in float64; None if there is no float64 to compare in.

    Example:
        >>> one, two = {"output 0": np.ones(2)}, {"output 0": np.array([1.0, 1.5])}
        >>> check_arrays("forward", lambda wide: (one, two), False, Bound(2e-7, 1e-12)).details[1]
        'not equal: in float64 5e-01 apart, of which 2e-07 may be rounding'
    """
    left, right = both(False)
    # The first few: a wrong dtype is wrong in each of a thousand leaves.
    if problems := [*_misfits(left, right), *_not_finite(left, right)]:
        return Check(name, False, tuple(problems[:_SHOWN]))
    other = [key for key in left if not same(left[key], right[key])]
    if not other:
        return Check(name, True, (f"exact: every bit of {len(left)} arrays",))

    ulps = gaps(left, right, bound.floor if bound else 0.0, ulps=True)
    text = _differing(other, ulps, len(left))
    if exact:
        return Check(name, False, (text, "every bit must be equal here"))
    if bound is None:
        is_close = max(ulps[key] for key in other) <= _STEP_ULPS
        why = f"{_STEP_ULPS} ulps are rounding here"
    else:
        try:
            gap = max(gaps(*both(True), bound.floor).values())
        except Exception as error:  # the user's own model: whatever it raises is the reason
            return Check(name, False, (text, f"not to be compared in float64: {error!r}"))
        is_close = gap <= bound.relative
        why = f"in float64 {gap:.0e} apart, of which {bound.relative:.0e} may be rounding"
    word = "close, not exact" if is_close else "not equal"
    return Check(name, is_close, (text, f"{word}: {why}"), is_close)


def gaps(left: Arrays, right: Arrays, floor: float, ulps: bool = False) -> dict[Any, float]:
    """The largest difference of each array, relative to its largest finite element.

    NaN is an infinite difference.

    Args:
      left, right: arrays of the same names and shapes.
      floor: as in `Bound`.
      ulps: count in units in the last place of the largest element instead.

    Example:
        >>> small = {"a": np.array([1.0, 2.0])}, {"a": np.array([1.0, 1.0])}
        >>> gaps(*small, floor=0.0)
        {'a': 0.5}
    """
    sizes = {key: _largest(array) for key, array in left.items()}
    least = max(floor * max(sizes.values(), default=0.0), 1e-30)
    found = {}
    for key, size in sizes.items():
        unit = max(size, least)
        if ulps:
            unit = epsilon(left[key]) * 2.0 ** math.floor(math.log2(unit))
        gap = difference(left[key], right[key]).absolute
        if not gap:
            found[key] = 0.0
        elif math.isnan(gap) or not unit:
            # Integers have no epsilon: what differs at all is no rounding.
            found[key] = math.inf
        else:
            found[key] = float(gap / unit)
    return found


def _largest(array: np.ndarray) -> float:
    return float(np.abs(array[np.isfinite(array)]).max(initial=0))


def _misfits(left: Arrays, right: Arrays) -> list[str]:
    """The arrays of another shape or dtype, or of one side alone."""
    problems = []
    for key in {**left, **right}:
        before, after = spec(left.get(key)), spec(right.get(key))
        if before != after:
            problems.append(f"{name_of(key)}: {before} before, {after} after")
    return problems


def _not_finite(left: Arrays, right: Arrays) -> list[str]:
    """The arrays with NaN or infinity: of those, equal bits prove nothing."""
    problems = []
    for when, arrays in (("before", left), ("after", right)):
        for key, array in arrays.items():
            if not np.isfinite(array).all():
                problems.append(f"{name_of(key)}: not finite {when}")
    return problems


def _differing(other: Sequence[Any], ulps: dict[Any, float], count: int) -> str:
    """Which arrays differ, the worst first, and by how much."""
    worst = sorted(other, key=lambda key: -ulps[key])
    shown = [f"{name_of(key)} by {ulps[key]:.3g}" for key in worst[:_SHOWN]]
    more = ", ..." if len(worst) > _SHOWN else ""
    return (
        f"{len(other)} of {count} arrays differ (ulps of the largest element): "
        f"{', '.join(shown)}{more}"
    )
