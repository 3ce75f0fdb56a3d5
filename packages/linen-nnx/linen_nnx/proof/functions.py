"""Says what two regions of a model do differently, where it is a function and not a setting.

    Linen: tanh(gelu_tanh(h @ w))              nnx: tanh(gelu_erf(h @ w))

    terms of Linen         of nnx              takes        among the other side's
    P = h @ w              P = h @ w           h, w         yes
    gelu_tanh(P)           gelu_erf(P)         P            no, though P is: here the two part
    tanh(gelu_tanh(P))     tanh(gelu_erf(P))   gelu...(P)   no, and what it takes is not either

    >>> import jax, jax.numpy as jnp
    >>> from linen_nnx.proof.unrolled import Unrolled
    >>> def region(function):
    ...     steps = Unrolled(jax.make_jaxpr(function)(jnp.ones(3)))
    ...     return Region(steps, steps.outs[0], leaves=0)
    >>> differences(region(jax.nn.gelu), region(lambda x: jax.nn.gelu(x, approximate=False)))
    ['gelu: Linen the tanh approximation, nnx exact, by erf']

Both regions are read as terms in one normal form (`terms.py`). Terms that part at the same place
are named beside each other and taken for one. Then both sides are read again, and what stands
behind that place is compared, too.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from linen_nnx.infer.jaxprs import described
from linen_nnx.proof import curves
from linen_nnx.proof.curves import Words
from linen_nnx.proof.read_terms import Region, read_term
from linen_nnx.proof.terms import Operation, Term, Terms

_SIDES = ("Linen", "nnx")
_MOST = 4  # differences said; behind so many the two regions are other models
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
# The operations that a function is said to act on: `1 / the root of the variance`.
_CONTEXTS = ("convolution", "matrix product", "mean", "mean of squares", "softmax", "variance")
_IN_MEMORY = ("dot_general", "reshape", "rev", "transpose")
Array = np.ndarray
Graph = dict[Term, tuple[Term, ...]]
"""All terms of a region, each with those that it takes, which come before it."""


class _Parting(NamedTuple):
    """The terms at which the sides part; None where one side has nothing for the other's."""

    linen: Term | None
    nnx: Term | None


def differences(one: Region, two: Region) -> list[str]:
    """What the Linen region and the nnx region do differently, a line each.

    The first lines are nearest to what both take. No line means that nothing is seen.
    """
    terms, found = Terms(), list[_Parting]()
    # Some partings are said in one line together, so twice as many as lines are looked for.
    for _ in range(2 * _MOST):
        linen, nnx = _graph(read_term(terms, one)), _graph(read_term(terms, two))
        parting = _next_parting(linen, nnx)
        if parting is None:
            break
        found.append(parting)
        if parting.linen is not None and parting.nnx is not None:
            terms.merged[parting.nnx] = parting.linen
        elif term := parting.linen or parting.nnx:
            # One side has something more: it is read as if it did nothing to what it acts on.
            terms.merged[term] = _main((linen | nnx)[term])
    lines = dict.fromkeys(_lines(found, terms))
    return list(lines)[:_MOST] or list(_in_memory(one, two))


def _graph(end: Term) -> Graph:
    """All terms below an end."""
    graph: Graph = {}
    # Depth first, without recursion: an unrolled scan may be thousands of terms deep.
    left = [(end, False)]
    while left:
        term, is_done = left.pop()
        if term.op is None or term in graph:
            continue
        # A function takes its operation; the operation, what it is made of.
        args = (Term(term.op),) if term.curve else term.op.args
        args = tuple(arg for arg in args if not _is_constant(arg))
        if is_done:
            graph[term] = args
        else:
            left.append((term, True))
            left += [(arg, False) for arg in reversed(args)]
    return graph


