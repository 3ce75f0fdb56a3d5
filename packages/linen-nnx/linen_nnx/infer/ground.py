"""Finds common ground: values of all leaves at which both sides of a twin compute the same.

Nothing is known yet of which leaf is whose, so each value must fit every way to pair the leaves:

    Linen                     nnx
    up/kernel   (4, 8)        first/kernel (4, 8)     one form, once on each side: the same numbers
    q, k, v     (8, 8) x 3    a, b, c      (8, 8) x 3 one form, three times: the same for all six
    o           (8, 8)        o, in two halves        not the same forms: the same for equal shapes
    -                         pe           (16, 8)    only one side has it: its constructor's value

Forms with equal numbers in them are *rich*: their gradients tell much. Leaves in other forms get
the numbers of their shape; where that does not fit (one is the other's transpose), a constant,
which fits however the elements are arranged, and tells less. Which leaves only one side has is
tried out, the likeliest guess first: with the right guess the outputs of both sides agree.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from linen_nnx.infer.outputs import matched
from linen_nnx.infer.run import Run, difference, pattern, run, with_noise
from linen_nnx.infer.sides import HELD, Both, SlotForm, SlottedSide, odd_vectors

Array = np.ndarray
Held = tuple[Mapping[str, Array], Mapping[str, Array]]
COMPARABLE = 1e-3  # twins whose outputs differ by more compute something else
_CLOSE = 1e-6  # where a constant stands for some leaves: it hides more than it should
_POOR = 0.03
_GROUPS = 5  # kinds of leaves of which every subset is tried: 31 at most


class Ground(NamedTuple):
    """Where both sides can be compared.

    sides: both, with the leaves that only one of them has held, and outputs in one order.
    inputs, values: what they are run on; values are (elements,) for each side.
    runs: what they gave, with gradients; None where there is no common ground: `problem` says why.
    rich: the forms that have numbers of their own; `partial`: there are others; `constant`: these
      are held at a constant, which may hide that the two models are not the same.
    notes: what was found out about both models as a whole.
    """

    sides: Both
    inputs: Sequence[Any]
    values: tuple[Array, Array]
    runs: tuple[Run, Run] | None
    rich: set[SlotForm]
    partial: bool
    constant: bool
    notes: tuple[str, ...]
    problem: str | None


class _Attempt(NamedTuple):
    """Both sides run on equal values, and why their outputs cannot be compared, if so."""

    sides: Both
    inputs: Sequence[Any]
    values: tuple[Array, Array]
    runs: tuple[Run, Run]
    rich: set[SlotForm]
    constant: bool
    problem: str | None
    notes: tuple[str, ...] = ()


def common_ground(both: Both) -> Ground:
    """Values at which both sides compute the same, as many of them rich as can be."""
    given = both[0].trace.inputs
    ways = [with_noise(array, seed) for seed, array in enumerate(given)], given
    problem = None
    for inputs in ways:
        try:
            for search in (_by_shape, _all_rich, _some_rich):
                for held in _guesses(both):
                    sides = both[0].holding(held[0]), both[1].holding(held[1])
                    trial = search(sides, inputs)
                    if trial.problem is None:
                        return _ground(trial)
                    problem = problem or trial.problem
        except Exception as error:  # the user's own model: whatever it raises is the reason
            problem = f"the twins could not be run in float64: {type(error).__name__}: {error}"
    none = np.zeros(0)
    return Ground(both, given, (none, none), None, set(), False, False, (), problem)


def _ground(trial: _Attempt) -> Ground:
    """The ground that a trial found, with its gradients."""
    runs = trial.runs
    if not runs[0].gradient.size:
        runs = _run(trial.sides, trial.inputs, trial.values, gradient=True)
    every = {form for side in trial.sides for form in side.forms} - {HELD}
    partial = trial.rich != every
    where = trial.sides, trial.inputs, trial.values, runs
    return Ground(*where, trial.rich, partial, trial.constant, trial.notes, None)


# What only one side has


def _guesses(both: Both) -> Iterator[Held]:
    """Guesses at the leaves that only one side has, the likeliest first, each once."""
    yield {}, {}
    if even(both):
        return
    seen: set[tuple[frozenset[str], ...]] = {(frozenset(), frozenset())}
    for linen, nnx in _likely(both):
        key = frozenset(linen), frozenset(nnx)
        if key in seen:
            continue
        seen.add(key)
        ours = {path: both[0].trace.constructed(path) for path in linen}
        yield ours, {path: both[1].trace.constructed(path) for path in nnx}


def _likely(both: Both) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """Leaves of either side that the other may lack, by path."""
    constants = [_constants(side, other) for side, other in (both, both[::-1])]
    yield constants[0], constants[1]
    added = [path for path in _surplus(both) if _looks_added(both[1], path)]
    yield constants[0], [*constants[1], *added]
    nothing = np.zeros(0)  # only which leaves are left counts here
    for more in ([], added):
        start = [*constants[1], *more]
        linen = both[0].holding(dict.fromkeys(constants[0], nothing))
        odd = odd_vectors(linen, both[1].holding(dict.fromkeys(start, nothing)))
        yield [*constants[0], *odd[0]], [*start, *odd[1]]
    kinds: dict[str, list[str]] = {}
    for path in set(_surplus(both)) - set(added):
        kinds.setdefault(re.sub(r"\d+", "*", path), []).append(path)
    names = sorted(kinds)[:_GROUPS]
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            paths = [path for name in chosen for path in kinds[name]]
            yield constants[0], [*constants[1], *added, *paths]


def _constants(side: SlottedSide, other: SlottedSide) -> list[str]:
    """The leaves that are no parameters, where the other side has only parameters."""
    if any(leaf.collection != "params" for leaf in other.trace.leaves.values()):
        return []
    leaves = side.trace.leaves.items()
    return [path for path, leaf in leaves if leaf.collection != "params"]


def _surplus(both: Both) -> list[str]:
    """The nnx leaves all of whose forms nnx has more of than Linen."""
    more = Counter(both[1].forms) - Counter(both[0].forms)
    found = []
    for path, numbers in both[1].slots_of.items():
        if numbers and all(both[1].forms[number] in more for number in numbers):
            found.append(path)
    return found


def _looks_added(side: SlottedSide, path: str) -> bool:
    """Whether a leaf looks like no weight of the original: an adapter's, or a fixed table."""
    if "lora" in side.trace.kinds.get(path, "").lower() or "lora" in path.lower():
        return True
    value = side.trace.constructed(path)
    uneven = bool(value.size > 1 and (value != value.flat[0]).any())
    return uneven and not side.trace.varies(path)


