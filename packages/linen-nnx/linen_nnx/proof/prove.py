"""Proves by running both models that a converted training state means what its source meant.

Equal bytes through a rule book prove nothing about the book. So both forms of the model are run on
the same inputs and weights, and their outputs, gradients and optimizer steps compared. Two arrays
are *exact* if every bit is equal. Where rounding makes that impossible (another order of sums),
they are *close* if both models, evaluated in float64, agree to 2e-7 of an array's largest element,
gradients to 2e-6 (constants are rounded to float32 in either): then they are one function, and what
they differ by is the rounding of each. Anything else fails, and so does any NaN or infinity.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from linen_nnx.book.ops import Action, Agree, Copies, Fill, Multiply
from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.disk.conversion import Conversion
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.sources import Reader
from linen_nnx.disk.state import OPTIMIZER, Id, State
from linen_nnx.errors import Refusal
from linen_nnx.infer.ground import COMPARABLE
from linen_nnx.infer.jaxprs import holds
from linen_nnx.infer.outputs import matched
from linen_nnx.infer.run import with_noise
from linen_nnx.infer.suggest import propose
from linen_nnx.infer.trace import Trace
from linen_nnx.proof.compare import difference, epsilon, same, spec
from linen_nnx.proof.subject import Arrays, Subject
from linen_nnx.proof.verify import Check

Array = np.ndarray
_Both = tuple[Arrays, Arrays]
_STEP_ULPS = 16  # of an optimizer's step on equal gradients: sums over leaves in another order
_BLIND = 1e-10  # of the median gradient
_SEEN = 1e3  # times what rounding does to the largest gradient
_SHOWN = 8


@dataclass(frozen=True)
class _Route:
    """What some leaves of the source become."""

    sources: tuple[Id | str, ...]
    targets: tuple[Id | str, ...]
    actions: tuple[Action, ...]

    @property
    def lossless(self) -> bool:
        return not any(isinstance(action, Multiply | Fill) for action in self.actions)

    @property
    def joins(self) -> bool:
        """Whether several equal leaves become one."""
        return any(isinstance(action, Agree) for action in self.actions)

    @property
    def copies(self) -> bool:
        """Whether one leaf becomes several equal ones."""
        return any(isinstance(action, Copies) for action in self.actions)

    def run(self, arrays: Sequence[Array]) -> list[Array]:
        """The targets from the sources."""
        parts = list(arrays)
        for action in self.actions:
            parts = action.run(parts)
        return parts


class _Bound(NamedTuple):
    """What is rounding: in float64, relative to an array's largest element.

    An array smaller than the share `floor` of the largest is measured on that scale: a gradient
    that is all but 0 is a sum of larger ones that cancel.
    """

    relative: float
    floor: float


_FORWARD, _GRADIENT = _Bound(2e-7, 1e-12), _Bound(2e-6, 1e-5)


@dataclass(frozen=True)
class _Case:
    """What both sides are run on: a state of each, and inputs."""

    name: str
    left: Arrays
    right: Arrays
    inputs: Sequence[Any]


def prove(
    conversion: Conversion,
    result: State,
    reader: Reader,
    before: Subject,
    after: Subject,
) -> Iterator[Check]:
    """Compares the models of a conversion's source and result, layer by layer.

    Holds both states in memory, and runs both models a few times.

    Args:
      conversion: how `result` was made.
      result: what was found on disk, and `reader` of its arrays.
      before, after: the models of source and result; a wrong rule between the two sides of a
        twin is named.
    """
    fits = _fits(before, conversion.state) + _fits(after, result)
    chosen = (*before.trace.chosen, *after.trace.chosen)
    known = fits or (*_random_state(after, result), *chosen)
    yield Check("leaves, as the models' code has them", not fits, known)
    if fits:
        return
    old, new = _load(conversion.state, conversion.source.reader), _load(result, reader)
    given = before.trace.inputs
    before, after, notes = _in_one_order((before, after), (old, new), given)
    pair = _Pair(before, after, _routes(conversion, result))
    random = _randomised(before, old, pair.routes)
    noisy = [with_noise(array, seed) for seed, array in enumerate(given)]
    finite = all(np.isfinite(out).all() for out in before.forward(random, noisy)[0].values())
    inputs = noisy if finite else given
    if notes:
        yield Check("outputs, one with the other", True, notes)
    cases = (
        _Case("the checkpoint's weights", old, new, given),
        _Case("randomised weights", random, {**new, **pair.translated(random)}, inputs),
    )
    blind, sight = _sight(before, random, inputs)
    wrong, gradients = False, []
    for case in cases:  # outputs and gradients come of one run
        yield (check := pair.forward(case))
        gradients.append(pair.gradients(case, blind))
        wrong |= not check.passed
    traces = {subject.trace.side: subject.trace for subject in (before, after)}
    if wrong and len(traces) == 2:
        yield _suspects(traces["linen"], traces["nnx"], conversion.book)
    yield from gradients
    yield from pair.optimizer(cases[0])
    yield sight


@dataclass(frozen=True)
class _Pair:
    """Both models, and the way from the leaves of one to those of the other."""

    before: Subject
    after: Subject
    routes: Sequence[_Route]

    def translated(self, arrays: Mapping[Any, Array], lossless: bool = False) -> Arrays:
        """What the rules make of some of the source's leaves; `lossless`: only such rules."""
        result: Arrays = {}
        for route in self.routes:
            known = all(key in arrays for key in route.sources)
            if known and (route.lossless or not lossless):
                parts = route.run([arrays[key] for key in route.sources])
                result.update(zip(route.targets, parts, strict=True))
        return result

    def gradients_of(self, ours: Mapping[Id, Array], theirs: Mapping[Id, Array]) -> _Both:
        """Both gradients of what keeps its bits, by the names of the result's leaves.

        Where one leaf is several on the other side, the sum of theirs is its own.
        """
        left: Arrays = {}
        right: Arrays = {}
        for route in self.routes:
            sources = [ours[key] for key in route.sources if key in ours]
            targets = [theirs[key] for key in route.targets if key in theirs]
            whole = len(sources) == len(route.sources) and len(targets) == len(route.targets)
            if not whole or not route.lossless or not sources:
                continue
            if route.joins:
                sources = [_summed(route, sources)]
            elif route.copies:
                targets = [_added_up(route, sources, targets)]
                sources = [np.concatenate([source.ravel() for source in sources])]
            else:
                sources = route.run(sources)
            left.update(zip(route.targets, sources, strict=False))
            right.update(zip(route.targets, targets, strict=False))
        return left, right

    def forward(self, case: _Case) -> Check:
        """Compares outputs, and the new values of all that either call updates."""

        def both(wide: bool) -> tuple[Arrays, Arrays]:
            outputs, updates = self.before.forward(case.left, case.inputs, wide)
            theirs, news = self.after.forward(case.right, case.inputs, wide)
            olds = self.translated({**case.left, **updates})
            touched = {*self.translated(updates), *news} & olds.keys()
            ours: Arrays = {**outputs, **{key: olds[key] for key in touched}}
            return ours, {**theirs, **{key: news.get(key, case.right[key]) for key in touched}}

        return _judge(f"forward pass, {case.name}", both, self.before.exact, _FORWARD)

    def gradients(self, case: _Case, blind: set[Id]) -> Check:
        """Compares the gradients of all leaves but the blind, which have none but rounding.

        What one side alone freezes is compared as if neither did, and named.
        """
        all_blind = (route for route in self.routes if {*route.sources} <= blind)
        unseen = {key for route in all_blind for key in route.targets}

        def both(wide: bool, plain: bool = False) -> _Both:
            ours = self.before.gradient(case.left, case.inputs, wide, plain=plain)
            theirs = self.after.gradient(case.right, case.inputs, wide, plain=plain)
            left, right = self.gradients_of(ours, theirs)
            return _without(left, unseen), _without(right, unseen)

        left, right = both(False)
        equal = all(same(left[key], right[key]) for key in left)
        frozen = {} if equal else self._frozen(both)
        unseen |= frozen.keys()
        name = f"gradients, {case.name}"
        check = _judge(name, both, self.before.exact, _GRADIENT)
        return replace(check, details=(*check.details, *frozen.values()))

    def _frozen(self, both: Callable[[bool, bool], _Both]) -> dict[Id | str, str]:
        """The leaves whose gradients differ by `stop_gradient` alone, each with a sentence."""
        if not any(holds(s.trace.jaxpr, "stop_gradient") for s in (self.before, self.after)):
            return {}
        left, right = both(True, False)
        real = _gaps(left, right, _GRADIENT.floor)
        if max(real.values(), default=0.0) <= _GRADIENT.relative:
            return {}
        plain = _gaps(*both(True, True), _GRADIENT.floor)
        sides = self.before.trace.side, self.after.trace.side
        found: dict[Id | str, str] = {}
        for key, gap in real.items():
            if gap > _GRADIENT.relative >= plain[key]:
                still = [not array[key].any() for array in (left, right)]
                what = f"only {sides[still[0]]} trains it" if any(still) else "both train it"
                found[key] = (
                    f"`{_name(key)}`: {what}, as `stop_gradient` stands elsewhere on the two "
                    "sides; without it the gradients are equal"
                )
        return found

    def optimizer(self, case: _Case) -> Iterator[Check]:
        """Compares one step on equal gradients, and the same from a fresh optimizer."""
        name = "one optimizer step from the carried state"
        before, after = self.before, self.after
        if before.step is None or after.step is None:
            yield Check(name, None, ("say what trained it: Twin(..., optimizer=...)",))
            return
        if any(route.joins for route in self.routes):
            why = "two leaves become one, whose gradient is the sum of theirs: no step is the same"
            yield Check(name, None, (why,))
            return
        slopes = before.gradient(case.left, case.inputs)
        moved = self.translated(slopes, lossless=True)
        params = [id for id, leaf in after.leaves.items() if leaf.collection == "params"]
        kept = [{str(key).split("/")[0] for key in state} for state in (case.left, case.right)]
        if not all(OPTIMIZER in names for names in kept):
            yield Check(name, None, ("there is no optimizer's state on both sides",))
            return
        if not moved.keys() >= {*params}:
            yield Check(name, None, ("the rules change or invent the values of parameters",))
            return
        try:
            ours, fresh = (before.step(case.left, slopes, new) for new in (False, True))
            theirs = after.step(case.right, moved, False)
        except RuleError as error:
            yield Check(name, False, error.problems)
            return
        both = self.translated(ours), theirs
        yield _judge(name, lambda wide: both, before.exact)
        yield _control(case.left, ours, fresh)


