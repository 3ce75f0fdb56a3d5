"""Finds the first layer at which twins part: same inputs, same weights, every layer compared.

    Linen                        nnx                        what the two products gave
    first:  h = x @ W            first:  h = x @ W          equal bits: exact
            g = gelu_tanh(h)             g = gelu_erf(h)    (no leaf is used here)
    last:   y = g @ V            last:   y = g @ V          apart, as what they took: DIVERGES

    first divergence: last; its inputs differ already, so the fault lies between it and `first`;
    there gelu is the tanh approximation on one side and exact on the other (`functions.py`)

Both sides run one equation at a time (`record.py`). What is compared is what the equations give
that use paired leaves (`points.py`): layers of the two models have other names and numbers, but
their weights are known to correspond. Each side is run in float64 as well: what differs there is
no rounding, and how far a side is from its own float64 run is what rounding may do.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from linen_nnx.book.rules import RuleBook
from linen_nnx.disk.runs import NO_RUNS, Runs
from linen_nnx.infer.counted import Counted
from linen_nnx.infer.ground import COMPARABLE
from linen_nnx.infer.outputs import matched
from linen_nnx.infer.run import with_noise
from linen_nnx.infer.suggest import propose
from linen_nnx.infer.trace import Trace, trace_linen, trace_nnx
from linen_nnx.infer.twin import Twin
from linen_nnx.proof.compare import Error, Value, Verdict, judge
from linen_nnx.proof.functions import differences
from linen_nnx.proof.lint import lint, watch
from linen_nnx.proof.mates import mates, side_of
from linen_nnx.proof.points import Both, Point, feeds, points, shape_of
from linen_nnx.proof.side_run import SideRun
from linen_nnx.proof.weights import weights

Array = np.ndarray
T = TypeVar("T")
Judged = TypeVar("Judged", Point, "Layer")
_AGREE = ("exact", "rounding", "absorbed")
_FAILED = ("DIVERGES", "NaN")
# Of several points in one layer the one with the last of these verdicts is shown.
_RANKS = ("other form", *_AGREE, *_FAILED)


@dataclass(frozen=True)
class Layer:
    """One line of a bisection: a layer of both twins, an updated leaf, or an output.

    Attributes:
      linen, nnx: the paths of the two modules, `block_7/up`; or `update of ...`, `output 0`.
      leaf: the Linen leaf after whose use the values were compared; empty for an end of the model.
      shape: dtype and shape of the values.
      before: the worst error of the layers that feed it; None where only inputs do.
      after: the error of what it gives; None where the sides' values have no common form.
      verdict: `exact`, `rounding`, `DIVERGES` or `NaN`. `absorbed` if it differs, but all that is
        computed from it agrees. `other form` if there is no `after`.
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
    """What was compared, and what was found.

    Attributes:
      layers: all layers in the order of first use, then updated leaves and outputs.
      first: the first layer that diverges; None if none does.
      functions: what the two sides do differently there, from the layers on that agree.
      findings: the settings in which paired modules differ (`lint.py`).
      notes: how the models were run.
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
    progress: Callable[[str], None] = lambda text: None,
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
      progress: is told what is being done.

    Raises:
      TwinError: when a part of the twin cannot be built or called.
      RuleError: when the rules or the checkpoints do not fit the twin.
      StoreError: when a checkpoint cannot be read.

    Example:
        >>> import flax.linen as nn
        >>> from flax import nnx
        >>> class Linen(nn.Module):
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(2, name="last")(nn.gelu(nn.Dense(4, name="first")(x)))
        >>> class Nnx(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.first, self.last = nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 2, rngs=rngs)
        ...     def __call__(self, x):
        ...         return self.last(nnx.gelu(self.first(x), approximate=False))
        >>> twin = Twin(Linen, lambda rngs: Nnx(rngs), lambda: (jnp.arange(6.0).reshape(2, 3),))
        >>> rule = {"linen": "params/{layer}/{leaf}", "nnx": "{layer}/{leaf}"}
        >>> found = bisect(twin, RuleBook.from_dict({"version": 1, "rules": [rule]}))
        >>> found.first.linen, found.first.verdict, found.first.inside
        ('last', 'DIVERGES', False)
        >>> found.functions
        ('gelu: Linen the tanh approximation, nnx exact, by erf',)
    """
    notes: list[str] = []
    if training:
        from linen_nnx.ladder.training import in_training

        twin = in_training(twin)
        notes.append("both models are called in training; each draw of both sides has one key")
    progress("reading both models")
    watched, configs = watch(twin)
    traces = trace_linen(watched), trace_nnx(watched)
    if not isinstance(book, RuleBook):
        book = propose(*traces, progress) if book is None else RuleBook.load(book)
    linen, nnx = map(side_of, traces)
    mate, unpaired = mates(linen, nnx, book)
    notes += unpaired
    *leaves, more = weights(linen, nnx, book, mate, checkpoints, runs)
    inputs, made_noisy = _lively_inputs(linen.trace)
    notes += made_noisy

    progress("running the Linen model, one equation at a time")
    one = SideRun(linen, leaves[0], inputs)
    progress("running the nnx model, one equation at a time")
    both = one, SideRun(nnx, leaves[1], inputs)
    notes += _in_one_order(both, traces)
    notes += [*traces[0].chosen, *traces[1].chosen]

    progress("comparing layer by layer")
    found = _Comparison(both, mate)
    layers, first = found.layers()
    functions = tuple(found.functions(first)) if first else ()
    findings = tuple(lint(configs, found.modules()))
    return Bisection(tuple(layers), first, functions, findings, (*notes, *more))


