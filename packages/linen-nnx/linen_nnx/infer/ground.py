"""Finds common ground: values of all leaves at which both sides of a twin compute the same.

Nothing is known yet of which leaf is whose, so each value must fit every way to pair the leaves:

    Linen                     nnx
    up/kernel   (4, 8)        first/kernel (4, 8)     one form, once on each side: the same numbers
    q, k, v     (8, 8) x 3    a, b, c      (8, 8) x 3 one form, three times: the same for all six
    o           (8, 8)        o, in two halves        not the same forms: the same for equal shapes
    -                         pe           (16, 8)    only one side has it: its constructor's value

The twin of `example.py` has one form twice: the two kernels. All four kernels of both sides get the
same four numbers, which one of them stores transposed:

    >>> from linen_nnx.infer.example import two_layers
    >>> from linen_nnx.infer.sides import sides
    >>> from linen_nnx.infer.trace import trace_linen, trace_nnx
    >>> ground = common_ground(sides(trace_linen(two_layers()), trace_nnx(two_layers()), {}))
    >>> up, _, down = (ground.values[0][slot.ids] for slot in ground.sides[0].flow.slots)
    >>> first, _, last = (ground.values[1][slot.ids] for slot in ground.sides[1].flow.slots)
    >>> all((values == up).all() for values in (down, first, last))
    True
    >>> difference(ground.runs[0].outputs, ground.runs[1].outputs) < 1e-12
    True

Forms with equal numbers in them are *rich*: their gradients tell much. Leaves in other forms get
the numbers of their shape; where that does not fit (one is the other's transpose), a constant,
which fits however the elements are arranged, and tells less.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from linen_nnx.infer.guesses import guesses
from linen_nnx.infer.outputs import matched
from linen_nnx.infer.run import Run, difference, pattern, run, with_noise
from linen_nnx.infer.sides import HELD, Both, SlotForm, SlottedSide, even

Array = np.ndarray
COMPARABLE = 1e-3  # twins whose outputs differ by more compute something else
_CLOSE = 1e-6  # where a constant stands for some leaves: it hides more than it should
_POOR = 0.03  # the constant: small, as it adds up over all summed elements


class Ground(NamedTuple):
    """Where both sides can be compared.

    Attributes:
      sides: both, with the leaves that only one of them has held, and outputs in one order.
      inputs: what they are run on.
      values: (elements,) float32 for each side.
      runs: what they gave, with gradients; None where there is no common ground.
      rich: the forms that have numbers of their own.
      partial: whether there are other forms, too.
      constant: whether these are held at a constant, which may hide that the models differ.
      notes: what was found out about both models as a whole.
      problem: why there is no common ground, else None.
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
    """Finds values at which both sides compute the same, as many of them rich as can be.

    What the user's models raise is no error here: it is the `problem` of the ground.
    """
    given = both[0].trace.inputs
    noisy = [with_noise(array, seed) for seed, array in enumerate(given)]
    problem = None
    # The example inputs as they are come second: noise breaks some models (`sqrt(-x)`, say).
    for inputs in (noisy, given):
        try:
            for search in (_by_shape, _all_rich, _some_rich):
                for held in guesses(both):
                    sides = both[0].holding(held[0]), both[1].holding(held[1])
                    attempt = search(sides, inputs)
                    if attempt.problem is None:
                        return _ground(attempt)
                    problem = problem or attempt.problem  # the plainest way's is the one to tell
        except Exception as error:  # the user's own model: whatever it raises is the reason
            problem = f"the twins could not be run in float64: {type(error).__name__}: {error}"
    none = np.zeros(0)
    return Ground(both, given, (none, none), None, set(), False, False, (), problem)


def _ground(attempt: _Attempt) -> Ground:
    """The ground that an attempt found, with its gradients."""
    runs = attempt.runs
    if not runs[0].gradient.size:
        runs = _run(attempt.sides, attempt.inputs, attempt.values, gradient=True)
    forms = {form for side in attempt.sides for form in side.forms} - {HELD}
    return Ground(
        sides=attempt.sides,
        inputs=attempt.inputs,
        values=attempt.values,
        runs=runs,
        rich=attempt.rich,
        partial=attempt.rich != forms,
        constant=attempt.constant,
        notes=attempt.notes,
        problem=None,
    )


# How much of it can be rich: three ways, the one that tells most first