def _summed(route: _Route, sources: Sequence[Array]) -> Array:
    """The sum of what several leaves hold, in the form of the one that they become."""
    (agree,) = (action for action in route.actions if isinstance(action, Agree))
    pairs = zip(sources, agree.perms, strict=True)
    return np.asarray(sum(a if perm is None else a.transpose(perm) for a, perm in pairs))


def _added_up(route: _Route, sources: Sequence[Array], targets: Sequence[Array]) -> Array:
    """(elements,): for each element of a source the sum of what its copies hold."""
    ends = np.cumsum([0, *(source.size for source in sources)])
    numbers = [
        np.arange(start, start + source.size).reshape(source.shape)
        for start, source in zip(ends, sources, strict=False)
    ]
    total = np.zeros(ends[-1], targets[0].dtype)
    for places, target in zip(route.run(numbers), targets, strict=True):
        np.add.at(total, places.ravel(), target.ravel())
    return total


def _without(arrays: Arrays, keys: set[Id | str]) -> Arrays:
    return {key: array for key, array in arrays.items() if key not in keys}


def _in_one_order(
    subjects: tuple[Subject, Subject], states: tuple[Arrays, Arrays], inputs: Sequence[Any]
) -> tuple[Subject, Subject, tuple[str, ...]]:
    """Both subjects with their outputs in one order, where they return them in other containers."""
    traces = [subject.trace for subject in subjects]
    if traces[0].outputs == traces[1].outputs or traces[0].side == traces[1].side:
        return (*subjects, ())
    swapped = traces[0].side == "nnx"  # the notes speak of Linen first
    order = slice(None, None, -1) if swapped else slice(None)
    outputs = [
        list(subject.forward(state, inputs, wide=True)[0].values())
        for subject, state in zip(subjects, states, strict=True)
    ]
    (one, two), (ours, theirs) = traces[order], outputs[order]
    found = matched((one, two), (ours, theirs), COMPARABLE)
    if found is None:
        return (*subjects, ())
    before, after = (
        replace(subject, trace=subject.trace.with_outputs(places))
        for subject, places in zip(subjects, found.places[order], strict=True)
    )
    return before, after, found.notes


