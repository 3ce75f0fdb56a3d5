"""Says what two parts of a model do differently, where it is a function and not a setting.

    differences(part_of_linen, part_of_nnx)
    # ["gelu: Linen the tanh approximation, nnx exact, by erf"]

Both parts are read as terms in one normal form (`terms.py`). Where a term of one side is not among
the other's, though all that it takes is, the two part. Terms that part at the same place are named
beside each other, taken for one, and what comes behind them is read on.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from linen_nnx.infer.jaxprs import described
from linen_nnx.proof import curves
from linen_nnx.proof.curves import Curve
from linen_nnx.proof.terms import Op, Part, Term, Terms

_SIDES = ("Linen", "nnx")
_MOST = 4  # differences said; behind so many the two parts are other models
_PHRASES = {
    "axes": "over axis {}",
    "count": "of {} elements",
    "fill": "fills in {}",
    "scale": "its input times {}",
}
_KINDS = {
    "log of softmax": "softmax",
    "mean of squares": "normalisation",
    "variance": "normalisation",
}
_CONTEXTS = ("convolution", "matrix product", "mean", "mean of squares", "softmax", "variance")
_IN_MEMORY = ("dot_general", "reshape", "rev", "transpose")
Array = np.ndarray
Items = dict[Term, tuple[Term, ...]]


def differences(one: Part, two: Part) -> list[str]:
    """What the Linen part and the nnx part do differently, a line each; empty if nothing is seen.

    The first lines are nearest to what both take.
    """
    parts, terms, found = (one, two), Terms(), list[_Found]()
    for _ in range(2 * _MOST):
        items = [_items(terms.read(part)) for part in parts]
        pair = _parting(items[0], items[1])
        if pair is None:
            break
        found.append(pair)
        if pair.linen is not None and pair.nnx is not None:
            terms.merged[pair.nnx] = pair.linen
        elif term := pair.linen or pair.nnx:
            terms.merged[term] = _main((items[0] | items[1])[term])
    lines = dict.fromkeys(_lines(found, terms))
    return list(lines)[:_MOST] or list(_in_memory(parts))


class _Found(NamedTuple):
    """The terms at which the sides part; None where one side has nothing for the other's."""

    linen: Term | None
    nnx: Term | None


def _parting(linen: Items, nnx: Items) -> _Found | None:
    """A place where the sides part, though they agree on all that is taken there.

    Where what stands there on one side follows later on the other, that has something more: of
    `softmax(x)` against `softmax(mask(x))` the mask is one side's alone.
    """
    ours, theirs = _forks(linen, nnx), _forks(nnx, linen)
    near = {(a, b): _nearness(linen[a], nnx[b], a, b) for a in ours for b in theirs}
    if not any(near.values()):
        if ours or theirs:
            return _Found(ours[0], None) if ours else _Found(None, theirs[0])
        return None
    one, two = max(near, key=lambda pair: near[pair])
    if not _alike(one, two):
        if any(_alike(two, other) for other in linen if other not in nnx):
            return _Found(one, None)
        if any(_alike(one, other) for other in nnx if other not in linen):
            return _Found(None, two)
    return _Found(one, two)


def _items(end: Term) -> Items:
    """All terms below an end, each with those that it takes, which come before it."""
    items: Items = {}
    left = [(end, False)]
    while left:
        term, is_done = left.pop()
        if term.op is None or term in items:
            continue
        args = (Term(term.op),) if term.curve else term.op.args
        args = tuple(arg for arg in args if not _is_constant(arg))
        if is_done:
            items[term] = args
        else:
            left.append((term, True))
            left += [(arg, False) for arg in reversed(args)]
    return items


def _forks(mine: Items, theirs: Items) -> list[Term]:
    """The terms of one side alone that take nothing of that side alone."""
    alone = [term for term in mine if term not in theirs]
    return [term for term in alone if not any(arg in alone for arg in mine[term])]


def _nearness(ours: Sequence[Term], theirs: Sequence[Term], one: Term, two: Term) -> int:
    """How likely two terms stand for each other, by what they take; 0 if nothing speaks for it."""
    same = 2 * _alike(one, two) or int(_kind(one) == _kind(two) != "")
    if {*ours} == {*theirs}:
        return 6 + same
    return 3 + same if {*ours} & {*theirs} else same


def _alike(one: Term, two: Term) -> bool:
    """Whether two terms are the same operation, or the same function."""
    assert one.op is not None and two.op is not None
    if one.curve or two.curve:
        return one.curve == two.curve
    return one.op.name == two.op.name


def _kind(term: Term) -> str:
    """The kind of an operation that has kin, the function of one number, or nothing."""
    assert term.op is not None
    return "curve" if term.curve else _KINDS.get(term.op.name, "")


def _main(args: Sequence[Term]) -> Term:
    """What a term acts on; the number 0, if it takes nothing."""
    ops = [arg for arg in args if arg.op is not None]
    values = [arg for arg in ops if arg.op and arg.op.name != "leaf"]
    return (values or ops or [Term(None)])[0]


