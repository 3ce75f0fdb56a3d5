"""Finds the first layer at which twins part: same inputs, same weights, every layer compared.

    found = bisect(twin, checkpoints=["linen_ckpt"])
    print(found.first)          # None, or the first layer whose output diverges

Both sides run one equation at a time (`record.py`), and what the equations give that use paired
leaves is compared. Each side is run in float64 as well: what differs there is no rounding, and how
far a side is from its own float64 run is what rounding may do.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jax.numpy as jnp
import numpy as np

from linen_nnx.book.rules import RuleBook
from linen_nnx.disk.runs import NO_RUNS, Runs
from linen_nnx.infer.ground import COMPARABLE
from linen_nnx.infer.outputs import matched
from linen_nnx.infer.run import with_noise
from linen_nnx.infer.suggest import propose
from linen_nnx.infer.trace import trace_linen, trace_nnx
from linen_nnx.infer.twin import Twin
from linen_nnx.proof.compare import Error, Value, Verdict, aligned, judge, spec
from linen_nnx.proof.functions import differences
from linen_nnx.proof.half import Half
from linen_nnx.proof.lint import lint, watch
from linen_nnx.proof.mates import gather, mates, side_of, weights

Array = np.ndarray
T = TypeVar("T")
_AGREE = ("exact", "rounding", "absorbed")
_FAILED = ("DIVERGES", "NaN")
_RANKS = ("other form", *_AGREE, *_FAILED)


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

    first: the first layer that diverges; functions: what the two sides do differently there, from
    the layers on that agree; findings: of the lint; notes: on how it was run.
    """

    layers: tuple[Layer, ...]
    first: Layer | None
    functions: tuple[str, ...]
    findings: tuple[str, ...]
    notes: tuple[str, ...]


def bisect(
    twin: Twin,
    book: RuleBook | str | Path | None = None,
    checkpoints: Sequence[str | Path] = (),
    runs: Runs = NO_RUNS,
    training: bool = False,
) -> Bisection:
    """Compares twins layer by layer.

    Args:
      twin: both models and their inputs. An input that is all one value gets noise.
      book: the rule book, or its file; default: what `suggest` finds. Leaves without a rule are
        paired by their order of first use, and `notes` says so.
      checkpoints: none for seeded random weights; one, of either form, for its weights on both
        sides; two, one of each form.
      runs: what a training code says of its runs, where the checkpoints are in one.
      training: whether the models are called in training, each draw of both with one key; else as
        the twin says, or in evaluation.

    Raises:
      TwinError: when a part of the twin cannot be built or called.
      RuleError: when the rules or the checkpoints do not fit the twin.
      StoreError: when a checkpoint cannot be read.
    """
    notes: list[str] = []
    if training:
        from linen_nnx.ladder.training import in_training

        twin = in_training(twin)
        notes.append("both models are called in training; each draw of both sides has one key")
    watched, configs = watch(twin)
    traces = trace_linen(watched), trace_nnx(watched)
    if not isinstance(book, RuleBook):
        book = propose(*traces) if book is None else RuleBook.load(book)
    linen, nnx = map(side_of, traces)
    mate, unpaired = mates(linen, nnx, book)
    notes += unpaired
    *leaves, more = weights(linen, nnx, book, mate, checkpoints, runs)
    inputs = []
    for number, array in enumerate(linen.trace.inputs):
        is_plain = array.size > 1 and getattr(array.dtype, "kind", "key") in ("f", "i", "u")
        even = is_plain and len(np.unique(array)) == 1
        inputs.append(jnp.asarray(with_noise(array, number), array.dtype) if even else array)
        notes += [f"input {number} was all one value, which hides much: it got noise"] * even
    both = Half(linen, leaves[0], inputs), Half(nnx, leaves[1], inputs)
    outputs = [[value.wide for value in half.outs] for half in both]
    if order := matched(traces, (outputs[0], outputs[1]), COMPARABLE):
        for half, places in zip(both, order.places, strict=True):
            half.reorder(places)
        notes += order.notes
    notes += [*traces[0].chosen, *traces[1].chosen]
    found = _Comparison(both, mate)
    layers, first = found.layers()
    functions = tuple(found.functions(first)) if first else ()
    findings = tuple(lint(configs, found.modules()))
    return Bisection(tuple(layers), first, functions, findings, (*notes, *more))


@dataclass(eq=False)
class _Point:
    """A use on each side, whose values are compared."""

    uses: tuple[int, int]
    shape: str
    values: tuple[Value, Value] | None
    error: Error | None = None
    verdict: Verdict = "other form"