def _control(old: Arrays, carried: Arrays, fresh: Arrays) -> Check:
    """Whether the step before says anything of the optimizer's state."""
    name = "a step from a fresh optimizer, which must differ"
    still = all(same(old[key], carried[key]) for key in carried if isinstance(key, Id))
    other = [key for key in carried if key not in fresh or not same(carried[key], fresh[key])]
    if any(isinstance(key, Id) for key in other):
        return Check(name, True)
    if still and any(carried[key].ndim for key in other):
        return Check(name, True, ("in its state: the parameters do not move (rate 0, or masked)",))
    return Check(name, None, ("it does the same: the step says nothing of the carried state",))


def _fits(subject: Subject, state: State) -> tuple[str, ...]:
    """How the leaves on disk differ from those of the model's code; RNG state aside."""
    problems = []
    for id, leaf in subject.leaves.items():
        found = state.model.get(id)
        got = "missing" if found is None or found.zarr is None else str(found.spec)
        if got != spec(leaf):
            side = subject.trace.side
            problems.append(f"`{_name(id)}` is {got}, the {side} model has {spec(leaf)}")
    for id in sorted(state.model.keys() - subject.leaves.keys(), key=_name):
        leaf = state.model[id]
        if leaf.zarr is not None and str(leaf.spec.dtype)[:4] not in ("key<", "uint"):
            problems.append(
                f"`{_name(id)}` is {leaf.spec}, the {subject.trace.side} model has none"
            )
    return tuple(problems)


