"""The keys that a Linen module draws in a call, as a function of the keys given to the call.

Linen derives a key from the one given, the scope's path and a count; `nn.scan`, `nn.vmap` and
`nn.jit` each in a way of their own. Nothing of that is imitated here: the module is traced with its
draws tagged, and the equations that lead to a tag are the derivation. For a module that draws once
at its top and once in each of three scanned layers the traced equations are, in short,

    a = fold_in(dropout, 97)                        tag "dropout/Dropout_0"
    s = split(dropout, 3)
    scan over s:   b = fold_in(s_i, 5)              tag "dropout/Layers/Dropout_0"
                   h = bernoulli(b) * h @ kernel_i

What follows from `dropout` alone is known: `a`, `s`, and in the loop `b` for each `s_i`, but not
`h`. So the program is `dropout -> (a, [b_0, b_1, b_2])`: the loop's body, as far as it is known,
run for all layers at once. The draws' lanes are `()` and `(3,)`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.extend.core import jaxpr_as_fun

from linen_nnx.infer.jaxprs import bind, branches, called, interpret, scan_parts
from linen_nnx.infer.keys import tag_of, typed

Value = Callable[[], Any] | None
"""Computes a value of a jaxpr when asked; None where it does not follow from the known inputs."""
_UNCOUNTED = ("while", "shard_map", "pmap")


class Found(NamedTuple):
    """A tagged key in a jaxpr.

    lanes: the lengths of the loops around it and of its own array, over which the key differs.
    """

    name: str
    lanes: tuple[int, ...]
    key: Value
    problem: str = ""


class LinenDraw(NamedTuple):
    """A draw of the Linen module: asked for by `path` (`stream/module/...`), for the n-th time.

    lanes: the shape of the keys that it gives. problem: why no program gives them, or empty.
    """

    path: str
    count: int
    lanes: tuple[int, ...]
    problem: str = ""


@dataclass(frozen=True)
class Program:
    """The draws of one kind of call, in the order of their equations, and their keys."""

    draws: tuple[LinenDraw, ...]
    jaxpr: Any

    def keys(self, rngs: dict[str, Array]) -> dict[tuple[str, int], Array]:
        """`{(path, count): typed keys of the shape lanes}` of the draws without a problem."""
        outs = jaxpr_as_fun(self.jaxpr)(*jax.tree.leaves(rngs))
        fine = [draw for draw in self.draws if not draw.problem]
        return {(draw.path, draw.count): key for draw, key in zip(fine, outs, strict=True)}


def trace(call: Callable[..., Any], rngs: Any, arrays: Any) -> Program:
    """The program of `call(rngs, arrays)`, in which each draw of a Linen module is tagged.

    Nothing is computed: `rngs` and `arrays` may be tracers or abstract.
    """
    specs = jax.tree.map(_spec, (rngs, arrays))
    jaxpr = jax.make_jaxpr(call)(*specs)
    unknown: list[Value] = [None] * (len(jaxpr.in_avals) - len(jax.tree.leaves(specs[0])))

    def derive(rngs: Any) -> list[Array]:
        known = [_constant(leaf) for leaf in jax.tree.leaves(rngs)]
        found = harvest(jaxpr, [*known, *unknown])
        return [typed(draw.key()) for draw in found if draw.key is not None]

    derived = jax.make_jaxpr(derive)(specs[0])
    shapes = iter(derived.out_avals)
    counts = Counter[str]()
    draws = []
    for draw in harvest(jaxpr, [*map(_constant, jax.tree.leaves(specs[0])), *unknown]):
        lanes = () if draw.key is None else tuple(next(shapes).shape)
        draws.append(LinenDraw(draw.name, counts[draw.name], lanes, draw.problem))
        counts[draw.name] += 1
    return Program(tuple(draws), derived)


def harvest(jaxpr: Any, args: Sequence[Value]) -> list[Found]:
    """The tagged keys of a jaxpr, in the order of its equations, whatever loops they are in."""
    found: list[Found] = []
    _walk(jaxpr, args, found)
    return found


def _walk(jaxpr: Any, args: Sequence[Value], found: list[Found]) -> list[Value]:
    def equation(_: int, eqn: Any, given: list[Value]) -> Sequence[Value]:
        if (name := tag_of(eqn)) is not None:
            lost = "its key depends on variables or inputs, or is carried from layer to layer"
            shape = tuple(eqn.invars[0].aval.shape)
            found.append(Found(name, shape, given[0], "" if given[0] else lost))
            return given
        kind = eqn.primitive.name
        if kind == "scan":
            found.extend(_scanned(eqn, given))
        elif kind == "cond":
            for branch in branches(eqn):
                _walk(branch, given[1:], found)
        elif kind in _UNCOUNTED:
            lost = f"drawn inside a {kind}: how many draws there are, only a run tells"
            inside = [name for inner in _inner(eqn) for name in totals(inner)[0]]
            found.extend(Found(name, (), None, lost) for name in inside)
        elif (inner := called(eqn)) is not None:
            return _walk(inner, given, found)
        return _outputs(eqn, given)

    return interpret(jaxpr, args, _constant, equation)


def _scanned(eqn: Any, given: list[Value]) -> list[Found]:
    """The tagged keys of a scan's body: one for each row, or one for all where rows do not matter.

    What the loop carries is unknown: a key that is carried from row to row has no program.
    """
    scan = scan_parts(eqn)
    fixed, carried, rows = scan.operands(given)
    start: list[Value] = [*fixed, *[None] * len(carried)]
    alike = harvest(scan.body, [*start, *[None] * len(rows)])
    each = harvest(scan.body, [*start, *rows])  # the values of all rows at once: not to be computed

    def every() -> list[Array]:
        known = [row() for row in rows if row is not None]

        def one(*row: Array) -> list[Array]:
            values = iter(map(_constant, row))
            args = [None if row is None else next(values) for row in rows]
            found = harvest(scan.body, [*start, *args])
            return [draw.key() for draw in found if draw.key is not None]

        return jax.vmap(one, axis_size=scan.length)(*known)

    keys = _once(every)
    place = 0
    result = []
    for same, own in zip(alike, each, strict=True):
        if same.key is not None or own.key is None:
            result.append(same)
        else:
            key = _once(lambda place=place: keys()[place])
            result.append(Found(own.name, (scan.length, *own.lanes), key))
        place += own.key is not None
    return result


def _outputs(eqn: Any, given: list[Value]) -> list[Value]:
    """What an equation gives: known if all of its operands are."""
    if any(value is None for value in given):
        return [None] * len(eqn.outvars)

    def run() -> Sequence[Any]:
        return bind(eqn, [value() for value in given if value is not None])

    outs = _once(run)
    return [_once(lambda k=k: outs()[k]) for k in range(len(eqn.outvars))]


def totals(jaxpr: Any) -> tuple[Counter[str], set[str]]:
    """How many keys each tag names, loops counted out; and the tags that no trace can count."""
    sizes, uncounted = Counter[str](), set[str]()

    def visit(jaxpr: Any, times: int, counted: bool) -> None:
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            kind = eqn.primitive.name
            if (name := tag_of(eqn)) is not None:
                sizes[name] += times * prod(eqn.invars[0].aval.shape)
                uncounted.update([] if counted else [name])
            rounds = scan_parts(eqn).length if kind == "scan" else 1
            for inner in _inner(eqn):
                visit(inner, times * rounds, counted and kind not in _UNCOUNTED)

    visit(jaxpr, 1, True)
    return sizes, uncounted


def _inner(eqn: Any) -> Iterator[Any]:
    """The jaxprs that an equation runs."""
    for value in eqn.params.values():
        for each in [*value] if isinstance(value, (tuple, list)) else [value]:
            if hasattr(getattr(each, "jaxpr", each), "eqns"):
                yield each


def _once(compute: Callable[[], Any]) -> Callable[[], Any]:
    """The same, computed at most once."""
    known: list[Any] = []

    def value() -> Any:
        if not known:
            known.append(compute())
        return known[0]

    return value


def _constant(value: Any) -> Value:
    return lambda: value


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)
