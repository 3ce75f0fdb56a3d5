"""Proves by running both models that a converted training state means what its source meant.

    Linen  params/first/kernel, params/last/kernel         nnx  first/kernel, last/kernel
    a wrong rule book:  first -> last, last -> first       (both kernels are (8, 8))

    every byte is where the book says          passes: the book is what is wrong
    forward pass, the checkpoint's weights     fails: y = tanh(x @ W) @ V against tanh(x @ V) @ W
    the rule book, against the models' code    `first/kernel` comes from `params/last/kernel`, and
                                               must come from `params/first/kernel`

Equal bytes through a rule book prove nothing about the book. So both forms of the model are run on
the same inputs and weights, and their outputs, gradients and optimizer steps are compared. Two
arrays are *exact* if every bit is equal. Where rounding makes that impossible (sums in another
order), they are *close* if both models agree in float64: outputs to 2e-7 of an array's largest
element, gradients to 2e-6, which is what constants rounded to float32 may do. Anything else fails,
and so does any NaN or infinity.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.disk.conversion import Conversion
from linen_nnx.disk.sources import Reader
from linen_nnx.disk.state import OPTIMIZER, Id, State
from linen_nnx.errors import Refusal
from linen_nnx.infer.ground import COMPARABLE
from linen_nnx.infer.jaxprs import holds
from linen_nnx.infer.outputs import matched
from linen_nnx.infer.run import with_noise
from linen_nnx.infer.suggest import propose
from linen_nnx.infer.trace import Trace
from linen_nnx.proof.checks import Check
from linen_nnx.proof.closeness import Bound, check_arrays, gaps
from linen_nnx.proof.compare import same, spec
from linen_nnx.proof.routes import (
    Route,
    arrays_in,
    comparable_gradients,
    equal_sources,
    name_of,
    routes,
    translated,
)
from linen_nnx.proof.sight import sight
from linen_nnx.proof.subject import Arrays, Subject

Array = np.ndarray
_Both = tuple[Arrays, Arrays]

_FORWARD = Bound(2e-7, 1e-12)
# Gradients pass each rounded constant forwards and backwards, and many are sums that cancel.
_GRADIENT = Bound(2e-6, 1e-5)


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
    """Compares the models of a conversion's source and result.

    Holds both states in memory, and runs both models a few times.

    Args:
      conversion: how `result` was made.
      result: what was found on disk.
      reader: of the arrays of `result`.
      before: the model of the source.
      after: the model of the result. Where the two are the two sides of a twin, a wrong rule
        between them is named.

    Yields:
      Each check as soon as it is known: the leaves, outputs, gradients, optimizer steps, and the
      leaves that none of these sees.
    """
    name = "leaves, as the models' code has them"
    if problems := _unlike_the_code(before, conversion.state) + _unlike_the_code(after, result):
        yield Check(name, False, problems)
        return
    how_called = (*before.trace.chosen, *after.trace.chosen)
    yield Check(name, True, (*_random_state(after, result), *how_called))
    old, new = _load(conversion.state, conversion.source.reader), _load(result, reader)
    given = before.trace.inputs
    before, after, notes = _in_one_order((before, after), (old, new), given)
    if notes:
        yield Check("outputs, one with the other", True, notes)

    pair = _Pair(before, after, routes(conversion, result))
    # A checkpoint may hide a fault: its biases are 0, its scales 1, and two of them swapped give
    # the same outputs. Random weights have no equal leaves.
    random = _randomised(before, old, pair.routes)
    # Noise shows more than the example, unless the model takes it out of the domain of a logarithm.
    noisy = [with_noise(array, seed) for seed, array in enumerate(given)]
    outputs, _ = before.forward(random, noisy)
    is_finite = all(np.isfinite(out).all() for out in outputs.values())
    inputs = noisy if is_finite else given
    cases = (
        _Case("the checkpoint's weights", old, new, given),
        _Case("randomised weights", random, {**new, **translated(pair.routes, random)}, inputs),
    )
    blind, seen = sight(before, random, inputs)

    # Outputs first, which are what people look at; gradients and steps when the rules are judged.
    is_wrong, gradients = False, []
    for case in cases:
        yield (check := pair.forward(case))
        # Outputs and gradients come of one run, which is kept for one state alone.
        gradients.append(pair.gradients(case, blind))
        is_wrong |= not check.passed
    # Two stages of a run are both traced as Linen: then the models are not read but only run.
    traces = {subject.trace.side: subject.trace for subject in (before, after)}
    if is_wrong and len(traces) == 2:
        yield _suspects(traces["linen"], traces["nnx"], conversion.book)
    yield from gradients
    yield from pair.optimizer(cases[0])
    yield seen


@dataclass(frozen=True)
class _Pair:
    """Both models, and the way from the leaves of one to those of the other."""

    before: Subject
    after: Subject
    routes: Sequence[Route]

    def forward(self, case: _Case) -> Check:
        """Compares outputs, and the new values of all that either call updates."""

        def both(wide: bool) -> _Both:
            outputs, updates = self.before.forward(case.left, case.inputs, wide)
            outputs_after, updates_after = self.after.forward(case.right, case.inputs, wide)
            # What one side updates and the other leaves alone is compared with its old value.
            carried = translated(self.routes, {**case.left, **updates})
            touched = {*translated(self.routes, updates), *updates_after} & carried.keys()
            left: Arrays = {**outputs}
            right: Arrays = {**outputs_after}
            for key in touched:
                left[key] = carried[key]
                right[key] = updates_after.get(key, case.right[key])
            return left, right

        return check_arrays(f"forward pass, {case.name}", both, self.before.exact, _FORWARD)

    def gradients(self, case: _Case, blind: set[Id]) -> Check:
        """Compares the gradients of all leaves but the blind, which have none but rounding.

        What one side alone freezes is compared as if neither did, and named: where a gradient
        stops is a choice of how to train, and no fault of the conversion.
        """
        unseen: set[Id | str] = set()
        for route in self.routes:
            if {*route.sources} <= blind:
                unseen.update(route.targets)

        def both(wide: bool, plain: bool = False) -> _Both:
            ours = self.before.gradient(case.left, case.inputs, wide, plain=plain)
            theirs = self.after.gradient(case.right, case.inputs, wide, plain=plain)
            left, right = comparable_gradients(self.routes, ours, theirs)
            return _without(left, unseen), _without(right, unseen)

        left, right = both(False)
        is_equal = all(same(left[key], right[key]) for key in left)
        frozen = {} if is_equal else self._frozen(both)
        unseen |= frozen.keys()
        name = f"gradients, {case.name}"
        # `both` leaves out what is frozen from here on.
        check = check_arrays(name, both, self.before.exact, _GRADIENT)
        return replace(check, details=(*check.details, *frozen.values()))

    def _frozen(self, both: Callable[[bool, bool], _Both]) -> dict[Id | str, str]:
        """The leaves whose gradients differ by `stop_gradient` alone, each with a sentence.

        both: the gradients of both sides, given whether in float64, and whether as if no
          `stop_gradient` stood in the models.
        """
        before, after = self.before.trace, self.after.trace
        if not holds(before.jaxpr, "stop_gradient") and not holds(after.jaxpr, "stop_gradient"):
            return {}
        left, right = both(True, False)
        real = gaps(left, right, _GRADIENT.floor)
        if max(real.values(), default=0.0) <= _GRADIENT.relative:
            return {}
        plain = gaps(*both(True, True), _GRADIENT.floor)
        found: dict[Id | str, str] = {}
        for key, gap in real.items():
            if gap > _GRADIENT.relative >= plain[key]:
                what = "both train it"
                if not left[key].any():
                    what = f"only {after.side} trains it"
                elif not right[key].any():
                    what = f"only {before.side} trains it"
                found[key] = (
                    f"`{name_of(key)}`: {what}, as `stop_gradient` stands elsewhere on the two "
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
        if why := self._no_step(case):
            yield Check(name, None, (why,))
            return
        # The gradients of one side serve both, so that nothing differs but the optimizers.
        slopes = before.gradient(case.left, case.inputs)
        moved = translated(self.routes, slopes, lossless=True)
        params = {id for id, leaf in after.leaves.items() if leaf.collection == "params"}
        if not moved.keys() >= params:
            yield Check(name, None, ("the rules change or invent the values of parameters",))
            return
        try:
            carried = before.step(case.left, slopes, False)
            fresh = before.step(case.left, slopes, True)
            theirs = after.step(case.right, moved, False)
        except RuleError as error:
            yield Check(name, False, error.problems)
            return
        steps = translated(self.routes, carried), theirs
        yield check_arrays(name, lambda wide: steps, before.exact)
        yield _control(case.left, carried, fresh)

    def _no_step(self, case: _Case) -> str:
        """Why no step can be compared; empty if one can."""
        if any(route.joins for route in self.routes):
            return "two leaves become one, whose gradient is the sum of theirs: no step is the same"
        for state in (case.left, case.right):
            if not any(str(key).split("/")[0] == OPTIMIZER for key in state):
                return "there is no optimizer's state on both sides"
        return ""


def _without(arrays: Arrays, keys: set[Id | str]) -> Arrays:
    return {key: array for key, array in arrays.items() if key not in keys}


def _in_one_order(
    subjects: tuple[Subject, Subject], states: tuple[Arrays, Arrays], inputs: Sequence[Any]
) -> tuple[Subject, Subject, tuple[str, ...]]:
    """Both subjects with their outputs in one order, where they return them in other containers."""
    before, after = subjects
    one, two = before.trace, after.trace
    if one.outputs == two.outputs or one.side == two.side:
        return before, after, ()
    ours, _ = before.forward(states[0], inputs, wide=True)
    theirs, _ = after.forward(states[1], inputs, wide=True)
    outputs = list(ours.values()), list(theirs.values())
    # The notes speak of Linen first, whichever side the conversion starts from.
    is_swapped = one.side == "nnx"
    if is_swapped:
        found = matched((two, one), (outputs[1], outputs[0]), COMPARABLE)
    else:
        found = matched((one, two), outputs, COMPARABLE)
    if found is None:
        return before, after, ()
    of_linen, of_nnx = found.places
    of_before, of_after = (of_nnx, of_linen) if is_swapped else (of_linen, of_nnx)
    return (
        replace(before, trace=one.with_outputs(of_before)),
        replace(after, trace=two.with_outputs(of_after)),
        found.notes,
    )


def _control(old: Arrays, carried: Arrays, fresh: Arrays) -> Check:
    """Whether the step before says anything of the optimizer's state.

    If a fresh optimizer takes the same step (plain SGD), then so would one with any other state,
    and a lost moment would not have been found.
    """
    name = "a step from a fresh optimizer, which must differ"
    is_still, has_other_moments = True, False
    for key, array in carried.items():
        is_other = key not in fresh or not same(array, fresh[key])
        if isinstance(key, Id):
            if is_other:
                return Check(name, True)
            is_still = is_still and same(old[key], array)
        elif is_other and array.ndim:
            # A scalar is a count of steps, which differs whatever the optimizer does with it.
            has_other_moments = True
    # Parameters that do not move at all tell nothing, but then the moments do.
    if is_still and has_other_moments:
        return Check(name, True, ("in its state: the parameters do not move (rate 0, or masked)",))
    return Check(name, None, ("it does the same: the step says nothing of the carried state",))


def _unlike_the_code(subject: Subject, state: State) -> tuple[str, ...]:
    """How the leaves on disk differ from those of the model's code; RNG state aside."""
    problems = []
    side = subject.trace.side
    for id, leaf in subject.leaves.items():
        found = state.model.get(id)
        got = "missing" if found is None or found.zarr is None else str(found.spec)
        if got != spec(leaf):
            problems.append(f"`{name_of(id)}` is {got}, the {side} model has {spec(leaf)}")
    for id in sorted(state.model.keys() - subject.leaves.keys(), key=name_of):
        leaf = state.model[id]
        # Keys and counters of random streams are constants of the traced model, and no leaves.
        if leaf.zarr is not None and str(leaf.spec.dtype)[:4] not in ("key<", "uint"):
            problems.append(f"`{name_of(id)}` is {leaf.spec}, the {side} model has none")
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