def _random_state(subject: Subject, state: State) -> tuple[str, ...]:
    """How to restore a state without the keys that the model holds; nothing, if it has them."""
    missing = [path for path in subject.trace.random if Id("", path) not in state.model]
    if not missing:
        return ()
    holders = ", ".join(dict.fromkeys(f"`{path.rpartition('/')[0]}`" for path in missing))
    return (
        f"the model's random state, {holders}, is not in it: restore into "
        "`nnx.state(model, nnx.Not(nnx.RngState))`, or build the model without (`rngs=False` of "
        "nnx.RNN, `rngs=` in the calls of nnx.Dropout)",
    )


def _leaves(state: State) -> dict[Id | str, Leaf]:
    """Every array of a state."""
    return {k: v for k, v in {**state.model, **state.rest}.items() if v.zarr is not None}


def _load(state: State, reader: Reader) -> Arrays:
    leaves = _leaves(state)
    return dict(zip(leaves, reader.read(list(leaves.values())), strict=True))


def _routes(conversion: Conversion, result: State) -> list[_Route]:
    """The conversion's jobs from leaves to leaves, in the keys of the two states."""
    old, new = (
        {leaf.path: key for key, leaf in _leaves(state).items()}
        for state in (conversion.state, result)
    )
    return [
        _Route(
            tuple(old[leaf.path] for leaf in job.change.sources),
            tuple(new[leaf.path] for leaf in job.targets),
            job.change.actions,
        )
        for job in conversion.jobs
        if job.change.sources
        and job.targets
        and old.keys() >= {leaf.path for leaf in job.change.sources}
        and new.keys() >= {leaf.path for leaf in job.targets}
    ]