class _Comparison:
    def __init__(self, both: tuple[Half, Half], mate: Array) -> None:
        self.both, self.mate = both, mate
        self.numbers = np.arange(both[0].side.owner.size), mate
        self.points = sorted(self._points(), key=lambda point: point.uses)
        self.known = [point for point in self.points if point.values]
        self.feeds = dict(zip(self.known, self._feeds(), strict=True))
        for point in self.known:
            assert point.values is not None
            point.error, point.verdict = judge(*point.values)
        self.outputs: dict[Layer, int] = {}  # those of the ends, with their place
        self.ends = list(self._ends())
        self._absorb()

    def modules(self) -> dict[tuple[str, str], str]:
        """Modules of both sides that share leaves, and the dtype of what the Linen one gives."""
        found = {}
        for point in self.points:
            one, two = self._each(Half.module, point)
            value = self.both[0].value(point.uses[0])
            found[one, two] = str(value.own.dtype) if value else ""
        return found

    def layers(self) -> tuple[list[Layer], Layer | None]:
        """All lines, and the first that diverges."""
        groups: dict[tuple[str, str], list[_Point]] = {}
        for point in self.points:
            one, two = self._each(Half.layer, point)
            groups.setdefault((one, two), []).append(point)
        fault = next((point for point in self.points if point.verdict in _FAILED), None)
        lines, first = [], None
        for (linen, nnx), points in groups.items():
            failed = [point for point in points if point.verdict in _FAILED]
            shown = failed[0] if failed else max(reversed(points), key=_rank)
            feeds = {other for point in points for other in self.feeds.get(point, ())}
            before = [other.error for other in feeds.difference(points) if other.error]
            line = Layer(
                linen,
                nnx,
                self.both[0].leaf[shown.uses[0]],
                shown.shape,
                max(before, key=_amount, default=None),
                shown.error,
                shown.verdict,
                self._inside(shown) if shown is fault else None,
            )
            lines.append(line)
            first = line if fault in points else first
        lines += self.ends
        return lines, first or next((line for line in self.ends if line.verdict in _FAILED), None)

    def functions(self, first: Layer) -> list[str]:
        """What the two sides do differently between what agrees and the first that diverges."""
        fault = next((point for point in self.points if point.verdict in _FAILED), None)
        ends: list[int | None]
        if fault is not None:
            ends = self._each(Half.given, fault)
        elif first in self.outputs:
            place = self.outputs[first]
            ends = [half.unrolled.outs[half.places[place]] for half in self.both]
        else:
            return []
        if None in ends:
            return []
        names, whole = self._agreeing()
        one, two = (
            half.part(end, stops, whole)
            for half, end, stops in zip(self.both, ends, names, strict=True)
            if end is not None
        )
        return differences(one, two)

    def _agreeing(self) -> tuple[tuple[dict[int, str], dict[int, str]], frozenset[str]]:
        """For each side the names of the uses whose values agree; and of those seen in parts.

        Uses that share leaf elements have one name: `q`, `k` and `v` on one side, `qkv` on the
        other.
        """
        names: tuple[dict[int, str], dict[int, str]] = {}, {}
        for number, point in enumerate(self.points):
            if point.verdict not in _AGREE:
                continue
            name = f"value {number}"
            old = {known[use] for known, use in zip(names, point.uses, strict=True) if use in known}
            for known, use in zip(names, point.uses, strict=True):
                known.update({other: name for other, each in known.items() if each in old})
                known[use] = name
        counts = [Counter(known.values()) for known in names]
        return names, frozenset(n for n in counts[0] if counts[0][n] != counts[1][n])

    def _each(self, of: Callable[[Half, int], T], point: _Point) -> list[T]:
        """Something of a point's use on each side."""
        return [of(half, use) for half, use in zip(self.both, point.uses, strict=True)]

    def _points(self) -> Iterator[_Point]:
        """Uses that share leaf elements; and uses of one side in a layer that has a mate."""
        one, two = self.both
        here = np.flatnonzero(self.mate >= 0)
        uses = np.stack([one.flow.owner[self.mate[here]], two.flow.owner[here]])
        uses = np.unique(uses[:, (uses >= 0).all(0)], axis=1).T.tolist()
        layers: tuple[dict[str, list[int]], dict[str, list[int]]] = {}, {}
        for one_use, two_use in uses:
            yield self._point((one_use, two_use), fit=True)
            layers[0].setdefault(one.layer(one_use), []).append(two_use)
            layers[1].setdefault(two.layer(two_use), []).append(one_use)
        for side, half in enumerate(self.both):
            for use in half.leaf.keys() - {pair[side] for pair in uses}:
                if others := layers[side].get(half.layer(use)):
                    pair = (use, max(others)) if side == 0 else (max(others), use)
                    yield self._point(pair, fit=False)

    def _point(self, uses: tuple[int, int], fit: bool) -> _Point:
        """`fit`: whether the uses share elements, so that values in other forms can be aligned."""
        one, two = (half.value(use) for half, use in zip(self.both, uses, strict=True))
        if one is None or two is None:
            return _Point(uses, "", None)
        values = (one, two) if one.own.shape == two.own.shape else None
        if fit:
            at = self.both[0].flow.uses[uses[0]], self.both[1].flow.uses[uses[1]]
            values = aligned((one, two), at, self.numbers)
        return _Point(uses, _shape((one, two)), values)

    def _feeds(self) -> list[list[_Point]]:
        """For each known point those that flow into it with no other in between."""
        above = self.both[0].above
        sets = [
            {k for k, other in enumerate(self.known) if other.uses[0] in above[point.uses[0]]}
            for point in self.known
        ]
        return [
            [self.known[k] for k in each - set().union(*(sets[k] for k in each))] for each in sets
        ]

    def _ends(self) -> Iterator[Layer]:
        """Updated leaves, outputs, and the outputs of each side as one compiled program."""
        one, two = self.both
        inner = {other for feeds in self.feeds.values() for other in feeds}
        last = [point.error for point in self.known if point not in inner and point.error]
        before = max(last, key=_amount, default=None)
        for path in two.side.paths:
            ids = self.mate[two.side.trace.numbers[path]]
            if not ids.size or (ids < 0).any():
                continue
            sources = one.side.leaves_of(ids)
            if path in two.updated or one.updated & set(sources):
                mine = ({p: one.leaves[p][mode] for p in sources} for mode in range(3))
                value = Value(*(gather(one.side, each, ids) for each in mine))
                values = value, two.leaves[path]
                yield _end(f"update of {sources[0]}", f"update of {path}", values, before)
        for text, *outs in (("", one.outs, two.outs), (", compiled", one.compiled, two.compiled)):
            for number, (ours, theirs) in enumerate(itertools.zip_longest(*outs)):
                name = f"output {number}{text}"
                names = ["none" if value is None else name for value in (ours, theirs)]
                line = _end(names[0], names[1], (ours, theirs), before)
                if ours is not None and theirs is not None:
                    self.outputs[line] = number
                yield line

    def _absorb(self) -> None:
        """Marks points that differ while everything computed from them agrees."""
        after: dict[_Point, list[_Point]] = {point: [] for point in self.known}
        for point, feeds in self.feeds.items():
            for other in feeds:
                after[other].append(point)
        final = all(line.verdict in _AGREE for line in self.ends)
        for point in reversed(self.known):
            agree = all(other.verdict in _AGREE for other in after[point])
            agree = agree if after[point] else final
            if point.verdict == "DIVERGES" and agree:
                point.verdict = "absorbed"

    def _inside(self, point: _Point) -> bool | None:
        """Whether what flows into both equations of a point agrees."""
        given = self._each(Half.inputs, point)
        shapes = [[value.own.shape for value in values] for values in given]
        if shapes[0] != shapes[1]:
            return None
        return all(judge(*pair)[1] in _AGREE for pair in zip(*given, strict=True))


def _end(
    linen: str, nnx: str, values: tuple[Value | None, Value | None], before: Error | None
) -> Layer:
    one, two = values
    if one is None or two is None:
        return Layer(linen, nnx, "", "", before, None, "DIVERGES")
    if one.own.shape != two.own.shape:
        return Layer(linen, nnx, "", _shape((one, two)), before, None, "DIVERGES")
    return Layer(linen, nnx, "", _shape((one, two)), before, *judge(one, two))


def _rank(point: _Point) -> tuple[int, float]:
    return _RANKS.index(point.verdict), _amount(point.error)


def _amount(error: Error | None) -> float:
    if error is None:
        return -2.0
    return -1.0 if error.exact else np.nan_to_num(error.relative, nan=np.inf)


def _shape(values: tuple[Value, Value]) -> str:
    texts = [spec(value.own) for value in values]
    return texts[0] if texts[0] == texts[1] else " / ".join(texts)
