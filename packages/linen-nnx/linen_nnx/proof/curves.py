"""Names functions of one number by what they give: gelu by either formula, a leaky slope, epsilon.

    x                                    -1         1         2
    the function of the model       -0.1588    0.8412    1.9546
    gelu, the tanh approximation    -0.1588    0.8412    1.9546    so this is its name
    gelu, exact, by erf             -0.1587    0.8413    1.9545

    >>> name(0.5 * GRID * (1 + np.tanh(0.7978846 * (GRID + 0.044715 * GRID**3))))
    Words(kind='gelu', text='the tanh approximation')
    >>> name(np.where(GRID > 0, GRID, 0.2 * GRID))
    Words(kind='activation', text='leaky relu with slope 0.2')

A function is known by its values at the numbers `GRID`, however it is written: one may square by a
product or by `integer_pow`, and jax itself writes a softplus in six equations.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Array = np.ndarray

# Small numbers tell the epsilons of norms apart, large ones show at what a function is capped, and
# the round ones are where conditions such as `x > 3` change.
_POSITIVE = np.unique(np.concatenate([np.geomspace(1e-8, 100, 41), [0.5, 1, 2, 3, 4, 5, 6]]))
GRID = np.concatenate([-_POSITIVE[::-1], [0.0], _POSITIVE])
"""(numbers,) float64: 0 and both signs of 1e-8 to 100, in rising order."""

_ONE = int(np.flatnonzero(GRID == 1)[0])
_ABOVE = GRID > 0


class Words(NamedTuple):
    """An operation or a function in words.

    Attributes:
      kind: what it is one of, `activation` say. Two of one kind stand for each other.
      text: which one it is.
    """

    kind: str
    text: str


def equal(one: Array, two: Array) -> bool:
    """Whether two arrays of samples are those of one function.

    Constants were rounded to float32 in either model, so equal means 1e-5. Nothing is added for
    small values: an epsilon of 1e-6 under a root must not equal one of 2e-6.
    """
    return one.shape == two.shape and np.allclose(one, two, rtol=1e-5, atol=1e-12, equal_nan=True)


def factor(samples: Array) -> float | None:
    """The number that the function multiplies by, None for another function.

    Example:
        >>> factor(0.5 * GRID), factor(GRID + 1)
        (0.5, None)
    """
    return float(samples[_ONE]) if equal(samples, samples[_ONE] * GRID) else None


def affine(samples: Array) -> tuple[float, float] | None:
    """`(a, b)` of `a * x + b`, None for another function.

    Example:
        >>> affine(2 * GRID + 3)
        (2.0, 3.0)
    """
    start = float(samples[GRID == 0][0])
    slope = float(samples[_ONE]) - start
    if math.isfinite(start) and equal(samples, slope * GRID + start):
        return slope, start
    return None


def name(samples: Array, of: str = "it") -> Words:
    """The function with these values at `GRID`, in words.

    Args:
      samples: (numbers,), its values. A function without a name is shown by three of them.
      of: what the function acts on, as in `the root of the variance`.
    """
    with np.errstate(all="ignore"):
        if found := _root(samples, of):
            return found
        for find in (_plain, _bent, _known):
            if found := find(samples):
                return found
    shown = (f"f({x:g}) = {samples[x == GRID][0]:.4g}" for x in (-1, 1, 2))
    return Words("function", f"one with {', '.join(shown)}")


def of_flags(samples: Array) -> Words:
    """A function of a boolean, by its two values."""
    return Words("mask", f"{samples[_ONE]:g} where it is true, {samples[0]:g} where it is not")


def _plain(samples: Array) -> Words | None:
    """Multiples, sums with a number, and powers."""
    if line := affine(samples):
        slope, start = line
        if slope == 0:
            return Words("number", f"{start:.6g}")
        parts = []
        if slope != 1:
            parts.append(f"times {slope:.6g}")
        if start != 0:
            parts.append(f"plus {start:.6g}")
        return Words("scale" if start == 0 else "function", ", ".join(parts) or "as it is")
    for power in (2, 3, 4, -1):
        scale = samples[_ONE]
        if scale and equal(samples / scale, GRID**power):
            return Words("function", _times(scale, f"its power {power}"))
    return None


def _root(samples: Array, of: str) -> Words | None:
    """A root with its epsilon, or one divided by it: what a norm divides by, or multiplies with."""
    # Below 0 a root is NaN with most epsilons, and no norm goes there.
    x = GRID[_ABOVE]
    for start, values in (("the root", samples), ("1 / the root", 1 / samples)):
        values = values[_ABOVE]
        if not np.isfinite(values).all() or (values <= 0).any():
            continue
        # sqrt(a * x + e) is a straight line once squared; a * sqrt(x) + e is one over sqrt(x).
        forms = (("inside", values**2, x), ("outside", values, np.sqrt(x)))
        for place, line, along in forms:
            slope = (line[-1] - line[0]) / (along[-1] - along[0])
            epsilon = line[0] - slope * along[0]
            # A remainder of the subtraction is no epsilon.
            small = epsilon if epsilon > 1e-5 * line[0] else 0.0
            if slope > 0 and equal(line, slope * along + small):
                text = f"epsilon {small:.4g} {place} the root" if small else "no epsilon"
                return Words("normalisation", f"{start} of {_times(slope, of)}, {text}")
        least = values[0]
        if equal(values, np.maximum(np.sqrt(x), least)):
            return Words("normalisation", f"{start} of {of}, at least {least:.4g}")
    return None


def _bent(samples: Array) -> Words | None:
    """A straight line with a bound, or one that is bent at 0: relu and its kin."""
    below, x = samples[~_ABOVE], GRID[~_ABOVE]
    low, high = float(samples.min()), float(samples.max())
    if equal(samples, np.clip(GRID, low, high)):
        if low == 0:
            return Words("activation", "relu" if high == GRID[-1] else f"relu up to {high:g}")
        bounds = []
        if low > GRID[0]:
            bounds.append(f"at least {low:g}")
        if high < GRID[-1]:
            bounds.append(f"at most {high:g}")
        return Words("clipping", ", ".join(bounds))
    if not equal(samples[_ABOVE], GRID[_ABOVE]):
        return None
    slope = below[0] / x[0]
    if equal(below, slope * x):
        return Words("activation", f"leaky relu with slope {slope:.4g}")
    # At -100 an elu and a celu have reached -alpha to the last bit.
    alpha = -below[0]
    if equal(below, alpha * np.expm1(x)):
        return Words("activation", f"elu with alpha {alpha:.4g}")
    if equal(below, alpha * np.expm1(x / alpha)):
        return Words("activation", f"celu with alpha {alpha:.4g}")
    return None


def _known(samples: Array) -> Words | None:
    """A function of the table `_NAMED`, or a multiple of one, or a `tanh` with a cap."""
    for (kind, text), function in _NAMED.items():
        values = function(GRID)
        scale = samples[_ONE] / values[_ONE]
        if np.isfinite(scale) and scale and equal(samples, scale * values):
            return Words(kind, _times(scale, text))
    # cap * tanh(x / cap), which models put on logits: the cap is found by iteration, as the one
    # with which the largest x gives what it gave.
    cap = samples[-1]
    for _ in range(100):
        cap = samples[-1] / np.tanh(GRID[-1] / cap)
    if equal(samples, cap * np.tanh(GRID / cap)):
        return Words("activation", f"tanh with cap {cap:.4g}")
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


# Named by what they give, not by their inventors: jax calls one function hard swish and hard silu.
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