def _lines(found: Sequence[_Found], terms: Terms) -> Iterator[str]:
    moved = _moved_scale(found, terms)
    for pair in found:
        if moved and pair in moved[1]:
            yield from [moved[0]] * (pair is moved[1][0])
            continue
        one, two = (None if term is None else _words(term, terms) for term in pair)
        if one and two:
            if one == two or one.kind in ("mask", "softmax"):
                one, two = _params(pair, terms)
            kind = one.kind if one.kind == two.kind else "function"
            texts = [w.text if w.kind == kind else _full(w) for w in (one, two)]
            yield f"{kind}: Linen {texts[0]}, nnx {texts[1]}"
        elif words := one or two:
            yield f"{_full(words, ': ')}, in {_SIDES[one is None]} alone"


def _moved_scale(found: Sequence[_Found], terms: Terms) -> tuple[str, tuple[_Found, _Found]] | None:
    """The line for a softmax that one side scales before it and the other after it."""
    for pair in found:
        scales = [dict(term.op.params).get("scale") for term in pair if term and term.op]
        if len(scales) < 2 or None in scales or scales[0] == scales[1]:
            continue
        before = [float(scale or 1) for scale in scales]
        for other in found:
            side = 0 if other[1] is None else 1
            term = other[side]
            if other[1 - side] is not None or term is None or not term.curve:
                continue
            after = curves.factor(terms.samples[term.curve])
            if after and math.isclose(before[side] * after, before[1 - side], rel_tol=1e-4):
                text = f"softmax: {_SIDES[1 - side]} scales by {after:.4g} before it, "
                return text + f"{_SIDES[side]} after it", (pair, other)
    return None


def _full(words: Curve, between: str = " ") -> str:
    """A function with its kind, where its text alone does not tell."""
    generic = ("activation", "function", "operation")
    return words.text if words.kind in generic else f"{words.kind}{between}{words.text}"


def _words(term: Term, terms: Terms) -> Curve:
    """A term in words."""
    op = term.op
    assert op is not None
    if term.curve:
        samples = terms.samples[term.curve]
        if op.kind == "b":
            return curves.of_flags(samples)
        known = f"the {op.name}" if op.name in _CONTEXTS else "it"
        words = curves.name(samples, "a leaf" if op.name == "leaf" else known)
        is_bare = op.name in _CONTEXTS and words.kind in ("function", "scale")
        return words._replace(text=words.text + f" (of {known})" * is_bare)
    if op.name in ("softmax", "log of softmax", "mask"):
        return Curve(_KINDS.get(op.name, op.name), _phrases(op))
    if op.name in ("sum", "product"):
        return Curve("operation", f"the {op.name} of {len(op.args)} values")
    if op.name in ("mean", "largest", "mean of squares", "variance"):
        return Curve(_KINDS.get(op.name, "operation"), f"the {op.name} {_phrases(op, 'axes')}")
    return Curve("operation", op.name)


def _phrases(op: Op, *only: str) -> str:
    shown = [(key, value) for key, value in op.params if not only or key in only]
    return ", ".join(_PHRASES.get(key, f"{key} {{}}").format(value) for key, value in shown)


def _params(pair: _Found, terms: Terms) -> tuple[Curve, Curve]:
    """Two operations of one name by what they differ in: parameters, constants, or how many."""
    assert pair.linen is not None and pair.nnx is not None
    one, two = pair.linen.op, pair.nnx.op
    assert one is not None and two is not None
    params = dict(one.params), dict(two.params)
    keys = [key for key in params[0] if params[0][key] != params[1].get(key)]
    if keys:
        return Curve(one.name, _phrases(one, *keys)), Curve(one.name, _phrases(two, *keys))
    found = []
    for op in (one, two):
        tables = [terms.table(arg.op) for arg in op.args if arg.op and _is_constant(arg)]
        found.append(_table(tables[0]) if tables else None)
    return (
        found[0] or Curve(one.name, f"of {len(one.args)} values"),
        found[1] or Curve(two.name, f"of {len(two.args)} values"),
    )


def _table(table: Array) -> Curve:
    """A constant in words."""
    if table.dtype == bool:
        return Curve("constant mask", f"true at {int(table.sum())} of {table.size} places")
    shape = "x".join(map(str, table.shape))
    text = f"{shape} numbers from {table.min():.4g} to {table.max():.4g}"
    return Curve("constants", f"{text}, in all {table.sum():.6g}")


def _is_constant(term: Term) -> bool:
    return term.op is not None and term.op.name == "constants"


def _in_memory(parts: Sequence[Part]) -> Iterator[str]:
    """How the order of axes differs, where the functions are the same."""
    counts = []
    for part in parts:
        steps = (part.steps.steps[k] for k in part.steps.back(part.end, part.stops))
        shown = (step for step in steps if step.eqn is not None and step.name in _IN_MEMORY)
        counts.append(Counter(f"{step.name} {_text(step.eqn)}" for step in shown))
    alone = [counts[0] - counts[1], counts[1] - counts[0]]
    if any(alone):
        texts = [", ".join([*each][:3]) or "nothing else" for each in alone]
        yield f"order of axes: Linen {texts[0]}; nnx {texts[1]}"


def _text(eqn: object) -> str:
    return ", ".join(f"{key}={value}" for key, value in described(eqn).items())