def _next_parting(linen: Graph, nnx: Graph) -> _Parting | None:
    """A place where the sides part, though they agree on all that is taken there."""
    ours, theirs = _forks(linen, nnx), _forks(nnx, linen)
    near = {(a, b): _nearness(linen[a], nnx[b], a, b) for a in ours for b in theirs}
    if not any(near.values()):
        if ours or theirs:
            return _Parting(ours[0], None) if ours else _Parting(None, theirs[0])
        return None
    one, two = max(near, key=lambda pair: near[pair])
    if not _alike(one, two):
        # Of softmax(x) against softmax(mask(x)), the softmax and the mask stand at the same place.
        # But the softmax follows later on the other side, so the mask is one side's alone.
        if _has_alike(two, _alone(linen, nnx)):
            return _Parting(one, None)
        if _has_alike(one, _alone(nnx, linen)):
            return _Parting(None, two)
    return _Parting(one, two)


def _alone(mine: Graph, theirs: Graph) -> list[Term]:
    """The terms of one side alone."""
    return [term for term in mine if term not in theirs]


def _forks(mine: Graph, theirs: Graph) -> list[Term]:
    """The terms of one side alone that take nothing of that side alone."""
    alone = _alone(mine, theirs)
    return [term for term in alone if not any(arg in alone for arg in mine[term])]


def _has_alike(term: Term, others: Sequence[Term]) -> bool:
    return any(_alike(term, other) for other in others)


def _nearness(ours: Sequence[Term], theirs: Sequence[Term], one: Term, two: Term) -> int:
    """How likely two terms stand for each other, by what they take; 0 if nothing speaks for it."""
    same = 2 * _alike(one, two) or int(_kind(one) == _kind(two) != "")
    # The same arguments say more than the same name: a model has many sums.
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
    """What a term is one of, where others may stand for it: `curve`, `softmax`; else nothing."""
    assert term.op is not None
    return "curve" if term.curve else _KINDS.get(term.op.name, "")


def _main(args: Sequence[Term]) -> Term:
    """What a term acts on; the number 0, if it takes nothing."""
    ops = [arg for arg in args if arg.op is not None]
    # Of x + bias and x * scale, x: leaves are what it is done with.
    for arg in ops:
        if arg.op and arg.op.name != "leaf":
            return arg
    return ops[0] if ops else Term.of_number(0.0)


def _lines(found: Sequence[_Parting], terms: Terms) -> Iterator[str]:
    """The partings in words, a line each."""
    moved = _moved_scale(found, terms)
    for parting in found:
        if moved and parting in moved[1]:
            if parting is moved[1][0]:
                yield moved[0]
            continue
        one = None if parting.linen is None else _words(parting.linen, terms)
        two = None if parting.nnx is None else _words(parting.nnx, terms)
        if one and two:
            if one == two or one.kind in ("mask", "softmax"):
                one, two = _by_params(parting, terms)
            if one.kind == two.kind:
                yield f"{one.kind}: Linen {one.text}, nnx {two.text}"
            else:
                yield f"function: Linen {_full(one)}, nnx {_full(two)}"
        elif words := one or two:
            yield f"{_full(words, ': ')}, in {_SIDES[one is None]} alone"


def _moved_scale(
    found: Sequence[_Parting], terms: Terms
) -> tuple[str, tuple[_Parting, _Parting]] | None:
    """The line for a softmax that one side scales before it and the other after it.

    Two partings show it: softmax(0.5 * x) against softmax(x), and `times 0.5` in nnx alone. Said
    each by itself they would read as two faults.
    """
    for parting in found:
        scales = [dict(term.op.params).get("scale") for term in parting if term and term.op]
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
                return text + f"{_SIDES[side]} after it", (parting, other)
    return None


def _full(words: Words, between: str = " ") -> str:
    """An operation with its kind, where its text alone does not tell."""
    generic = ("activation", "function", "operation")
    return words.text if words.kind in generic else f"{words.kind}{between}{words.text}"


def _words(term: Term, terms: Terms) -> Words:
    """A term in words."""
    op = term.op
    assert op is not None
    if term.curve:
        return _curve_in_words(op, terms.samples[term.curve])
    if op.name in ("softmax", "log of softmax", "mask"):
        return Words(_KINDS.get(op.name, op.name), _phrases(op))
    if op.name in ("sum", "product"):
        return Words("operation", f"the {op.name} of {len(op.args)} values")
    if op.name in ("mean", "largest", "mean of squares", "variance"):
        return Words(_KINDS.get(op.name, "operation"), f"the {op.name} {_phrases(op, 'axes')}")
    return Words("operation", op.name)


