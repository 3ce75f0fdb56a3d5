"""Sums and products of terms in one form: numbers first, no order, softmax and variances known.

    x - mean(x)          ->  the sum of x and "times -1" of the mean of x, in no order
    mean(x * x) - mean(x) * mean(x)      ->  the variance of x
    mean((x - mean(x)) ** 2)             ->  the variance of x
    exp(x) / sum(exp(x))                 ->  softmax of x

    >>> terms = Terms()
    >>> x, axes = terms.op("x"), (("axes", "-1"), ("count", "4"))
    >>> mean = terms.op("mean", [x], axes)
    >>> squares = terms.op("mean of squares", [x], axes)
    >>> minus_squared_mean = terms.scaled(product(terms, [mean, mean]), -1)
    >>> total(terms, [squares, minus_squared_mean]).op.name
    'variance'

A sum over axes is kept as a multiple of the mean, since models divide before or after. So a softmax
shows as exp(x) times a number by the mean of exp(x).
"""

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from linen_nnx.proof import curves
from linen_nnx.proof.curves import GRID
from linen_nnx.proof.terms import Operation, Params, Term, Terms, inside, order, ordered

Array = np.ndarray


def total(terms: Terms, args: Sequence[Term]) -> Term:
    """The sum of terms."""
    offset, parts = 0.0, list[Term]()
    for arg in args:
        if arg.op is None:
            offset += arg.number
            continue
        line = curves.affine(terms.at(arg))
        if line is None:
            parts.append(arg)
        else:
            # 2 * (a + b) + 3 in a sum is three of its parts: 2 * a, 2 * b and 3.
            slope, start = line
            offset += start
            parts += [terms.scaled(part, slope) for part in inside(Term(arg.op), "sum")]

    numbers, parts = _grouped(terms, parts, np.add)
    offset += sum(numbers)
    if not parts:
        return Term.of_number(offset)
    # What all parts are multiplied by goes outside: 0.5 * a + 0.5 * b is 0.5 * (a + b).
    scale = _common(terms, parts)
    value = _recognised(terms, [terms.scaled(part, 1 / scale) for part in parts])
    value = terms.scaled(value, scale)
    if offset and value.op is not None:
        return terms.curve(value.op, terms.at(value) + offset)
    return value


def product(terms: Terms, args: Sequence[Term]) -> Term:
    """The product of terms."""
    scale, parts = 1.0, list[Term]()
    for arg in args:
        here, base = terms.factor(arg)
        scale *= here
        parts += inside(base, "product")
    numbers, parts = _grouped(terms, parts, np.multiply)
    scale *= math.prod(numbers)
    if not parts:
        return Term.of_number(scale)
    for part, other in itertools.permutations(parts, 2):
        if found := _quotient(terms, part, other):
            rest = [each for each in parts if each not in (part, other)]
            return product(terms, [*rest, *found, Term.of_number(scale)])
    joined = parts[0] if len(parts) == 1 else terms.op("product", ordered(parts))
    return terms.scaled(joined, scale)


def summed(terms: Terms, term: Term, params: Params) -> Term:
    """A sum over axes as a multiple of a mean; of squares, and of those of x less its mean.

    params: the `axes`, and the `count` of elements that one sum takes.
    """
    count = int(dict(params)["count"])
    scale, base = terms.factor(term)
    if base.op is None:
        return base._replace(number=base.number * count)
    square = float(terms.at(base)[GRID == 1][0])
    if base.curve and square and curves.equal(terms.at(base), square * GRID**2):
        x = _centred(terms, base.op, "mean")
        name = "mean of squares" if x is None else "variance"
        return terms.scaled(terms.op(name, [x or Term(base.op)], params), square * count)
    return terms.scaled(terms.op("mean", [base], params), scale * count)


def _common(terms: Terms, parts: Sequence[Term]) -> float:
    """What all parts of a sum are multiplied by, or by its negative; -1 turns `b - a` round."""
    scales = [terms.factor(part)[0] for part in sorted(parts, key=order)]
    size = abs(scales[0])
    same = all(math.isclose(abs(scale), size, rel_tol=1e-6) for scale in scales)
    # The sign of most parts, of the first where they are even: a - b and b - a then have one form.
    balance = sum(map(np.sign, scales)) or scales[0]
    return float(np.copysign(size if same else 1.0, balance))