def _randomised(subject: Subject, state: Arrays, routes: Sequence[_Route]) -> Arrays:
    """The state with other values in all of the model's leaves of floats that have a target."""
    moved = {key for route in routes for key in route.sources}
    result = dict(state)
    for number, (id, leaf) in enumerate(subject.leaves.items()):
        if id not in moved or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        random = np.random.default_rng([number, *leaf.shape])
        if len(leaf.shape) < 2 or leaf.collection != "params":  # scales, biases, variances
            values = random.uniform(0.5, 1.5, leaf.shape)
        else:
            values = random.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        result[id] = np.asarray(values, state[id].dtype)
    for route in routes:
        if route.joins:
            result.update(zip(route.sources, _equal(route, result), strict=True))
    return result


def _equal(route: _Route, arrays: Arrays) -> list[Array]:
    """The leaves that become one, each equal to the first."""
    (agree,) = (action for action in route.actions if isinstance(action, Agree))
    homes = [arrays[key] for key in route.sources]
    perm = agree.perms[0]
    one = homes[0] if perm is None else homes[0].transpose(perm)
    return [one if perm is None else one.transpose(np.argsort(perm)) for perm in agree.perms]


def _sight(subject: Subject, state: Arrays, inputs: Sequence[Any]) -> tuple[set[Id], Check]:
    """The leaves that no output sees (an attention's key bias, say): nothing here tests them."""
    name = "every leaf is seen by an output"

    def moves(ids: list[Id]) -> bool:
        """Whether other values in some leaves move anything that the model gives."""
        random = np.random.default_rng(0)
        other = {id: state[id] * random.uniform(0.5, 1.5, state[id].shape) for id in ids}
        one, two = (subject.forward(s, inputs, wide=True) for s in (state, {**state, **other}))
        return max(_gaps({**one[0], **one[1]}, {**two[0], **two[1]}, 0.0).values()) > 1e-12

    try:
        if _plainly_seen(subject, state, inputs):
            return set(), Check(name, True)
        slopes = subject.gradient(state, inputs, wide=True, updates=True)
        sizes = {id: np.abs(slope).max(initial=0) for id, slope in slopes.items()}
        seen = [size for size in sizes.values() if size > 0]
        limit = _BLIND * float(np.median(seen)) if seen else 0.0
        dark = [id for id, size in sizes.items() if size <= limit]
        if dark and moves(dark):  # as what has a gradient of 0 by decree (stop_gradient) may
            dark = [id for id in dark if not moves([id])]
    except Exception as error:  # the user's own model: whatever it raises is the reason
        return set(), Check(name, None, (f"not to be run in float64: {error!r}",))
    blind = {*dark, *(subject.leaves.keys() - slopes.keys())}
    details = (f"`{_name(id)}` is seen by none: right by its rule and bytes alone" for id in blind)
    return blind, Check(name, None if blind else True, tuple(sorted(details)))


def _plainly_seen(subject: Subject, state: Arrays, inputs: Sequence[Any]) -> bool:
    """Whether every leaf has a gradient far above rounding, in the model's own dtypes already.

    Then no program in float64 has to be compiled to tell.
    """
    slopes = subject.gradient(state, inputs)
    if not slopes or subject.trace.updates or slopes.keys() != subject.leaves.keys():
        return False
    sizes = [float(np.abs(slope).max(initial=0)) for slope in slopes.values()]
    rounding = max(epsilon(slope) for slope in slopes.values()) * max(sizes)
    return min(sizes) > _SEEN * rounding