def _curve_in_words(op: Operation, samples: Array) -> Words:
    """A function of an operation in words."""
    if op.dtype_kind == "b":
        return curves.of_flags(samples)
    known = f"the {op.name}" if op.name in _CONTEXTS else "it"
    words = curves.name(samples, "a leaf" if op.name == "leaf" else known)
    # `times 2` alone would leave open of what.
    if op.name in _CONTEXTS and words.kind in ("function", "scale"):
        return words._replace(text=f"{words.text} (of {known})")
    return words


def _phrases(op: Operation, *only: str) -> str:
    """The parameters of an operation in words, all or `only` some."""
    shown = []
    for key, value in op.params:
        if not only or key in only:
            shown.append(_PHRASES.get(key, f"{key} {{}}").format(value))
    return ", ".join(shown)


def _by_params(parting: _Parting, terms: Terms) -> tuple[Words, Words]:
    """Two operations of one name by what they differ in: parameters, constants, or how many."""
    assert parting.linen is not None and parting.nnx is not None
    one, two = parting.linen.op, parting.nnx.op
    assert one is not None and two is not None
    ours, theirs = dict(one.params), dict(two.params)
    keys = [key for key in ours if ours[key] != theirs.get(key)]
    if keys:
        return Words(one.name, _phrases(one, *keys)), Words(one.name, _phrases(two, *keys))
    tables = _constant(one, terms), _constant(two, terms)
    return _by_constants(one, *tables), _by_constants(two, *reversed(tables))


def _constant(op: Operation, terms: Terms) -> Array | None:
    """The first constant that an operation takes, if there is one."""
    for arg in op.args:
        if arg.op and _is_constant(arg):
            return terms.table(arg.op)
    return None


def _by_constants(op: Operation, own: Array | None, other: Array | None) -> Words:
    """An operation by the constant that it takes, else by the number of its arguments."""
    if own is None:
        return Words(op.name, f"of {len(op.args)} values")
    words = _table(own)
    # The same numbers in another order: the first place where they differ tells.
    if other is not None and own.shape == other.shape and words == _table(other):
        for at in np.argwhere(own != other)[:1].tolist():
            words = words._replace(text=f"{words.text}, {own[tuple(at)]:.4g} at {at}")
    return words


def _table(table: Array) -> Words:
    """A constant in words."""
    if table.dtype == bool:
        return Words("constant mask", f"true at {int(table.sum())} of {table.size} places")
    shape = "x".join(map(str, table.shape))
    text = f"{shape} numbers from {table.min():.4g} to {table.max():.4g}"
    return Words("constants", f"{text}, in all {table.sum():.6g}")


def _is_constant(term: Term) -> bool:
    return term.op is not None and term.op.name == "constants"


def _in_memory(one: Region, two: Region) -> Iterator[str]:
    """How the order of axes differs, where the functions are the same.

    Terms do not say how values lie in memory. If they show no difference, a reshape with its axes
    in another order is what is left.
    """
    linen, nnx = _movements(one), _movements(two)
    ours, theirs = [*(linen - nnx)], [*(nnx - linen)]
    if ours or theirs:
        nothing = "nothing else"
        yield (
            f"order of axes: Linen {', '.join(ours[:3]) or nothing}; "
            f"nnx {', '.join(theirs[:3]) or nothing}"
        )


def _movements(region: Region) -> Counter[str]:
    """The equations of a region that move axes, in words, with how often each occurs."""
    counts: Counter[str] = Counter()
    for step in region.steps.of(region.steps.back(region.end, region.stops)):
        if step.eqn is not None and step.name in _IN_MEMORY:
            params = ", ".join(f"{key}={value}" for key, value in described(step.eqn).items())
            counts[f"{step.name} {params}"] += 1
    return counts
