"""Parts of two models as terms in one normal form, in which equal functions are equal terms.

    Linen: (q / 2) @ k.T                       nnx: (q @ k.T) * 0.5

    q / 2      "times 0.5" of q                q @ k.T    P, the matrix product of q and k
    ... @ k.T  "times 0.5" of P                ... * 0.5  "times 0.5" of P

    >>> terms = Terms()
    >>> q, k = terms.op("q"), terms.op("k")
    >>> scale, base = terms.factor(terms.scaled(q, 0.5))
    >>> early = terms.scaled(terms.op("matrix product", ordered([base, k])), scale)
    >>> late = terms.scaled(terms.op("matrix product", ordered([q, k])), 0.5)
    >>> early == late
    True

A term is an operation under a function of one number (`curves.py`). All that acts element by
element on one operation is one function, however many equations it takes: the six equations of a
gelu are one curve on the product before it. Where numbers go, and how sums, softmax and variances
are recognised, is in `algebra.py`; how equations become terms, in `read_terms.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from linen_nnx.proof import curves
from linen_nnx.proof.curves import GRID

Array = np.ndarray
Params = tuple[tuple[str, str], ...]


@dataclass(eq=False, frozen=True)
class Operation:
    """One operation; `Terms` keeps one object for all equal ones, so equality is identity.

    Attributes:
      name: `matrix product`, `softmax`, or a primitive of jax.
      args: what it takes.
      params: what else tells it from others of its name, the axes of a mean say.
      dtype_kind: `f` for floats, `i` for integers, `b` for booleans, `?` for others.
    """

    name: str
    args: tuple["Term", ...] = ()
    params: Params = ()
    dtype_kind: str = "f"


class Term(NamedTuple):
    """A function of an operation, or a number.

    Attributes:
      op: the operation; None for a number.
      curve: which function of it: an index of `Terms.samples`, 0 for the operation itself.
      number: the number, where there is no operation.
    """

    op: Operation | None
    curve: int = 0
    number: float = 0.0

    @classmethod
    def of_number(cls, value: float) -> "Term":
        """A number as a term."""
        return cls(None, 0, value)


class Terms:
    """The terms of two parts of models.

    Attributes:
      merged: terms that are taken for others, so that what stands behind them is read on.
      samples: the values at `GRID` of every function that terms have.
    """

    def __init__(self) -> None:
        self.merged: dict[Term, Term] = {}
        self.samples: list[Array] = [GRID]
        self._ops: dict[tuple[Any, ...], Operation] = {}
        self._tables: list[Array] = []

    def op(
        self, name: str, args: Sequence[Term] = (), params: Params = (), dtype_kind: str = "f"
    ) -> Term:
        """An operation as a term."""
        args = tuple(map(self.seen, args))
        key = name, args, params, dtype_kind
        made = self._ops.setdefault(key, Operation(*key))
        return self.seen(Term(made))

    def seen(self, term: Term) -> Term:
        """The term, or what it is taken for."""
        # A chain is no longer than there are entries; the bound also ends a chain in a circle.
        for _ in range(len(self.merged)):
            term = self.merged.get(term, term)
        return term

    # Constants

    def constant(self, array: Array) -> Term:
        """A constant: a number, or a table without the axes along which it repeats itself.

        Example:
            >>> Terms().constant(np.full((2, 3), 0.5))
            Term(op=None, curve=0, number=0.5)
        """
        small = _without_repeats(array)
        if small.size == 1:
            return Term.of_number(float(np.real(small.reshape(-1)[0])))
        small = small.squeeze()
        kind = dtype_kind(small.dtype)
        small = small.astype(np.float64) if kind == "f" else small
        return self.op("constants", params=(("number", str(self._kept(small))),), dtype_kind=kind)

    def table(self, op: Operation) -> Array:
        """The values of a constant."""
        return self._tables[int(dict(op.params)["number"])]

    def _kept(self, table: Array) -> int:
        """The number of a table, of an equal one if there is one."""
        for known, other in enumerate(self._tables):
            if _same(other, table):
                return known
        self._tables.append(table)
        return len(self._tables) - 1

    # Functions of one number

    def at(self, term: Term) -> Array:
        """(numbers,): the values of a term where its operation has those of `GRID`."""
        if term.op is None:
            return np.full(GRID.shape, term.number)
        if term.curve:
            return self.samples[term.curve]
        # Booleans and integers take what of the grid they can.
        if term.op.dtype_kind == "b":
            return GRID > 0
        if term.op.dtype_kind == "i":
            return np.round(GRID).astype(int)
        return GRID

    def curve(self, op: Operation, samples: Array) -> Term:
        """The function of an operation that has these values."""
        if curves.equal(samples, self.at(Term(op))):
            return Term(op)
        # A function that is constant takes nothing: 0 * x is the number 0.
        flat = samples[0] if samples.size else 0
        if np.isfinite(flat) and curves.equal(samples, np.full(GRID.shape, flat)):
            return Term.of_number(float(flat))
        for known, other in enumerate(self.samples):
            if other.dtype.kind == samples.dtype.kind and curves.equal(other, samples):
                return Term(op, known)
        self.samples.append(samples)
        return Term(op, len(self.samples) - 1)

    def scaled(self, term: Term, scale: float) -> Term:
        """A term times a number."""
        if term.op is None:
            return term._replace(number=term.number * scale)
        return term if scale == 1 else self.curve(term.op, self.at(term) * scale)

    def inverse(self, term: Term) -> Term:
        """1 divided by a term."""
        with np.errstate(all="ignore"):
            if term.op is None:
                return term._replace(number=float(np.float64(1) / term.number))
            return self.curve(term.op, 1 / self.at(term))

    def factor(self, term: Term) -> tuple[float, Term]:
        """A term as a number times another; the number is 1 where there is none."""
        if term.op is None or not term.curve or term.op.dtype_kind != "f":
            return 1.0, term
        scale = curves.factor(self.at(term))
        return (scale, Term(term.op)) if scale else (1.0, term)


def ordered(terms: Sequence[Term]) -> list[Term]:
    """Terms that may stand in any order, in one that is the same wherever they come from."""
    return sorted(terms, key=order)


def order(term: Term) -> tuple[bool, int, int, float]:
    """By what terms in any order are sorted."""
    # What is taken off (a mean, a maximum) comes last, so that x leads in x - mean(x).
    is_center = term.op is not None and term.op.name in ("largest", "mean")
    return is_center, id(term.op), term.curve, term.number


def inside(term: Term, name: str) -> tuple[Term, ...]:
    """The parts of a `sum` or a `product`, or the term itself."""
    if term.op is not None and not term.curve and term.op.name == name:
        return term.op.args
    return (term,)


def dtype_kind(dtype: Any) -> str:
    """`f`, `i`, `b` or `?`, as `Operation` has it; bfloat16, too, is `f`."""
    if jnp.issubdtype(dtype, jnp.floating):
        return "f"
    if jnp.issubdtype(dtype, jnp.integer):
        return "i"
    return "b" if jnp.issubdtype(dtype, jnp.bool_) else "?"


def _without_repeats(array: Array) -> Array:
    """An array with each axis along which it repeats itself cut to length 1.

    One side keeps a causal mask as (length, length), the other has it repeated for each head.
    """
    for axis in range(array.ndim):
        first = array[(*[slice(None)] * axis, slice(0, 1))]
        if array.shape[axis] and (array == first).all():
            array = first
    return array


def _same(one: Array, two: Array) -> bool:
    if one.shape != two.shape or dtype_kind(one.dtype) != dtype_kind(two.dtype):
        return False
    return np.allclose(one, two, rtol=1e-5, atol=1e-8, equal_nan=True)
