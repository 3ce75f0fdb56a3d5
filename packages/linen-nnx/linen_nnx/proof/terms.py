"""Parts of two models as terms in one normal form, in which equal functions are equal terms.

    Linen: (q / 2) @ k.T     nnx: (q @ k.T) * 0.5     both: 0.5 times <matrix product: q, k>

A term is an operation under a function of one number (`curves.py`): all that acts element by
element on one operation is one function, however many equations it takes. Numbers are pulled out
of products and means; sums and products are flat and have no order; softmax, means and variances
are recognised in the forms in which they are written. Axes that move, and casts to wider floats,
are left out: terms say which functions are applied, not how their values lie in memory.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from linen_nnx.infer.equations import ELEMENTWISE
from linen_nnx.infer.float64 import equation, wide
from linen_nnx.infer.jaxprs import described, param
from linen_nnx.proof import curves
from linen_nnx.proof.curves import GRID
from linen_nnx.proof.unrolled import Step, Unrolled

Array = np.ndarray
Params = tuple[tuple[str, str], ...]

_IN_PLACE = (
    "broadcast_in_dim copy copy_p device_put expand_dims name optimization_barrier "
    "reduce_precision reshape sharding_constraint squeeze stop_gradient transpose"
)
_MOVES = frozenset(_IN_PLACE.split())
_RANDOM = "random numbers"
_PSEUDO = ("row", "stack", "cond")  # steps whose equation is a whole loop or choice
_PARTS = ("slice", "split", "dynamic_slice", "gather", "row")
_ANY_ORDER = frozenset(["max", "min", "and", "or", "xor", "mul", "add", "add_any", "eq", "ne"])
_FOLD = 1 << 16  # constants of up to so many elements are computed on the way
_DEEP = 1e4  # what hides an element from a softmax, whatever the others are scaled by


@dataclass(eq=False, frozen=True)
class Op:
    """One operation; equal ones are one object. kind: of its dtype, `f`, `i`, `b` or another."""

    name: str
    args: tuple["Term", ...] = ()
    params: Params = ()
    kind: str = "f"


class Term(NamedTuple):
    """A function (its number among `Terms.samples`, 0 for none) of an operation, or a number."""

    op: Op | None
    curve: int = 0
    number: float = 0.0


@dataclass(frozen=True)
class Part:
    """What of a jaxpr to read: the step `end`, from the known values at `stops` on.

    stops: by the number of a step the name of its value; `whole`: the names of values of which the
    other side has the parts as values of their own. leaves: how many of the arguments are leaves.
    """

    steps: Unrolled
    end: int
    leaves: int
    stops: Mapping[int, str] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()


class Terms:
    """The terms of two parts. `merged`: terms that are taken for others, to read on behind them."""

    def __init__(self) -> None:
        self.merged: dict[Term, Term] = {}
        self.samples: list[Array] = [GRID]
        self._ops: dict[tuple[Any, ...], Op] = {}
        self._tables: list[Array] = []

    def read(self, part: Part) -> Term:
        """The term of a part's end."""
        values: dict[int, Term] = {}
        arrays: dict[int, Array] = {}
        for number in part.steps.back(part.end, part.stops):
            step = part.steps.steps[number]
            if name := part.stops.get(number):
                values[number] = self.op(name)
            elif step.name == "argument":
                name = "leaf" if step.place < part.leaves else f"input {step.place - part.leaves}"
                values[number] = self.op(name)
            elif (array := self._folded(step, arrays)) is not None:
                arrays[number] = array
                values[number] = self._constant(array)
            else:
                given = [values[k] for k in step.args]
                known = [arrays.get(k) for k in step.args]
                values[number] = self._term(step, given, known, part.whole)
        return self._seen(values[part.end])

    def op(
        self, name: str, args: Sequence[Term] = (), params: Params = (), kind: str = "f"
    ) -> Term:
        """An operation as a term."""
        args = tuple(map(self._seen, args))
        made = self._ops.setdefault((name, args, params, kind), Op(name, args, params, kind))
        return self._seen(Term(made))

    def table(self, op: Op) -> Array:
        """The value of a constant."""
        return self._tables[int(dict(op.params)["number"])]

    def _seen(self, term: Term) -> Term:
        """The term, or what it is taken for."""
        for _ in range(len(self.merged)):
            term = self.merged.get(term, term)
        return term

    # Constants

    def _folded(self, step: Step, arrays: Mapping[int, Array]) -> Array | None:
        """The value of a step of constants alone, in float64; None for other steps."""
        if step.name == "constant":
            known = _kind_of(jnp.result_type(step.value)) in ("f", "i", "b")
            return np.asarray(step.value) if known else None
        if any(number not in arrays for number in step.args):
            return None
        if step.name == "row":
            return arrays[step.args[0]][step.place]
        if step.name in _PSEUDO or _random(step.name):
            return None
        out = step.eqn.outvars[step.place].aval
        if out.size > _FOLD or _kind(step) not in ("f", "i", "b"):
            return None
        with jax.enable_x64(True):
            given = [jnp.asarray(wide(jnp.asarray(arrays[k]))) for k in step.args]
            return np.asarray(equation(step.eqn, given)[step.place])

    def _constant(self, array: Array) -> Term:
        """A number, or a table without the axes along which it repeats itself."""
        small = array
        for axis in range(array.ndim):
            first = small[(*[slice(None)] * axis, slice(0, 1))]
            small = first if small.shape[axis] and (small == first).all() else small
        if small.size == 1:
            return Term(None, 0, float(np.real(small.reshape(-1)[0])))
        small = small.squeeze()
        kind = _kind_of(small.dtype)
        small = small.astype(np.float64) if kind == "f" else small
        number = next((k for k, other in enumerate(self._tables) if _same(other, small)), None)
        if number is None:
            number = len(self._tables)
            self._tables.append(small)
        return self.op("constants", params=(("number", str(number)),), kind=kind)

    # One step

    def _term(
        self, step: Step, args: list[Term], known: list[Array | None], whole: frozenset[str]
    ) -> Term:
        name, first = step.name, args[0] if args else None
        if name in _MOVES:
            return args[step.place if name == "optimization_barrier" else 0]
        if _random(name) or any(arg.op and arg.op.name == _RANDOM for arg in args):
            if all(arg.op is None or arg.op.name in (_RANDOM, "constants") for arg in args):
                return self.op(_RANDOM)
            if name == "select_n" and args[0].op and args[0].op.name == _RANDOM:
                kept = next((arg for arg in args[1:] if arg.op is not None), args[0])
                return self.op("dropout", [self._factor(kept)[1]])
        if first is None:
            return self.op(name, kind=_kind(step))
        if name in _PARTS and first.op is not None:
            of_leaf = first.op.name == "leaf" and name != "gather"
            if of_leaf or first.op.name in whole:
                return first
        if name == "convert_element_type" and first.op is not None:
            return self._cast(step, first)
        if name in ELEMENTWISE:
            return self._elementwise(step, args, known)
        match name:
            case "reduce_sum":
                return self._sum(step, first)
            case "reduce_max" if first.op is not None:
                scale, base = self._factor(first)
                if scale > 0:
                    return self._scaled(self.op("largest", [base], _axes(step)), scale)
            case "dot_general" | "conv_general_dilated":
                (a, one), (b, two) = map(self._factor, args)
                if name == "dot_general":
                    return self._scaled(self.op("matrix product", _ordered([one, two])), a * b)
                return self._scaled(self.op("convolution", [one, two], _params(step)), a * b)
        return self.op(name, args, _params(step), _kind(step))

    def _cast(self, step: Step, first: Term) -> Term:
        """A cast to a narrower float is an operation; one to a wider is none."""
        old, new = step.eqn.invars[0].aval.dtype, step.eqn.outvars[0].aval.dtype
        floats = all(jnp.issubdtype(each, jnp.floating) for each in (old, new))
        if not floats:
            return self._elementwise(step, [first], [None])
        if jnp.finfo(new).bits < jnp.finfo(old).bits:
            return self.op(f"a cast to {new.name}", [first])
        return first

    def _elementwise(self, step: Step, args: list[Term], known: list[Array | None]) -> Term:
        roots = {arg.op for arg in args if arg.op is not None}
        kinds = {root.kind for root in roots} | {_kind(step)}
        if len(roots) <= 1 and kinds <= {*"fib"}:
            samples = self._evaluated(step, args)
            return self._curve(roots.pop(), samples) if roots else Term(None, 0, float(samples[0]))
        if kinds == {"f"}:
            match step.name:
                case "add" | "add_any":
                    return self._total(args)
                case "sub":
                    return self._total([args[0], self._scaled(args[1], -1)])
                case "mul":
                    return self._product(args)
                case "div":
                    return self._product([args[0], self._inverse(args[1])])
        if step.name == "select_n":
            return self._choice(args, known[0], _kind(step))
        args = _ordered(args) if step.name in _ANY_ORDER else args
        return self.op(step.name, args, kind=_kind(step))

    def _evaluated(self, step: Step, args: list[Term]) -> Array:
        """The values of an equation at the samples of its arguments."""
        given = []
        with jax.enable_x64(True):
            for arg, var in zip(args, step.eqn.invars, strict=True):
                kind = var.aval.dtype
                kind = jnp.float64 if jnp.issubdtype(kind, jnp.floating) else kind
                given.append(jnp.asarray(self._at(arg).astype(kind)))
            return np.asarray(equation(step.eqn, given)[step.place])

    def _at(self, term: Term) -> Array:
        """The values of a term where its operation has those of `GRID`."""
        if term.op is None:
            return np.full(GRID.shape, term.number)
        if term.curve:
            return self.samples[term.curve]
        return {"b": GRID > 0, "i": np.round(GRID).astype(int)}.get(term.op.kind, GRID)

    def _curve(self, op: Op, samples: Array) -> Term:
        if curves.equal(samples, self._at(Term(op))):
            return Term(op)
        flat = samples[0] if samples.size else 0
        if np.isfinite(flat) and curves.equal(samples, np.full(GRID.shape, flat)):
            return Term(None, 0, float(flat))
        for number, other in enumerate(self.samples):
            if other.dtype.kind == samples.dtype.kind and curves.equal(other, samples):
                return Term(op, number)
        self.samples.append(samples)
        return Term(op, len(self.samples) - 1)

    # Sums and products

    def _scaled(self, term: Term, scale: float) -> Term:
        if term.op is None:
            return term._replace(number=term.number * scale)
        return term if scale == 1 else self._curve(term.op, self._at(term) * scale)

    def _inverse(self, term: Term) -> Term:
        with np.errstate(all="ignore"):
            if term.op is None:
                return term._replace(number=float(np.float64(1) / term.number))
            return self._curve(term.op, 1 / self._at(term))

    def _factor(self, term: Term) -> tuple[float, Term]:
        """A term as a number times another; the number is 1 where there is none."""
        if term.op is None or not term.curve or term.op.kind != "f":
            return 1.0, term
        scale = curves.factor(self._at(term))
        return (scale, Term(term.op)) if scale else (1.0, term)

    def _total(self, args: Sequence[Term]) -> Term:
        offset, parts = 0.0, list[Term]()
        for arg in args:
            line = None if arg.op is None else curves.affine(self._at(arg))
            if arg.op is None:
                offset += arg.number
            elif line is None:
                parts.append(arg)
            else:
                offset += line[1]
                inner = _inside(Term(arg.op), "sum")
                parts += [self._scaled(part, line[0]) for part in inner]
        numbers, parts = self._grouped(parts, np.add)
        if not parts:
            return Term(None, 0, offset + sum(numbers))
        scale = self._common(parts)
        value = self._recognised([self._scaled(part, 1 / scale) for part in parts])
        value, offset = self._scaled(value, scale), offset + sum(numbers)
        if offset and value.op is not None:
            return self._curve(value.op, self._at(value) + offset)
        return value

    def _common(self, parts: Sequence[Term]) -> float:
        """What all parts of a sum are multiplied by, or by its negative; -1 turns `b - a` round."""
        scales = [self._factor(part)[0] for part in sorted(parts, key=_order)]
        size = abs(scales[0])
        same = all(math.isclose(abs(scale), size, rel_tol=1e-6) for scale in scales)
        balance = sum(map(np.sign, scales)) or scales[0]
        return float(np.copysign(size if same else 1.0, balance))

    def _grouped(
        self, parts: Sequence[Term], join: Callable[[Array, Array], Array]
    ) -> tuple[list[float], list[Term]]:
        """The numbers, and one part for each operation: functions of one operation are joined."""
        numbers = [part.number for part in parts if part.op is None]
        found: dict[Op, Array] = {}
        for part in parts:
            if part.op is not None:
                here = self._at(part)
                with np.errstate(all="ignore"):
                    found[part.op] = join(found[part.op], here) if part.op in found else here
        joined = [self._curve(op, samples) for op, samples in found.items()]
        numbers += [part.number for part in joined if part.op is None]
        return numbers, [part for part in joined if part.op is not None]

    def _recognised(self, parts: list[Term]) -> Term:
        """A sum of parts; a variance or the logarithm of a softmax, where it is one."""
        if len(parts) == 1:
            return parts[0]
        for part in parts:
            rest = [other for other in parts if other is not part]
            op = part.op
            if op is None or op.name != "mean":
                continue
            samples, inner = self._at(part), op.args[0]
            squared = self.op("mean of squares", [inner], op.params)
            if curves.equal(samples, -(GRID**2)) and rest == [squared]:
                return self.op("variance", [inner], op.params)
            scale = self._exponent(inner)
            with np.errstate(all="ignore"):
                normal = scale and curves.equal(samples, -np.log(_count(op) * GRID))
            if normal and inner.op is not None:
                shifted = [self._scaled(each, scale) for each in _inside(Term(inner.op), "sum")]
                if {*shifted} == {*rest}:
                    x = self._centred(inner.op, "largest") or Term(inner.op)
                    return self._softmax("log of softmax", x, op, scale)
        return self.op("sum", _ordered(parts))

    def _product(self, args: Sequence[Term]) -> Term:
        scale, parts = 1.0, list[Term]()
        for arg in args:
            here, base = self._factor(arg)
            scale *= here
            parts += _inside(base, "product")
        numbers, parts = self._grouped(parts, np.multiply)
        scale *= math.prod(numbers)
        if not parts:
            return Term(None, 0, scale)
        for part, other in itertools.permutations(parts, 2):
            if found := self._divided(part, other):
                rest = [each for each in parts if each not in (part, other)]
                return self._product([*rest, *found, Term(None, 0, scale)])
        product = parts[0] if len(parts) == 1 else self.op("product", _ordered(parts))
        return self._scaled(product, scale)

    def _divided(self, part: Term, other: Term) -> list[Term]:
        """The softmax that a product of exp(c * x) and k / sum(exp(c * x)) is, and k."""
        scale, mean = self._exponent(part), other.op
        if not scale or part.op is None or mean is None or mean.name != "mean":
            return []
        first = self._at(other)[GRID == 1][0]
        with np.errstate(all="ignore"):
            if mean.args[0] != part or not curves.equal(self._at(other), first / GRID):
                return []
        x = self._centred(part.op, "largest") or Term(part.op)
        share = float(first) * _count(mean)
        return [self._softmax("softmax", x, mean, scale), Term(None, 0, share)]

    def _softmax(self, name: str, x: Term, mean: Op, scale: float) -> Term:
        own, x = self._factor(x)
        axes = [pair for pair in mean.params if pair[0] == "axes"]
        return self.op(name, [x], (*axes, ("scale", f"{own * scale:.6g}")))

    def _exponent(self, term: Term) -> float:
        """c of exp(c * x), 0 for other functions."""
        if term.op is None or not term.curve:
            return 0.0
        with np.errstate(all="ignore"):
            scale = float(np.log(self._at(term)[GRID == 1][0]))
            return scale if curves.equal(self._at(term), np.exp(scale * GRID)) else 0.0

    def _centred(self, op: Op, center: str) -> Term | None:
        """x, if the operation is x less its mean, or its largest element."""
        if op.name != "sum":
            return None
        for part in op.args:
            if part.op is None or part.op.name != center or self._factor(part)[0] != -1:
                continue
            rest = {other for other in op.args if other is not part}
            x = part.op.args[0]
            if rest == {*_inside(x, "sum")}:
                return x
        return None

    def _sum(self, step: Step, first: Term) -> Term:
        """A sum over axes as a multiple of a mean; of squares, and of those of x less its mean."""
        params = _axes(step)
        count = int(dict(params)["count"])
        scale, base = self._factor(first)
        if base.op is None:
            return base._replace(number=base.number * count)
        square = float(self._at(base)[GRID == 1][0])
        if base.curve and square and curves.equal(self._at(base), square * GRID**2):
            x = self._centred(base.op, "mean")
            name = "mean of squares" if x is None else "variance"
            return self._scaled(self.op(name, [x or Term(base.op)], params), square * count)
        return self._scaled(self.op("mean", [base], params), scale * count)

    def _choice(self, args: list[Term], known: Array | None, kind: str) -> Term:
        """`select_n(where, a, b)`; a mask, if one of the two is a number."""
        where, *cases = args
        if where.op is None:
            return cases[int(where.number)]
        fills = [k for k, case in enumerate(cases) if case.op is None]
        if len(fills) != 1:
            return self.op("choice", args, kind=kind)
        fill, other = cases[fills[0]].number, cases[1 - fills[0]]
        if fills[0] == 0 and known is not None:
            where = self._constant(~known.astype(bool))
        elif fills[0] == 0 and where.op is not None and where.op.kind == "b":
            where = self._curve(where.op, ~self._at(where).astype(bool))
        scale, base = self._factor(other) if abs(fill) >= _DEEP else (1.0, other)
        masked = self.op("mask", [base, where], (("fill", f"{fill:.4g}"),), kind)
        return self._scaled(masked, scale)