def _by_shape(both: Both, inputs: Sequence[Any]) -> _Attempt:
    """Numbers in forms that the sides have equally often, and by shape elsewhere."""
    return _attempt(both, inputs, _balanced(both), constant=False)


def _all_rich(both: Both, inputs: Sequence[Any]) -> _Attempt:
    """Numbers in forms that the sides have equally often, and a constant elsewhere."""
    return _attempt(both, inputs, _balanced(both), constant=True)


def _some_rich(both: Both, inputs: Sequence[Any]) -> _Attempt:
    """Numbers in those forms with which the outputs still agree, and a constant elsewhere.

    A form that both sides have equally often may still stand for different things: one side cuts
    this product in two, and the other that one.
    """
    attempt = _attempt(both, inputs, set(), constant=True)
    if attempt.problem is not None:
        return attempt
    for form in sorted(_balanced(both)):
        more = _attempt(attempt.sides, inputs, attempt.rich | {form}, constant=True)
        if more.problem is None:
            attempt = more._replace(notes=attempt.notes)
    return attempt


def _balanced(both: Both) -> set[SlotForm]:
    """The forms that both sides have equally often."""
    linen, nnx = (Counter(side.forms) for side in both)
    return {form for form in linen if linen[form] == nnx[form]} - {HELD}


def _attempt(both: Both, inputs: Sequence[Any], rich: set[SlotForm], constant: bool) -> _Attempt:
    """Runs both sides on equal values, and sees whether their outputs agree."""
    values = _values(both[0], rich, constant), _values(both[1], rich, constant)
    runs = _run(both, inputs, values)
    outputs = runs[0].outputs, runs[1].outputs
    attempt = _Attempt(both, inputs, values, runs, rich, constant, problem=None)
    if not all(np.isfinite(out).all() for out in (*outputs[0], *outputs[1])):
        return attempt._replace(problem="the outputs are not finite at the values tried")
    # A dict against a tuple: once outputs are in one order, all begins anew.
    order = matched((both[0].trace, both[1].trace), outputs, COMPARABLE)
    if order:
        linen, nnx = both
        linen = replace(linen, trace=linen.trace.with_outputs(order.places[0]))
        nnx = replace(nnx, trace=nnx.trace.with_outputs(order.places[1]))
        again = _attempt((linen, nnx), inputs, rich, constant)
        return again._replace(notes=(*order.notes, *again.notes))
    shapes = [[out.shape for out in each] for each in outputs]
    if shapes[0] != shapes[1]:
        problem = f"the outputs differ in form: Linen {shapes[0]}, nnx {shapes[1]}"
        return attempt._replace(problem=problem)
    gap = difference(*outputs)
    if gap > (COMPARABLE if even(both) else _CLOSE):
        problem = f"the outputs of the twins differ (by {gap:.0e} of their size), whatever is whose"
        return attempt._replace(problem=problem)
    return attempt


def _run(
    both: Both, inputs: Sequence[Any], values: tuple[Array, Array], gradient: bool = False
) -> tuple[Run, Run]:
    linen = run(both[0], inputs, values[0], gradient)
    return linen, run(both[1], inputs, values[1], gradient)


def _values(side: SlottedSide, rich: set[SlotForm], constant: bool) -> Array:
    """(elements,) float32: equal values for slots of equal form.

    For forms that are not rich one constant, or the numbers of the leaf's shape. They are run in
    float64, and kept in half of that.
    """
    values = np.full(side.owner.size, 0.5, np.float32)
    shaped = values if constant else _shaped(side)
    for slot, form in zip(side.flow.slots, side.forms, strict=True):
        if form in rich:
            values[slot.ids] = pattern(*slot.ids.shape)
        else:
            values[slot.ids] = _POOR if constant else shaped[slot.ids]
    for path, held in side.held.items():
        values[side.trace.numbers[path]] = held
    return values


def _shaped(side: SlottedSide) -> Array:
    """(elements,) float32: equal values for leaves of equal shape."""
    values = np.zeros(side.owner.size, np.float32)
    for path, leaf in side.trace.leaves.items():
        # As if it were used whole: summed over all axes but the last, a vector over none.
        columns = leaf.shape[-1] if len(leaf.shape) > 1 else int(np.prod(leaf.shape))
        summed = int(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 1
        if columns and summed:
            values[side.trace.numbers[path]] = pattern(columns, summed).T.reshape(leaf.shape)
    return values