def _load(state: State, reader: Reader) -> Arrays:
    leaves = arrays_in(state)
    return dict(zip(leaves, reader.read(list(leaves.values())), strict=True))


def _randomised(subject: Subject, state: Arrays, found: Sequence[Route]) -> Arrays:
    """The state with other values in all of the model's leaves of floats that have a target."""
    moved: set[Id | str] = set()
    for route in found:
        moved.update(route.sources)
    result = dict(state)
    for number, (id, leaf) in enumerate(subject.leaves.items()):
        if id not in moved or not jnp.issubdtype(leaf.dtype, jnp.floating):
            continue
        random = np.random.default_rng([number, *leaf.shape])
        # Positive where a negative number may be none: scales, biases, variances.
        if len(leaf.shape) < 2 or leaf.collection != "params":
            values = random.uniform(0.5, 1.5, leaf.shape)
        else:
            # Of variance 1/K, so that activations stay of size 1 through all layers.
            values = random.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]))
        result[id] = np.asarray(values, state[id].dtype)
    for route in found:
        if route.joins:
            result.update(zip(route.sources, equal_sources(route, result), strict=True))
    return result


def _suspects(linen: Trace, nnx: Trace, book: RuleBook) -> Check:
    """The rules that the models' own dataflow contradicts.

    Both rule books, the one at hand and the one that `suggest` finds, are run on the numbers of
    Linen's elements: where they put other numbers into an nnx leaf, the book is wrong.
    """
    name = "the rule book, against the models' code"
    numbers = linen.all_numbers()
    try:
        known = propose(linen, nnx)
        ours = RuleBook([r for r in book.rules if r.lossless]).to_nnx(numbers, partial=True)
        theirs = known.to_nnx(numbers, partial=True)
    except Refusal as error:
        return Check(name, None, (str(error),))
    wrong = []
    for path in ours:
        if path not in theirs or np.array_equal(ours[path], theirs[path]):
            continue
        real, due = _origin(ours[path], numbers), _origin(theirs[path], numbers)
        if real != due:
            wrong.append(f"`{path}` comes from {real}, and must come from {due}")
        else:
            wrong.append(f"`{path}` comes from {real}, with its elements in the wrong order")
    if wrong:
        return Check(name, False, tuple(wrong))
    hint = "the code of the two models differs; `convert.py bisect` shows where"
    return Check(name, True if theirs else None, (hint,))


def _origin(array: Array, numbers: Mapping[str, Array]) -> str:
    """The Linen leaves, four at most, that elements with these numbers are of."""
    paths, starts = [], []
    for path, own in numbers.items():
        # A leaf without elements has no first number, and nothing comes from it.
        if own.size:
            paths.append(path)
            starts.append(own.flat[0])
    found = np.unique(np.searchsorted(starts, array.ravel(), side="right") - 1)
    return " + ".join(f"`{paths[k]}`" for k in found[:4])