def _inside(term: Term, name: str) -> tuple[Term, ...]:
    """The parts of a sum or product, or the term itself."""
    return (
        term.op.args if term.op is not None and not term.curve and term.op.name == name else (term,)
    )


def _ordered(terms: Sequence[Term]) -> list[Term]:
    """Terms of no order in one that is the same wherever they come from."""
    return sorted(terms, key=_order)


def _order(term: Term) -> tuple[bool, int, int, float]:
    """What is taken off (a mean, a maximum) comes last."""
    is_center = term.op is not None and term.op.name in ("largest", "mean")
    return is_center, id(term.op), term.curve, term.number


def _random(name: str) -> bool:
    return name.startswith(("random_", "threefry"))


def _kind(step: Step) -> str:
    """The kind of a step's dtype: `f`, `i`, `b`, or `?`."""
    if step.eqn is None or step.name in _PSEUDO:
        return "f"
    return _kind_of(step.eqn.outvars[step.place].aval.dtype)


def _kind_of(dtype: Any) -> str:
    if jnp.issubdtype(dtype, jnp.floating):
        return "f"
    if jnp.issubdtype(dtype, jnp.integer):
        return "i"
    return "b" if jnp.issubdtype(dtype, jnp.bool_) else "?"


def _same(one: Array, two: Array) -> bool:
    if one.shape != two.shape or _kind_of(one.dtype) != _kind_of(two.dtype):
        return False
    return np.allclose(one, two, rtol=1e-5, atol=1e-8, equal_nan=True)


def _axes(step: Step) -> Params:
    """The axes of a reduction, counted from the last, and how many elements it takes."""
    shape = step.eqn.invars[0].aval.shape
    axes = param(step.eqn, "axes")
    count = int(np.prod([shape[axis] for axis in axes]))
    shown = ", ".join(str(axis - len(shape)) for axis in sorted(axes))
    return ("axes", shown), ("count", str(count))


def _count(mean: Op) -> int:
    return int(dict(mean.params)["count"])


def _params(step: Step) -> Params:
    """What else an operation is given, as text."""
    if step.eqn is None or step.name in _PSEUDO:
        return (("step", str(step.place)),) if step.name == "row" else ()
    found = described(step.eqn)
    if len(step.eqn.outvars) > 1:
        found["result"] = str(step.place)
    return tuple(sorted(found.items()))
