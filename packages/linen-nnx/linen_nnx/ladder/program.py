"""The keys that a Linen module draws in a call, as a function of the keys given to the call.

Linen derives a key from the one given, the path of the scope and a count; `nn.scan`, `nn.vmap` and
`nn.jit` do so each in a way of their own. None of these ways is written down here: under `nn.scan`
even the count depends on how often Linen traces the loop's body. Instead the module is traced with
its draws tagged, and the equations that lead to a tag are the derivation, whatever they are.

A module that draws once at its top and once in each of three scanned layers is traced to

    a = fold_in(dropout, 97)                        tag "dropout/Dropout_0"
    s = split(dropout, 3)
    scan over s:   b = fold_in(s_i, 5)              tag "dropout/Layers/Dropout_0"
                   h = h * bernoulli(b)

What follows from `dropout` alone is known: `a`, `s`, and inside the loop `b` for each `s_i`, but
not `h`. So the program is `dropout -> (a, [b_0, b_1, b_2])`: of the loop's body, the known part is
run for all layers at once. A draw in a loop has lanes, one for each layer:

    >>> from linen_nnx.infer.keys import tag
    >>> def call(rngs, h):
    ...     a = tag(jax.random.fold_in(rngs["dropout"], 97), "dropout/Dropout_0")
    ...     def layer(h, s_i):
    ...         b = tag(jax.random.fold_in(s_i, 5), "dropout/Layers/Dropout_0")
    ...         return h * jax.random.bernoulli(b), None
    ...     s = jax.random.split(rngs["dropout"], 3)
    ...     return jax.lax.scan(layer, h * jax.random.bernoulli(a), s)[0]
    >>> program = trace(call, {"dropout": jax.random.key(0)}, np.ones(()))
    >>> for draw in program.draws:
    ...     print(draw.path, draw.lanes)
    dropout/Dropout_0 ()
    dropout/Layers/Dropout_0 (3,)
    >>> keys = program.keys({"dropout": jax.random.key(7)})
    >>> bool(keys["dropout/Dropout_0", 0] == jax.random.fold_in(jax.random.key(7), 97))
    True
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array
from jax.extend.core import jaxpr_as_fun

from linen_nnx.infer.jaxprs import bind, branches, called, inside, interpret, scan_parts
from linen_nnx.infer.keys import tag_of, typed

Lazy = Callable[[], Any] | None
"""Computes a value of a jaxpr when asked; None for a value that the given keys do not settle."""
# How often their bodies run does not stand in the jaxpr, or depends on the devices.
_UNCOUNTED = ("while", "shard_map", "pmap")
_NOT_FROM_KEYS = "its key depends on variables or inputs, or is carried from layer to layer"


class TaggedKey(NamedTuple):
    """A key in a jaxpr that carries the tag of a draw.

    name: the tag. lanes: the lengths of the loops around it, and the shape of its own array: the
    key differs from lane to lane. key: computes it. problem: why it cannot be computed, or empty.
    """

    name: str
    lanes: tuple[int, ...]
    key: Lazy
    problem: str = ""


class LinenDraw(NamedTuple):
    """A draw of the Linen module.

    path: who asked for it, `stream/module/...`. count: whether it is the first draw with this path
    (0), the second, ... in the order of the trace. lanes: the shape of its keys. problem: why no
    program gives them, or empty.
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
        keys = iter(jaxpr_as_fun(self.jaxpr)(*jax.tree.leaves(rngs)))
        result: dict[tuple[str, int], Array] = {}
        for draw in self.draws:
            if not draw.problem:
                result[draw.path, draw.count] = next(keys)
        return result


def trace(call: Callable[..., Any], rngs: Any, arrays: Any) -> Program:
    """The program of a call in which each draw of a Linen module is tagged.

    Args:
      call: `call(rngs, arrays)` runs the module; it is traced and not run.
      rngs: the keys of the call; `arrays`: its other arrays. Both may be tracers or abstract.
    """
    keys, others = jax.tree.map(_spec, (rngs, arrays))
    jaxpr = jax.make_jaxpr(call)(keys, others)
    unknown: list[Lazy] = [None] * len(jax.tree.leaves(others))

    def derive(rngs: Any) -> list[Array]:
        known = list(map(_constant, jax.tree.leaves(rngs)))
        found = harvest(jaxpr, [*known, *unknown])
        return [typed(draw.key()) for draw in found if draw.key is not None]

    # What is traced here is the derivation alone: every equation that no key needs is gone.
    derived = jax.make_jaxpr(derive)(keys)
    shapes = iter(derived.out_avals)
    counts = Counter[str]()
    draws: list[LinenDraw] = []
    # The same walk again, for the names; no value is asked for, so that shapes stand for the keys.
    for found in harvest(jaxpr, [*map(_constant, jax.tree.leaves(keys)), *unknown]):
        lanes = () if found.key is None else tuple(next(shapes).shape)
        draws.append(LinenDraw(found.name, counts[found.name], lanes, found.problem))
        counts[found.name] += 1
    return Program(tuple(draws), derived)