def _grouped(
    terms: Terms, parts: Sequence[Term], join: Callable[[Array, Array], Array]
) -> tuple[list[float], list[Term]]:
    """The numbers, and one part for each operation: functions of one operation are joined."""
    numbers: list[float] = []
    found: dict[Operation, Array] = {}
    for part in parts:
        if part.op is None:
            numbers.append(part.number)
            continue
        here = terms.at(part)
        with np.errstate(all="ignore"):
            found[part.op] = join(found[part.op], here) if part.op in found else here
    joined = []
    for op, samples in found.items():
        part = terms.curve(op, samples)
        # x - x and x / x are numbers.
        if part.op is None:
            numbers.append(part.number)
        else:
            joined.append(part)
    return numbers, joined


def _recognised(terms: Terms, parts: list[Term]) -> Term:
    """A sum of parts; a variance or the logarithm of a softmax, where it is one."""
    if len(parts) == 1:
        return parts[0]
    for part in parts:
        if part.op is None or part.op.name != "mean":
            continue
        rest = [other for other in parts if other is not part]
        for find in (_variance, _log_softmax):
            if found := find(terms, part, part.op, rest):
                return found
    return terms.op("sum", ordered(parts))


def _variance(terms: Terms, part: Term, mean: Operation, rest: list[Term]) -> Term | None:
    """The variance that mean(x ** 2) - mean(x) ** 2 is; `part` is the second of the two."""
    x = mean.args[0]
    squares = terms.op("mean of squares", [x], mean.params)
    if curves.equal(terms.at(part), -(GRID**2)) and rest == [squares]:
        return terms.op("variance", [x], mean.params)
    return None


def _log_softmax(terms: Terms, part: Term, mean: Operation, rest: list[Term]) -> Term | None:
    """The logarithm of a softmax that c * x - log(sum(exp(c * x))) is; `part` is the logarithm."""
    powers = mean.args[0]
    scale = _exponent(terms, powers)
    if not scale or powers.op is None:
        return None
    with np.errstate(all="ignore"):
        if not curves.equal(terms.at(part), -np.log(_count(mean) * GRID)):
            return None
    shifted = [terms.scaled(each, scale) for each in inside(Term(powers.op), "sum")]
    if {*shifted} != {*rest}:
        return None
    return _softmax(terms, "log of softmax", powers.op, mean, scale)


def _quotient(terms: Terms, part: Term, other: Term) -> list[Term]:
    """The softmax that a product of exp(c * x) and k / sum(exp(c * x)) is, and k."""
    scale, mean = _exponent(terms, part), other.op
    if not scale or part.op is None or mean is None or mean.name != "mean":
        return []
    first = terms.at(other)[GRID == 1][0]
    with np.errstate(all="ignore"):
        if mean.args[0] != part or not curves.equal(terms.at(other), first / GRID):
            return []
    share = float(first) * _count(mean)
    return [_softmax(terms, "softmax", part.op, mean, scale), Term.of_number(share)]


def _softmax(terms: Terms, name: str, op: Operation, mean: Operation, scale: float) -> Term:
    """The softmax of `scale` times an operation, over the axes of a mean."""
    # Most code takes off the largest x first, against overflow: the function is the same.
    own, x = terms.factor(_centred(terms, op, "largest") or Term(op))
    axes = [pair for pair in mean.params if pair[0] == "axes"]
    return terms.op(name, [x], (*axes, ("scale", f"{own * scale:.6g}")))


def _exponent(terms: Terms, term: Term) -> float:
    """c of exp(c * x), 0 for other functions."""
    if term.op is None or not term.curve:
        return 0.0
    with np.errstate(all="ignore"):
        scale = float(np.log(terms.at(term)[GRID == 1][0]))
        return scale if curves.equal(terms.at(term), np.exp(scale * GRID)) else 0.0


def _centred(terms: Terms, op: Operation, center: str) -> Term | None:
    """x, if the operation is x less its mean, or less its largest element."""
    if op.name != "sum":
        return None
    for part in op.args:
        if part.op is None or part.op.name != center or terms.factor(part)[0] != -1:
            continue
        # x may be a sum itself, whose parts then stand beside the mean of all of it.
        rest = {other for other in op.args if other is not part}
        x = part.op.args[0]
        if rest == {*inside(x, "sum")}:
            return x
    return None


def _count(mean: Operation) -> int:
    return int(dict(mean.params)["count"])