def _suspects(linen: Trace, nnx: Trace, book: RuleBook) -> Check:
    """The rules that the models' own dataflow contradicts."""
    name = "the rule book, against the models' code"
    numbers = linen.numbers
    try:
        known = propose(linen, nnx)
        ours = RuleBook([r for r in book.rules if r.lossless]).to_nnx(numbers, partial=True)
        theirs = known.to_nnx(numbers, partial=True)
    except Refusal as error:
        return Check(name, None, (str(error),))
    names = [path for path in numbers if numbers[path].size]
    starts = [numbers[path].flat[0] for path in names]

    def origin(array: Array) -> str:
        found = np.unique(np.searchsorted(starts, array.ravel(), side="right") - 1)
        return " + ".join(f"`{names[k]}`" for k in found[:4])

    wrong = [
        f"`{path}` comes from {origin(ours[path])}"
        + (
            f", and must come from {origin(theirs[path])}"
            if origin(ours[path]) != origin(theirs[path])
            else ", with its elements in the wrong order"
        )
        for path in ours
        if path in theirs and not np.array_equal(ours[path], theirs[path])
    ]
    if wrong:
        return Check(name, False, tuple(wrong))
    hint = "the code of the two models differs; `convert.py bisect` shows where"
    return Check(name, True if theirs else None, (hint,))


def _judge(
    name: str,
    both: Callable[[bool], tuple[Arrays, Arrays]],
    exact: bool,
    bound: _Bound | None = None,
) -> Check:
    """Compares the arrays of two sides.

    both: returns the two mappings, in the models' own dtypes or (given True) in float64.
    exact: whether every bit must be equal.
    bound: what is rounding in float64; None if there is no float64 to compare in.
    """
    left, right = both(False)
    problems = [
        f"{_name(key)}: {spec(left.get(key))} before, {spec(right.get(key))} after"
        for key in {**left, **right}
        if spec(left.get(key)) != spec(right.get(key))
    ]
    problems += [
        f"{_name(key)}: not finite {when}"
        for when, arrays in (("before", left), ("after", right))
        for key, array in arrays.items()
        if not np.isfinite(array).all()
    ]
    if problems:
        return Check(name, False, tuple(problems[:_SHOWN]))
    other = [key for key in left if not same(left[key], right[key])]
    if not other:
        return Check(name, True, (f"exact: every bit of {len(left)} arrays",))
    ulps = _gaps(left, right, bound.floor if bound else 0.0, ulps=True)
    worst = sorted(other, key=lambda key: -ulps[key])
    shown = [f"{_name(key)} by {ulps[key]:.3g}" for key in worst[:_SHOWN]]
    text = f"{len(other)} of {len(left)} arrays differ (ulps of the largest element): "
    text += ", ".join(shown) + (", ..." if len(worst) > _SHOWN else "")
    if exact:
        return Check(name, False, (text, "every bit must be equal here"))
    if bound is None:
        close, why = ulps[worst[0]] <= _STEP_ULPS, f"{_STEP_ULPS} ulps are rounding here"
    else:
        try:
            gap = max(_gaps(*both(True), bound.floor).values())
        except Exception as error:  # the user's own model: whatever it raises is the reason
            return Check(name, False, (text, f"not to be compared in float64: {error!r}"))
        close = gap <= bound.relative
        why = f"in float64 {gap:.0e} apart, of which {bound.relative:.0e} may be rounding"
    return Check(
        name, close, (text, f"{'close, not exact' if close else 'not equal'}: {why}"), close
    )


def _gaps(left: Arrays, right: Arrays, floor: float, ulps: bool = False) -> dict[Any, float]:
    """The largest difference of each array, relative to its largest finite element.

    NaN is an infinite one. floor: that element is at least this share of the largest of all arrays;
    ulps: in units in the last place of that element.
    """
    sizes = {
        key: float(np.abs(array[np.isfinite(array)]).max(initial=0)) for key, array in left.items()
    }
    least = max(floor * max(sizes.values(), default=0.0), 1e-30)
    gaps = {}
    for key, size in sizes.items():
        unit = max(size, least)
        if ulps:
            unit = epsilon(left[key]) * 2.0 ** math.floor(math.log2(unit))
        gap = difference(left[key], right[key]).absolute
        gaps[key] = 0.0
        if gap:
            gaps[key] = float(gap / unit) if unit and not math.isnan(gap) else np.inf
    return gaps


def _name(key: Id | str) -> str:
    return key if isinstance(key, str) else "/".join(filter(None, key))