def harvest(jaxpr: Any, args: Sequence[Lazy]) -> list[TaggedKey]:
    """The tagged keys of a jaxpr, in the order of its equations, whatever loops they are in."""
    found: list[TaggedKey] = []
    _walk(jaxpr, args, found)
    return found


def _walk(jaxpr: Any, args: Sequence[Lazy], found: list[TaggedKey]) -> list[Lazy]:
    """Adds the tagged keys of a jaxpr to `found`; returns its outputs."""

    def equation(_: int, eqn: Any, given: list[Lazy]) -> Sequence[Lazy]:
        name, kind = tag_of(eqn), eqn.primitive.name
        if name is not None:
            shape = tuple(eqn.invars[0].aval.shape)
            found.append(TaggedKey(name, shape, given[0], "" if given[0] else _NOT_FROM_KEYS))
            # The tag itself is an identity: whoever uses the key gets the value as it was.
            return given
        if kind == "scan":
            found.extend(_scanned(eqn, given))
        elif kind == "cond":
            # The keys of both branches: which one is taken, the values alone decide.
            for branch in branches(eqn):
                _walk(branch, given[1:], found)
        elif kind in _UNCOUNTED:
            problem = f"drawn inside a {kind}: how many draws there are, only a run tells"
            for inner in inside(eqn):
                found.extend([TaggedKey(tag, (), None, problem) for tag in totals(inner)[0]])
        else:
            inner = called(eqn)
            if inner is not None:
                return _walk(inner, given, found)
        return _outputs(eqn, given)

    return interpret(jaxpr, args, _constant, equation)


def _scanned(eqn: Any, given: list[Lazy]) -> list[TaggedKey]:
    """The tagged keys of a scan's body: one for each row, or one for all where rows do not matter.

    What the loop carries is unknown: a key that is carried from row to row has no program.
    """
    scan = scan_parts(eqn)
    fixed, carried, rows = scan.operands(given)
    start: list[Lazy] = [*fixed, *[None] * len(carried)]
    # The body is walked twice. Without rows: a key that is known even so is one for all rows, as
    # where `nn.scan` does not split a stream. With them: a key that is known only now differs from
    # row to row. The rows given here are all of them at once, so that no value may be asked for.
    alike = harvest(scan.body, [*start, *[None] * len(rows)])
    each = harvest(scan.body, [*start, *rows])

    def all_rows() -> list[Array]:
        """Every key that `each` knows, with the rows as its first axis."""
        known = [row() for row in rows if row is not None]

        def one_row(*row: Array) -> list[Array]:
            values = iter(row)
            args: list[Lazy] = []
            for operand in rows:
                args.append(None if operand is None else _constant(next(values)))
            found = harvest(scan.body, [*start, *args])
            return [draw.key() for draw in found if draw.key is not None]

        return jax.vmap(one_row, axis_size=scan.length)(*known)

    keys = _once(all_rows)
    place = 0  # of a key among those that `all_rows` gives
    result: list[TaggedKey] = []
    for same, own in zip(alike, each, strict=True):
        if same.key is not None or own.key is None:
            result.append(same)
        else:
            key = _once(lambda place=place: keys()[place])
            result.append(TaggedKey(own.name, (scan.length, *own.lanes), key))
        place += own.key is not None
    return result


def _outputs(eqn: Any, given: list[Lazy]) -> list[Lazy]:
    """The outputs of an equation: known if all of its operands are."""
    if any(value is None for value in given):
        return [None] * len(eqn.outvars)

    def run() -> Sequence[Any]:
        return bind(eqn, [value() for value in given if value is not None])

    outs = _once(run)
    return [_once(lambda k=k: outs()[k]) for k in range(len(eqn.outvars))]


def totals(jaxpr: Any) -> tuple[Counter[str], set[str]]:
    """How many keys each tag names, each loop counted as often as it runs.

    Returns:
      `{tag: number of keys}`, and the tags that stand in a loop of unknown length.
    """
    sizes, uncounted = Counter[str](), set[str]()

    def visit(jaxpr: Any, times: int, counted: bool) -> None:
        for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
            kind = eqn.primitive.name
            name = tag_of(eqn)
            if name is not None:
                sizes[name] += times * prod(eqn.invars[0].aval.shape)
                if not counted:
                    uncounted.add(name)
            # A layer of 12 that are scanned stands in the jaxpr once, and draws 12 keys.
            rounds = scan_parts(eqn).length if kind == "scan" else 1
            for inner in inside(eqn):
                visit(inner, times * rounds, counted and kind not in _UNCOUNTED)

    visit(jaxpr, 1, True)
    return sizes, uncounted


def _once(compute: Callable[[], Any]) -> Callable[[], Any]:
    """The same function, which computes at most once.

    A value is used by many equations; computed anew for each, it would be traced as often.
    """
    known: list[Any] = []

    def value() -> Any:
        if not known:
            known.append(compute())
        return known[0]

    return value


def _constant(value: Any) -> Lazy:
    return lambda: value


def _spec(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)
