"""Names functions of one number by what they give: gelu by either formula, a leaky slope, epsilon.

    name(samples of 0.5 * x * (1 + tanh(0.797885 * (x + 0.044715 * x**3))))
    # Curve("gelu", "the tanh approximation")

A function is known by its values at the numbers `GRID`, however it is written. Constants may be
rounded to float32, so equal means 1e-5.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray
_POSITIVE = np.unique(np.concatenate([np.geomspace(1e-8, 100, 41), [0.5, 1, 2, 3, 4, 5, 6]]))
GRID = np.concatenate([-_POSITIVE[::-1], [0.0], _POSITIVE])
"""(numbers,): 0 and both signs of 1e-8 to 100; small ones tell epsilons apart, large ones caps."""

_ONE = int(np.flatnonzero(GRID == 1)[0])
_ABOVE = GRID > 0


class Curve(NamedTuple):
    """A function in words: its kind, shared by those that stand for each other, and which it is."""

    kind: str
    text: str


def equal(one: Array, two: Array) -> bool:
    """Whether two arrays of samples are those of one function."""
    return one.shape == two.shape and np.allclose(one, two, rtol=1e-5, atol=1e-12, equal_nan=True)


def factor(samples: Array) -> float | None:
    """The number that the function multiplies by, None for another function."""
    return float(samples[_ONE]) if equal(samples, samples[_ONE] * GRID) else None


def affine(samples: Array) -> tuple[float, float] | None:
    """`(a, b)` of `a * x + b`, None for another function."""
    start = float(samples[GRID == 0][0])
    slope = float(samples[_ONE]) - start
    if math.isfinite(start) and equal(samples, slope * GRID + start):
        return slope, start
    return None


def name(samples: Array, of: str = "it") -> Curve:
    """The function `of` something with these values at `GRID`.

    By some of its values, where it has no name.
    """
    with np.errstate(all="ignore"):
        if found := _root(samples, of):
            return found
        for find in (_plain, _bent, _known):
            if found := find(samples):
                return found
    shown = (f"f({x:g}) = {samples[x == GRID][0]:.4g}" for x in (-1, 1, 2))
    return Curve("function", f"one with {', '.join(shown)}")


def of_flags(samples: Array) -> Curve:
    """A function of a boolean, by its two values."""
    return Curve("mask", f"{samples[_ONE]:g} where it is true, {samples[0]:g} where it is not")


def _plain(samples: Array) -> Curve | None:
    """Multiples, sums with a number, and powers."""
    if line := affine(samples):
        slope, start = line
        if slope == 0:
            return Curve("number", f"{start:.6g}")
        parts = [f"times {slope:.6g}"] * (slope != 1) + [f"plus {start:.6g}"] * (start != 0)
        return Curve("scale" if start == 0 else "function", ", ".join(parts) or "as it is")
    for power in (2, 3, 4, -1):
        scale = samples[_ONE]
        if scale and equal(samples / scale, GRID**power):
            return Curve("function", _times(scale, f"its power {power}"))
    return None


def _root(samples: Array, of: str) -> Curve | None:
    """What norms divide by, or multiply with: a root and its epsilon."""
    x = GRID[_ABOVE]
    for start, values in (("the root", samples), ("1 / the root", 1 / samples)):
        values = values[_ABOVE]
        if not np.isfinite(values).all() or (values <= 0).any():
            continue
        forms = (("inside", values**2, x), ("outside", values, np.sqrt(x)))
        for place, line, along in forms:
            slope = (line[-1] - line[0]) / (along[-1] - along[0])
            epsilon = line[0] - slope * along[0]
            small = epsilon if epsilon > 1e-5 * line[0] else 0.0
            if slope > 0 and equal(line, slope * along + small):
                text = f"epsilon {small:.4g} {place} the root" if small else "no epsilon"
                return Curve("normalisation", f"{start} of {_times(slope, of)}, {text}")
        least = values[0]
        if equal(values, np.maximum(np.sqrt(x), least)):
            return Curve("normalisation", f"{start} of {of}, at least {least:.4g}")
    return None


def _bent(samples: Array) -> Curve | None:
    """What is a straight line on one side of 0 at least, or between two bounds."""
    below, x = samples[~_ABOVE], GRID[~_ABOVE]
    low, high = float(samples.min()), float(samples.max())
    if equal(samples, np.clip(GRID, low, high)):
        if low == 0:
            return Curve("activation", "relu" if high == GRID[-1] else f"relu up to {high:g}")
        bounds = [f"at least {low:g}"] * (low > GRID[0]) + [f"at most {high:g}"] * (high < GRID[-1])
        return Curve("clipping", ", ".join(bounds))
    if not equal(samples[_ABOVE], GRID[_ABOVE]):
        return None
    slope = below[0] / x[0]
    if equal(below, slope * x):
        return Curve("activation", f"leaky relu with slope {slope:.4g}")
    alpha = -below[0]
    if equal(below, alpha * np.expm1(x)):
        return Curve("activation", f"elu with alpha {alpha:.4g}")
    if equal(below, alpha * np.expm1(x / alpha)):
        return Curve("activation", f"celu with alpha {alpha:.4g}")
    return None


def _known(samples: Array) -> Curve | None:
    """A function that has a name, or a multiple of it, or a `tanh` with a cap."""
    for (kind, text), function in _NAMED.items():
        values = function(GRID)
        scale = samples[_ONE] / values[_ONE]
        if np.isfinite(scale) and scale and equal(samples, scale * values):
            return Curve(kind, _times(scale, text))
    cap = samples[-1]
    for _ in range(100):  # the cap with which the largest x gives what it gave
        cap = samples[-1] / np.tanh(GRID[-1] / cap)
    if equal(samples, cap * np.tanh(GRID / cap)):
        return Curve("activation", f"tanh with cap {cap:.4g}")
    return None


def _times(scale: float, text: str) -> str:
    return text if abs(scale - 1) < 1e-5 else f"{scale:.4g} times {text}"


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _selu(x: Array) -> Array:
    scale, alpha = 1.0507009873554805, 1.6732632423543772
    return scale * np.where(x > 0, x, alpha * np.expm1(x))


def _tanh_gelu(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _erf_gelu(x: Array) -> Array:
    return 0.5 * x * np.vectorize(math.erfc)(-x / math.sqrt(2))


_SIX = "clipped to 0..6"
_NAMED: dict[tuple[str, str], Callable[[Array], Array]] = {
    ("gelu", "the tanh approximation"): _tanh_gelu,
    ("gelu", "exact, by erf"): _erf_gelu,
    ("gelu", "x * sigmoid(1.702 x)"): lambda x: x * _sigmoid(1.702 * x),
    ("activation", "silu"): lambda x: x * _sigmoid(x),
    ("activation", "sigmoid"): _sigmoid,
    ("activation", "log of sigmoid"): lambda x: -np.logaddexp(0, -x),
    ("activation", "softplus"): lambda x: np.logaddexp(0, x),
    ("activation", "mish"): lambda x: x * np.tanh(np.logaddexp(0, x)),
    ("activation", "tanh"): np.tanh,
    ("activation", "softsign"): lambda x: x / (1 + np.abs(x)),
    ("activation", "selu"): _selu,
    ("activation", f"silu with x / 6 + 1/2 {_SIX} for its sigmoid"): lambda x: (
        x * np.clip(x + 3, 0, 6) / 6
    ),
    ("activation", f"sigmoid as x / 6 + 1/2 {_SIX}"): lambda x: np.clip(x + 3, 0, 6) / 6,
    ("activation", "square of relu"): lambda x: np.maximum(x, 0) ** 2,
    ("activation", "squareplus"): lambda x: (x + np.sqrt(x**2 + 4)) / 2,
    ("function", "its absolute value"): np.abs,
    ("function", "its sign"): np.sign,
    ("function", "its exponential"): np.exp,
    ("function", "its logarithm"): np.log,
    ("function", "its sine"): np.sin,
    ("function", "its cosine"): np.cos,
}
