"""Reads a region of a jaxpr as a term (`terms.py`), an equation at a time.

    h = tanh(0.5 * (x @ w) + 1)        step           term
                                       argument x     leaf or input 0
                                       argument w     leaf
                                       dot_general    P, the matrix product of the two
                                       mul 0.5        "times 0.5" of P
                                       add 1          "times 0.5, plus 1" of P
                                       tanh           one curve of P, known by its values

Axes that move, and casts to wider floats, are left out: terms say which functions are applied, not
how their values lie in memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from linen_nnx.infer.equations import ELEMENTWISE
from linen_nnx.infer.float64 import equation, wide
from linen_nnx.infer.jaxprs import described, param
from linen_nnx.proof import algebra
from linen_nnx.proof.terms import Params, Term, Terms, dtype_kind, ordered
from linen_nnx.proof.unrolled import Step, Unrolled

Array = np.ndarray

_IN_PLACE = (
    "broadcast_in_dim copy copy_p device_put expand_dims name optimization_barrier "
    "reduce_precision reshape sharding_constraint squeeze stop_gradient transpose"
)
_MOVES = frozenset(_IN_PLACE.split())
_RANDOM = "random numbers"
# The steps whose equation is a whole loop or choice, and says nothing of the step itself.
_PSEUDO = ("row", "rows", "cond")
_PARTS = ("slice", "split", "unstack", "dynamic_slice", "gather", "row")
_ANY_ORDER = frozenset(["max", "min", "and", "or", "xor", "mul", "add", "add_any", "eq", "ne"])
# Constants of up to so many elements are computed on the way: a mask of 256 x 256, but no table of
# positions for a long context, which would be kept in float64.
_FOLD = 1 << 16
# A number as large as this hides an element from a softmax, whatever the others are scaled by: so
# -1e9 * 0.5 and -1e9 are one fill.
_DEEP = 1e4


@dataclass(frozen=True)
class Region:
    """What of a jaxpr to read: the step `end`, from known values on.

    Attributes:
      steps: the jaxpr.
      end: the number of the step to read.
      leaves: how many of the arguments are leaves of the model; the others are inputs.
      stops: by the number of a step, the name of its value, where it is known to agree with a
        value of the other side.
      whole: the names of values of which the other side has the parts as values of their own.
    """

    steps: Unrolled
    end: int
    leaves: int
    stops: Mapping[int, str] = field(default_factory=dict)
    whole: frozenset[str] = frozenset()


def read_term(terms: Terms, region: Region) -> Term:
    """The term of a region's end.

    Example:
        >>> def read(function):
        ...     steps = Unrolled(jax.make_jaxpr(function)(jnp.ones((2, 2))))
        ...     return read_term(terms, Region(steps, steps.outs[0], leaves=0))
        >>> terms = Terms()
        >>> read(lambda x: (x / 2) @ x.T) == read(lambda x: (x @ x.T) * 0.5)
        True
    """
    return _Reader(terms, region).run()


class _Reader:
    def __init__(self, terms: Terms, region: Region) -> None:
        self.terms, self.region = terms, region
        self.values: dict[int, Term] = {}
        self.arrays: dict[int, Array] = {}  # of the steps that take nothing but constants

    def run(self) -> Term:
        region = self.region
        for number in region.steps.back(region.end, region.stops):
            self.values[number] = self.read(number, region.steps.steps[number])
        return self.terms.seen(self.values[region.end])

    def read(self, number: int, step: Step) -> Term:
        """The term of one step, given those of all that it takes."""
        if name := self.region.stops.get(number):
            return self.terms.op(name)
        if step.name == "argument":
            place = step.place - self.region.leaves
            return self.terms.op("leaf" if place < 0 else f"input {place}")
        if (array := self.folded(step)) is not None:
            self.arrays[number] = array
            return self.terms.constant(array)
        args = [self.values[k] for k in step.args]
        known = [self.arrays.get(k) for k in step.args]
        return self.term(step, args, known)

    def folded(self, step: Step) -> Array | None:
        """The value of a step that takes constants alone, in float64; None for other steps."""
        if step.name == "constant":
            known = dtype_kind(jnp.result_type(step.value)) in ("f", "i", "b")
            return np.asarray(step.value) if known else None
        if any(number not in self.arrays for number in step.args):
            return None
        if step.name == "row":
            return self.arrays[step.args[0]][step.place]
        if step.name in _PSEUDO or _is_random(step.name):
            return None
        out = step.eqn.outvars[step.place].aval
        if out.size > _FOLD or _kind(step) not in ("f", "i", "b"):
            return None
        with jax.enable_x64(True):
            given = [jnp.asarray(wide(jnp.asarray(self.arrays[k]))) for k in step.args]
            return np.asarray(equation(step.eqn, given)[step.place])

    def term(self, step: Step, args: list[Term], known: list[Array | None]) -> Term:
        """The term of an equation; `known` holds the value of each argument that is constant."""
        terms, name = self.terms, step.name
        if name in _MOVES:
            return args[step.place if name == "optimization_barrier" else 0]
        if (random := self.random(step, args)) is not None:
            return random
        if not args:
            return terms.op(name, dtype_kind=_kind(step))
        first = args[0]
        if name in _PARTS and first.op is not None:
            # A layer's row of a stacked leaf is a leaf where the other side has a list of layers;
            # a lookup in an embedding is more than that. And `q` cut from `qkv` is `qkv`'s value.
            of_leaf = first.op.name == "leaf" and name != "gather"
            if of_leaf or first.op.name in self.region.whole:
                return first
        if name == "convert_element_type" and first.op is not None:
            return self.cast(step, first)
        if name in ELEMENTWISE:
            return self.elementwise(step, args, known)
        match name:
            case "reduce_sum":
                return algebra.summed(terms, first, _axes(step))
            case "reduce_max" if first.op is not None:
                # A positive factor goes outside; a negative one would make it a minimum.
                scale, base = terms.factor(first)
                if scale > 0:
                    return terms.scaled(terms.op("largest", [base], _axes(step)), scale)
            case "dot_general":
                (a, one), (b, two) = map(terms.factor, args)
                # Twins contract the same arrays in either order.
                return terms.scaled(terms.op("matrix product", ordered([one, two])), a * b)
            case "conv_general_dilated":
                (a, one), (b, two) = map(terms.factor, args)
                return terms.scaled(terms.op("convolution", [one, two], _params(step)), a * b)
        return terms.op(name, args, _params(step), _kind(step))

    def random(self, step: Step, args: list[Term]) -> Term | None:
        """What is drawn, and dropout, which keeps or drops by what is drawn; None for the rest.

        Each side draws in its own way, by another key: that both draw is all that is compared.
        """
        names = [arg.op.name for arg in args if arg.op is not None]
        if not _is_random(step.name) and _RANDOM not in names:
            return None
        if {*names} <= {_RANDOM, "constants"}:
            return self.terms.op(_RANDOM)
        if step.name == "select_n" and args[0].op and args[0].op.name == _RANDOM:
            kept = next((arg for arg in args[1:] if arg.op is not None), args[0])
            # Without its factor, 1 / (1 - rate): the rate is a setting, and `lint` names it.
            return self.terms.op("dropout", [self.terms.factor(kept)[1]])
        return None

    def cast(self, step: Step, first: Term) -> Term:
        """A cast to a narrower float is an operation; one to a wider is none."""
        old, new = step.eqn.invars[0].aval.dtype, step.eqn.outvars[0].aval.dtype
        floats = jnp.issubdtype(old, jnp.floating) and jnp.issubdtype(new, jnp.floating)
        if not floats:
            return self.elementwise(step, [first], [None])
        if jnp.finfo(new).bits < jnp.finfo(old).bits:
            return self.terms.op(f"a cast to {new.name}", [first])
        return first

    def elementwise(self, step: Step, args: list[Term], known: list[Array | None]) -> Term:
        """An equation that keeps every element in its place."""
        terms = self.terms
        roots = {arg.op for arg in args if arg.op is not None}
        kinds = {root.dtype_kind for root in roots} | {_kind(step)}
        # All of it acts on one operation: then it is a function of one number, known by values.
        if len(roots) <= 1 and kinds <= {*"fib"}:
            samples = self.evaluated(step, args)
            return terms.curve(roots.pop(), samples) if roots else Term.of_number(float(samples[0]))
        if kinds == {"f"}:
            match step.name:
                case "add" | "add_any":
                    return algebra.total(terms, args)
                case "sub":
                    return algebra.total(terms, [args[0], terms.scaled(args[1], -1)])
                case "mul":
                    return algebra.product(terms, args)
                case "div":
                    return algebra.product(terms, [args[0], terms.inverse(args[1])])
        if step.name == "select_n":
            return self.choice(args, known[0], _kind(step))
        args = ordered(args) if step.name in _ANY_ORDER else args
        return terms.op(step.name, args, dtype_kind=_kind(step))

    def evaluated(self, step: Step, args: list[Term]) -> Array:
        """(numbers,): the values of an equation at the samples of its arguments."""
        given = []
        with jax.enable_x64(True):
            for arg, var in zip(args, step.eqn.invars, strict=True):
                dtype = var.aval.dtype
                dtype = jnp.float64 if jnp.issubdtype(dtype, jnp.floating) else dtype
                given.append(jnp.asarray(self.terms.at(arg).astype(dtype)))
            return np.asarray(equation(step.eqn, given)[step.place])

    def choice(self, args: list[Term], known: Array | None, kind: str) -> Term:
        """`select_n(where, a, b)`: a where it is false, b where it is true.

        If one of the two is a number, this is a mask, and the other is what it lets through.
        """
        terms = self.terms
        where, *cases = args
        if where.op is None:
            return cases[int(where.number)]
        fills = [k for k, case in enumerate(cases) if case.op is None]
        if len(fills) != 1:
            return terms.op("choice", args, dtype_kind=kind)
        fill, other = cases[fills[0]].number, cases[1 - fills[0]]
        # Masks say where the fill stands: turned round where it stands at `false`, so that
        # where(mask, x, -inf) and where(~mask, -inf, x) are one.
        if fills[0] == 0:
            if known is not None:
                where = terms.constant(~known.astype(bool))
            elif where.op.dtype_kind == "b":
                where = terms.curve(where.op, ~terms.at(where).astype(bool))
        scale, base = terms.factor(other) if abs(fill) >= _DEEP else (1.0, other)
        masked = terms.op("mask", [base, where], (("fill", f"{fill:.4g}"),), kind)
        return terms.scaled(masked, scale)


def _is_random(name: str) -> bool:
    return name.startswith(("random_", "threefry"))


def _kind(step: Step) -> str:
    """The kind of a step's dtype, as `Operation` has it."""
    if step.eqn is None or step.name in _PSEUDO:
        return "f"
    return dtype_kind(step.eqn.outvars[step.place].aval.dtype)


def _axes(step: Step) -> Params:
    """The axes of a reduction, and how many elements it takes."""
    shape = step.eqn.invars[0].aval.shape
    axes: Any = param(step.eqn, "axes")
    count = int(np.prod([shape[axis] for axis in axes]))
    # Counted from the last: one side may have a batch axis more.
    shown = ", ".join(str(axis - len(shape)) for axis in sorted(axes))
    return ("axes", shown), ("count", str(count))


def _params(step: Step) -> Params:
    """What else an operation is given, as text."""
    if step.name == "row":
        return (("step", str(step.place)),)
    if step.eqn is None or step.name in _PSEUDO:
        return ()
    found: dict[str, str] = described(step.eqn)
    if len(step.eqn.outvars) > 1:
        found["result"] = str(step.place)
    return tuple(sorted(found.items()))