# How much of it can be rich


def _by_shape(both: Both, inputs: Sequence[Any]) -> _Attempt:
    """A trial with numbers in forms that the sides have equally often, and by shape elsewhere."""
    return _trial(both, inputs, _balanced(both), constant=False)


def _all_rich(both: Both, inputs: Sequence[Any]) -> _Attempt:
    """The same with a constant elsewhere."""
    return _trial(both, inputs, _balanced(both), constant=True)


def _some_rich(both: Both, inputs: Sequence[Any]) -> _Attempt:
    """A trial with numbers in those forms with which the outputs still agree."""
    trial = _trial(both, inputs, set(), constant=True)
    for form in sorted(_balanced(both)) if trial.problem is None else ():
        more = _trial(trial.sides, inputs, trial.rich | {form}, constant=True)
        trial = trial if more.problem else more._replace(notes=trial.notes)
    return trial


def even(both: Both) -> bool:
    """Whether both sides have the same forms, equally often."""
    return Counter(both[0].forms) == Counter(both[1].forms)


def _balanced(both: Both) -> set[SlotForm]:
    """The forms that both sides have equally often."""
    counts = [Counter(side.forms) for side in both]
    return {form for form in counts[0] if counts[0][form] == counts[1][form]} - {HELD}


def _trial(both: Both, inputs: Sequence[Any], rich: set[SlotForm], constant: bool) -> _Attempt:
    values = _values(both[0], rich, constant), _values(both[1], rich, constant)
    runs = _run(both, inputs, values)
    outputs = runs[0].outputs, runs[1].outputs
    problem = None
    if not all(np.isfinite(out).all() for out in (*outputs[0], *outputs[1])):
        problem = "the outputs are not finite at the values tried"
        return _Attempt(both, inputs, values, runs, rich, constant, problem)
    traces = both[0].trace, both[1].trace
    if order := matched(traces, outputs, COMPARABLE):
        sides = tuple(
            replace(side, trace=side.trace.with_outputs(places))
            for side, places in zip(both, order.places, strict=True)
        )
        again = _trial((sides[0], sides[1]), inputs, rich, constant)
        return again._replace(notes=(*order.notes, *again.notes))
    shapes = [[out.shape for out in each] for each in outputs]
    if shapes[0] != shapes[1]:
        problem = f"the outputs differ in form: Linen {shapes[0]}, nnx {shapes[1]}"
    elif (gap := difference(*outputs)) > (COMPARABLE if even(both) else _CLOSE):
        problem = f"the outputs of the twins differ (by {gap:.0e} of their size), whatever is whose"
    return _Attempt(both, inputs, values, runs, rich, constant, problem)


def _run(
    both: Both, inputs: Sequence[Any], values: tuple[Array, Array], gradient: bool = False
) -> tuple[Run, Run]:
    one, two = (run(s, inputs, v, gradient) for s, v in zip(both, values, strict=True))
    return one, two


def _values(side: SlottedSide, rich: set[SlotForm], constant: bool) -> Array:
    """(elements,) float32: equal values for slots of equal form.

    For forms that are not rich one constant, or the numbers of the leaf's shape. They are run in
    float64, and kept in half of that.
    """
    values = np.full(side.owner.size, 0.5, np.float32)
    shaped = values if constant else _shaped(side)
    for slot, form in zip(side.flow.slots, side.forms, strict=True):
        poor = _POOR if constant else shaped[slot.ids]
        values[slot.ids] = pattern(*slot.ids.shape) if form in rich else poor
    for path, held in side.held.items():
        values[side.trace.numbers[path]] = held
    return values


def _shaped(side: SlottedSide) -> Array:
    """(elements,) float32: equal values for leaves of equal shape."""
    values = np.zeros(side.owner.size, np.float32)
    for path, leaf in side.trace.leaves.items():
        columns = leaf.shape[-1] if len(leaf.shape) > 1 else int(np.prod(leaf.shape))
        summed = int(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 1
        if columns and summed:
            values[side.trace.numbers[path]] = pattern(columns, summed).T.reshape(leaf.shape)
    return values
