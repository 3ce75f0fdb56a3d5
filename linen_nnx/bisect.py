"""Finds the first layer at which twins part: same inputs, same weights, every layer compared.

    found = bisect(twin, checkpoints=["linen_ckpt"])
    print(found.first)          # None, or the first layer whose output diverges

Both sides run one equation at a time (`record.py`), and what the equations give that use paired
leaves is compared. Each side is run in float64 as well: what differs there is no rounding, and how
far a side is from its own float64 run is what rounding may do.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from linen_nnx.compare import Error, Value, Verdict, aligned, judge
from linen_nnx.fingerprints import lively
from linen_nnx.lint import lint, watch
from linen_nnx.mates import gather, mates, side_of, weights
from linen_nnx.record import Mode, record
from linen_nnx.rules import RuleBook
from linen_nnx.sides import Side
from linen_nnx.suggest import suggest
from linen_nnx.trace import trace_linen, trace_nnx
from linen_nnx.twin import Twin

Array = np.ndarray
AGREE = ("exact", "rounding", "absorbed")
_RANKS = ("other form", "exact", "rounding", "absorbed", "DIVERGES", "NaN")


@dataclass(frozen=True)
class Layer:
    """One line of a bisection: a layer of both twins, an updated leaf, or an output.

    leaf: the Linen leaf after whose use the values were compared; shape: theirs.
    before: the worst error of the layers that feed it, None where only inputs do.
    after: the error of what it gives, None where the sides' values have no common form.
    verdict: exact, rounding, DIVERGES, NaN; `absorbed`, if it differs but all that is computed
      from it agrees; `other form`, if there is no `after`.
    inside: whether the inputs of the equation at which it diverges agree; None if unknown.
    """

    linen: str
    nnx: str
    leaf: str
    shape: str
    before: Error | None
    after: Error | None
    verdict: Verdict
    inside: bool | None = None


@dataclass(frozen=True)
class Bisection:
    """All layers in the order of first use, then updated leaves and outputs.

    first: the first layer that diverges; findings: of the lint; notes: on how it was run.
    """

    layers: tuple[Layer, ...]
    first: Layer | None
    findings: tuple[str, ...]
    notes: tuple[str, ...]


def bisect(
    twin: Twin,
    book: RuleBook | str | Path | None = None,
    checkpoints: Sequence[str | Path] = (),
) -> Bisection:
    """Compares twins layer by layer.

    Args:
      twin: both models and their inputs. An input that is all one value gets noise.
      book: the rule book, or its file; default: what `suggest` finds. Leaves without a rule are
        paired by their order of first use, and `notes` says so.
      checkpoints: none for seeded random weights; one, of either form, for its weights on both
        sides; two, one of each form.

    Raises:
      TwinError: when a part of the twin cannot be built or called.
      RuleError: when the rules or the checkpoints do not fit the twin.
      StoreError: when a checkpoint cannot be read.
    """
    watched, configs = watch(twin)
    linen, nnx = side_of(trace_linen(watched)), side_of(trace_nnx(watched))
    if not isinstance(book, RuleBook):
        book = suggest(twin) if book is None else RuleBook.load(book)
    mate, notes = mates(linen, nnx, book)
    *leaves, more = weights(linen, nnx, book, mate, checkpoints)
    inputs = []
    for number, array in enumerate(linen.trace.inputs):
        even = (
            array.size > 1 and array.dtype.kind in "fiu" and bool((array == array.ravel()[0]).all())
        )
        inputs.append(jnp.asarray(lively(array, number), array.dtype) if even else array)
        notes += [f"input {number} was all one value, which hides much: it got noise"] * even
    both = _Half(linen, leaves[0], inputs), _Half(nnx, leaves[1], inputs)
    found = _Comparison(both, mate)
    layers, first = found.layers()
    return Bisection(tuple(layers), first, tuple(lint(configs, found.modules())), (*notes, *more))


class _Half:
    """One side, its weights, and all that it gave on them."""

    def __init__(self, side: Side, leaves: dict[str, Any], inputs: Sequence[Any]) -> None:
        self.side, self.flow = side, side.flow
        args = [*(jnp.asarray(leaves[path]) for path in side.paths), *inputs]
        jaxpr, sites = side.trace.jaxpr, {use.site for use in side.flow.uses.values()}
        runs = [record(jaxpr, args, sites, mode) for mode in get_args(Mode)]
        self.records = [records for _, records in runs]
        outs = [out for out, _ in runs]
        count = len(outs[0]) - len(side.trace.updates)
        values = list(map(Value.of, *outs))
        self.outs = values[:count]
        compiled = jax.jit(jaxpr_as_fun(jaxpr))(*args)
        self.compiled = list(map(Value.of, compiled, *outs[1:]))[:count]
        old = {path: Value.of(a, a, a) for path, a in zip(side.paths, args, strict=False)}
        self.leaves = {**old, **dict(zip(side.trace.updates, values[count:], strict=True))}

    @cached_property
    def above(self) -> dict[int, set[int]]:
        """For each use the uses that flow into it."""
        owners = [int(self.flow.owner[slot.ids[0, 0]]) for slot in self.flow.slots]
        above: dict[int, set[int]] = {use: set() for use in self.flow.uses}
        for owner, row in zip(owners, self.flow.above, strict=True):
            above[owner] |= {owners[k] for k in np.flatnonzero(row)} - {owner}
        return above

    @cached_property
    def leaf(self) -> dict[int, str]:
        """For each use the leaf, or the first of its leaves."""
        first: dict[int, str] = {}
        for slot, path in zip(self.flow.slots, self.side.first, strict=True):
            first.setdefault(int(self.flow.owner[slot.ids[0, 0]]), path)
        return first

    def layer(self, use: int) -> str:
        """The path of the module that holds the leaf of a use, and the steps of scans around it."""
        path, steps = module_of(self.side, self.leaf[use]), self.steps(use)
        return f"{path}{list(steps)}" if path in self.stepping else path

    def steps(self, use: int) -> tuple[int, ...]:
        found = self.records[0].get(self.flow.uses[use].site)
        return found.steps if found else ()

    @cached_property
    def stepping(self) -> set[str]:
        """Modules that are used in more than one step of a scan."""
        return {
            module_of(self.side, path) for use, path in self.leaf.items() if any(self.steps(use))
        }

    def value(self, use: int) -> Value | None:
        """What the equation of a use gives."""
        at = self.flow.uses[use]
        if at.site not in self.records[0]:
            return None
        outs = [records[at.site].outs for records in self.records]
        fit = [k for k, out in enumerate(outs[0]) if out.shape == at.columns.shape]
        return Value.of(*(each[fit[0] if fit else 0] for each in outs))

    def inputs(self, use: int) -> list[Value]:
        """What flows into the equation of a use."""
        at = self.flow.uses[use]
        args = [records[at.site].args for records in self.records]
        return [Value.of(*(each[k] for each in args)) for k in at.inputs]


def module_of(side: Side, leaf: str) -> str:
    """The path of the module that holds a leaf; "." for the root."""
    parts = leaf.split("/")[side.trace.side == "linen" : -1]
    return "/".join(parts) or "."


@dataclass
class _Point:
    """A use on each side, whose values are compared."""

    linen: int
    nnx: int
    shape: str
    values: tuple[Value, Value] | None
    error: Error | None = None
    verdict: Verdict = "other form"


class _Comparison:
    def __init__(self, both: tuple[_Half, _Half], mate: Array) -> None:
        self.both, self.mate = both, mate
        self.numbers = np.arange(both[0].flow.size), mate
        self.points = sorted(self._points(), key=lambda point: (point.linen, point.nnx))
        self.known = [point for point in self.points if point.values]
        self.feeds = self._feeds()
        for point in self.known:
            assert point.values is not None
            point.error, point.verdict = judge(*point.values)
        self.ends = list(self._ends())
        self._absorb()

    def modules(self) -> dict[tuple[str, str], str]:
        """Modules of both sides that share leaves, and the dtype of what the Linen one gives."""
        found = {}
        for point in self.points:
            one, two = (
                module_of(half.side, half.leaf[use])
                for half, use in zip(self.both, (point.linen, point.nnx), strict=True)
            )
            value = self.both[0].value(point.linen)
            found[one, two] = str(value.own.dtype) if value else ""
        return found

    def layers(self) -> tuple[list[Layer], Layer | None]:
        """All lines, and the first that diverges."""
        groups: dict[tuple[str, str], list[_Point]] = {}
        for point in self.points:
            key = self.both[0].layer(point.linen), self.both[1].layer(point.nnx)
            groups.setdefault(key, []).append(point)
        fault = next((point for point in self.points if _RANKS.index(point.verdict) > 3), None)
        lines, first = [], None
        feeds = {id(p): each for p, each in zip(self.known, self.feeds, strict=True)}
        for (linen, nnx), points in groups.items():
            failed = [point for point in points if _RANKS.index(point.verdict) > 3]
            shown = failed[0] if failed else max(reversed(points), key=_rank)
            inside = {id(point) for point in points}
            before = [
                other.error
                for point in points
                for other in feeds.get(id(point), ())
                if id(other) not in inside and other.error
            ]
            line = Layer(
                linen,
                nnx,
                self.both[0].leaf[shown.linen],
                shown.shape,
                max(before, key=_amount, default=None),
                shown.error,
                shown.verdict,
                self._inside(shown) if shown is fault else None,
            )
            lines.append(line)
            first = line if fault in points else first
        lines += self.ends
        return lines, first or next((line for line in self.ends if line.verdict not in AGREE), None)

    def _points(self) -> Iterator[_Point]:
        """Uses that share leaf elements; and uses of one side in a layer that has a mate."""
        one, two = self.both
        here = np.flatnonzero(self.mate >= 0)
        uses = np.stack([one.flow.owner[self.mate[here]], two.flow.owner[here]])
        uses = np.unique(uses[:, (uses >= 0).all(0)], axis=1).T.tolist()
        paired = set(), set()
        layers: tuple[dict[str, list[int]], dict[str, list[int]]] = {}, {}
        for pair in uses:
            yield self._point(pair[0], pair[1], fit=True)
            for side in (0, 1):
                paired[side].add(pair[side])
                layer = self.both[side].layer(pair[side])
                layers[side].setdefault(layer, []).append(pair[1 - side])
        for side, half in enumerate(self.both):
            for use in half.leaf.keys() - paired[side]:
                if others := layers[side].get(half.layer(use)):
                    pair = (use, max(others)) if side == 0 else (max(others), use)
                    yield self._point(*pair, fit=False)

    def _point(self, linen: int, nnx: int, fit: bool) -> _Point:
        """`fit`: whether the uses share elements, so that values in other forms can be aligned."""
        one, two = self.both[0].value(linen), self.both[1].value(nnx)
        if one is None or two is None:
            return _Point(linen, nnx, "", None)
        values = (one, two) if one.own.shape == two.own.shape else None
        if fit:
            at = self.both[0].flow.uses[linen], self.both[1].flow.uses[nnx]
            values = aligned((one, two), at, self.numbers)
        return _Point(linen, nnx, _shape((one, two)), values)

    def _feeds(self) -> list[list[_Point]]:
        """For each known point those that flow into it with no other in between."""
        above = self.both[0].above
        sets = [
            {k for k, other in enumerate(self.known) if other.linen in above[point.linen]}
            for point in self.known
        ]
        return [
            [self.known[k] for k in each - set().union(*(sets[k] for k in each))] for each in sets
        ]

    def _ends(self) -> Iterator[Layer]:
        """Updated leaves, outputs, and the outputs of each side as one compiled program."""
        one, two = self.both
        inner = {id(other) for feeds in self.feeds for other in feeds}
        last = [point.error for point in self.known if id(point) not in inner and point.error]
        before = max(last, key=_amount, default=None)
        old = {path for half in self.both for path in half.side.trace.updates}
        for path in two.side.paths:
            ids = self.mate[two.side.elements(path)]
            if (ids < 0).any():
                continue
            sources = one.side.leaves_of(ids)
            if path in old or old & set(sources):
                mine = zip(*(one.leaves[p] for p in sources), strict=True)
                leaves = [dict(zip(sources, arrays, strict=True)) for arrays in mine]
                value = Value(*(gather(one.side, each, ids) for each in leaves))
                values = value, two.leaves[path]
                yield _end(f"update of {sources[0]}", f"update of {path}", values, before)
        for outs, text in (
            ((one.outs, two.outs), ""),
            ((one.compiled, two.compiled), ", compiled"),
        ):
            for number in range(max(map(len, outs))):
                name = f"output {number}{text}"
                if number < min(map(len, outs)):
                    values = outs[0][number], outs[1][number]
                    yield _end(name, name, values, before)
                else:
                    names = [name if number < len(each) else "none" for each in outs]
                    yield Layer(names[0], names[1], "", "", before, None, "DIVERGES")

    def _absorb(self) -> None:
        """Marks points that differ while everything computed from them agrees."""
        after: dict[int, list[_Point]] = {id(point): [] for point in self.known}
        for point, feeds in zip(self.known, self.feeds, strict=True):
            for other in feeds:
                after[id(other)].append(point)
        final = all(line.verdict in AGREE for line in self.ends)
        for point in reversed(self.known):
            following = after[id(point)]
            agree = all(other.verdict in AGREE for other in following) if following else final
            if point.verdict == "DIVERGES" and agree:
                point.verdict = "absorbed"

    def _inside(self, point: _Point) -> bool | None:
        """Whether what flows into both equations of a point agrees."""
        given = [
            half.inputs(use) for half, use in zip(self.both, (point.linen, point.nnx), strict=True)
        ]
        shapes = [[value.own.shape for value in values] for values in given]
        if shapes[0] != shapes[1]:
            return None
        return all(judge(*pair)[1] in AGREE for pair in zip(*given, strict=True))


def _end(linen: str, nnx: str, values: tuple[Value, Value], before: Error | None) -> Layer:
    if values[0].own.shape != values[1].own.shape:
        return Layer(linen, nnx, "", _shape(values), before, None, "DIVERGES")
    error, verdict = judge(*values)
    return Layer(linen, nnx, "", _shape(values), before, error, verdict)


def _rank(point: _Point) -> tuple[int, float]:
    return _RANKS.index(point.verdict), _amount(point.error)


def _amount(error: Error | None) -> float:
    if error is None:
        return -2.0
    return -1.0 if error.exact else np.nan_to_num(error.relative, nan=np.inf)


def _shape(values: tuple[Value, Value]) -> str:
    texts = [f"{value.own.dtype}[{','.join(map(str, value.own.shape))}]" for value in values]
    return texts[0] if texts[0] == texts[1] else " / ".join(texts)