def _lively_inputs(trace: Trace) -> tuple[list[jax.Array], list[str]]:
    """The example inputs, with noise in place of those that are all one value; and notes.

    Of zeros, a product is zero whatever its kernel: a transposed kernel would not show.
    """
    inputs: list[jax.Array] = []
    notes = []
    for number, array in enumerate(trace.inputs):
        # A key or a flag is taken as it is.
        is_numeric = getattr(array.dtype, "kind", "key") in ("f", "i", "u")
        if is_numeric and array.size > 1 and len(np.unique(array)) == 1:
            inputs.append(jnp.asarray(with_noise(array, number), array.dtype))
            notes.append(f"input {number} was all one value, which hides much: it got noise")
        else:
            inputs.append(array)
    return inputs, notes


def _in_one_order(both: Both, traces: tuple[Trace, Trace]) -> Sequence[str]:
    """Puts the outputs of both in one order, where they return them in other containers."""
    one, two = both
    # By their values in float64: in the model's dtype rounding would tell equal outputs apart.
    wide = [value.wide for value in one.outs], [value.wide for value in two.outs]
    order = matched(traces, wide, COMPARABLE)
    if order is None:
        return ()
    for run, places in zip(both, order.places, strict=True):
        run.reorder(places)
    return order.notes


class _Comparison:
    """Two sides, point by point.

    Attributes:
      points: all of them, in the order of use.
      known: those with values in a common form.
      feeds: for each of these the points that flow into it.
      ends: the lines of updated leaves and outputs.
      outputs: for a line of an output its number.
    """

    def __init__(self, both: Both, mate: Array) -> None:
        self.both, self.mate = both, mate
        self.points = points(both, mate)
        self.known = [point for point in self.points if point.values]
        self.feeds = feeds(self.known, both[0].above)
        self.outputs: dict[Layer, int] = {}
        before = self._error_of_the_last()
        self.ends = [*self._updates(before), *self._outputs(before)]
        self._absorb()

    def modules(self) -> dict[tuple[str, str], str]:
        """Modules of both sides that share leaves, and the dtype of what the Linen one gives."""
        found = {}
        for point in self.points:
            one, two = self._each(SideRun.module, point)
            value = self.both[0].value(point.uses[0])
            found[one, two] = str(value.own.dtype) if value else ""
        return found

    def layers(self) -> tuple[list[Layer], Layer | None]:
        """All lines, and the first that diverges."""
        groups: dict[tuple[str, str], list[Point]] = {}
        for point in self.points:
            one, two = self._each(SideRun.layer, point)
            groups.setdefault((one, two), []).append(point)
        fault = _first_failed(self.points)
        lines: list[Layer] = []
        first = None
        # A line for each pair of modules: people look for a layer, and not for a use of its bias.
        for (linen, nnx), members in groups.items():
            line = self._line(linen, nnx, members, fault)
            lines.append(line)
            if fault in members:
                first = line
        if first is None:
            # All layers agree: then an activation behind the last of them may still differ.
            first = _first_failed(self.ends)
        return [*lines, *self.ends], first

    def functions(self, first: Layer) -> list[str]:
        """What the two sides do differently between what agrees and the first that diverges."""
        one, two = self.both
        fault = _first_failed(self.points)
        if fault is not None:
            end_one, end_two = one.given(fault.uses[0]), two.given(fault.uses[1])
        elif first in self.outputs:
            number = self.outputs[first]
            end_one = one.unrolled.outs[one.places[number]]
            end_two = two.unrolled.outs[two.places[number]]
        else:
            return []
        if end_one is None or end_two is None:
            return []
        (names_one, names_two), whole = self._agreeing()
        return differences(
            one.region(end_one, names_one, whole), two.region(end_two, names_two, whole)
        )

    def _line(self, linen: str, nnx: str, members: list[Point], fault: Point | None) -> Layer:
        """One layer: the first of its points that fails, else the worst of them."""
        # Where none fails, the last of the worst: of a Dense the bias, with which it is done.
        shown = _first_failed(members) or max(reversed(members), key=_rank)
        flowing_in: set[Point] = set()
        for point in members:
            flowing_in.update(self.feeds.get(point, ()))
        before = [other.error for other in flowing_in.difference(members) if other.error]
        return Layer(
            linen,
            nnx,
            self.both[0].leaf[shown.uses[0]],
            shown.shape,
            max(before, key=_amount, default=None),
            shown.error,
            shown.verdict,
            self._inside(shown) if shown is fault else None,
        )

    def _agreeing(self) -> tuple[tuple[dict[int, str], dict[int, str]], frozenset[str]]:
        """For each side the names of the uses whose values agree; and the names seen in parts.

        Uses that share leaf elements have one name: `q`, `k` and `v` on one side, `qkv` on the
        other.
        """
        names: tuple[dict[int, str], dict[int, str]] = {}, {}
        for number, point in enumerate(self.points):
            # What differs, or is unknown, is no place to start reading from.
            if point.verdict not in _AGREE:
                continue
            name = f"value {number}"
            old = set()
            for known, use in zip(names, point.uses, strict=True):
                if use in known:
                    old.add(known[use])
            for known, use in zip(names, point.uses, strict=True):
                # Names that meet become one: (q, qkv) and (k, qkv) leave one for all three.
                renamed = [other for other, each in known.items() if each in old]
                known.update(dict.fromkeys(renamed, name))
                known[use] = name
        ours, theirs = Counter(names[0].values()), Counter(names[1].values())
        return names, frozenset(name for name in ours if ours[name] != theirs[name])

    def _each(self, of: Callable[[SideRun, int], T], point: Point) -> list[T]:
        """Something of a point's use on each side."""
        return [of(run, use) for run, use in zip(self.both, point.uses, strict=True)]

    def _error_of_the_last(self) -> Error | None:
        """The worst error of the points that flow into no other."""
        inner: set[Point] = set()
        for flowing_in in self.feeds.values():
            inner.update(flowing_in)
        last = [point.error for point in self.known if point not in inner and point.error]
        return max(last, key=_amount, default=None)

    def _updates(self, before: Error | None) -> Iterator[Layer]:
        """The leaves that either call updates, batch statistics say."""
        one, two = self.both
        for path in two.side.paths:
            ids = two.side.trace.part(self.mate, path)
            if not ids.size or (ids < 0).any():
                continue
            elements = Counted.of(ids)
            sources = one.side.leaves_of(elements)
            if path not in two.updated and not one.updated & set(sources):
                continue
            # A leaf of one side may be a stack of leaves of the other: so element by element.
            modes = []
            for mode in range(len(Value._fields)):
                mine = {source: one.leaves[source][mode] for source in sources}
                modes.append(one.side.gather(mine, elements))
            values = Value(*modes), two.leaves[path]
            yield _end(f"update of {sources[0]}", f"update of {path}", values, before)

    def _outputs(self, before: Error | None) -> Iterator[Layer]:
        """The outputs, and once more those of each side as one compiled program."""
        one, two = self.both
        runs = (("", one.outs, two.outs), (", compiled", one.compiled, two.compiled))
        for text, all_ours, all_theirs in runs:
            pairs = itertools.zip_longest(all_ours, all_theirs)
            for number, (ours, theirs) in enumerate(pairs):
                name = f"output {number}{text}"
                if ours is None or theirs is None:
                    linen = "none" if ours is None else name
                    nnx = "none" if theirs is None else name
                    yield _end(linen, nnx, (ours, theirs), before)
                    continue
                line = _end(name, name, (ours, theirs), before)
                self.outputs[line] = number
                yield line

    def _absorb(self) -> None:
        """Marks points that differ while everything computed from them agrees.

        Two models may scale queries, or scores: the values between differ, and no result does. So
        it goes backwards, from what is known to agree.
        """
        after: dict[Point, list[Point]] = {point: [] for point in self.known}
        for point, flowing_in in self.feeds.items():
            for other in flowing_in:
                after[other].append(point)
        ends_agree = all(line.verdict in _AGREE for line in self.ends)
        for point in reversed(self.known):
            # A point that flows into no other flows into the outputs, for all that is known.
            agree = ends_agree
            if after[point]:
                agree = all(other.verdict in _AGREE for other in after[point])
            if point.verdict == "DIVERGES" and agree:
                point.verdict = "absorbed"

    def _inside(self, point: Point) -> bool | None:
        """Whether what flows into both equations of a point agrees."""
        ours, theirs = self._each(SideRun.inputs, point)
        if len(ours) != len(theirs):
            return None
        agree = True
        for one, two in zip(ours, theirs, strict=True):
            # One side may apply its kernel to (batch, heads * width), the other to (batch, heads,
            # width): then this cannot tell.
            if one.own.shape != two.own.shape:
                return None
            agree = agree and judge(one, two)[1] in _AGREE
        return agree


def _end(
    linen: str, nnx: str, values: tuple[Value | None, Value | None], before: Error | None
) -> Layer:
    """The line of an updated leaf or an output."""
    one, two = values
    if one is None or two is None:
        return Layer(linen, nnx, "", "", before, None, "DIVERGES")
    if one.own.shape != two.own.shape:
        return Layer(linen, nnx, "", shape_of((one, two)), before, None, "DIVERGES")
    return Layer(linen, nnx, "", shape_of((one, two)), before, *judge(one, two))


def _first_failed(found: Sequence[Judged]) -> Judged | None:
    """The first of some points or lines that fails; they come in the order of use."""
    for each in found:
        if each.verdict in _FAILED:
            return each
    return None


def _rank(point: Point) -> tuple[int, float]:
    return _RANKS.index(point.verdict), _amount(point.error)


def _amount(error: Error | None) -> float:
    """By what errors are sorted: none, exact, then by size, NaN last."""
    if error is None:
        return -2.0
    return -1.0 if error.exact else np.nan_to_num(error.relative, nan=np.inf)
