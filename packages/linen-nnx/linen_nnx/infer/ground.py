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
    >>> linen, nnx = ground.sides
    >>> up, _, down = (ground.values(0)[slot.numbers()] for slot in linen.flow.slots)
    >>> first, _, last = (ground.values(1)[slot.numbers()] for slot in nnx.flow.slots)
    >>> all((values == up).all() for values in (down, first, last))
    True
    >>> difference(*ground.outputs) < 1e-12
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
from linen_nnx.infer.run import difference, pattern, run, with_noise
from linen_nnx.infer.sides import HELD, Both, SlotForm, SlottedSide, even

Array = np.ndarray
Outputs = tuple[list[Array], list[Array]]
"""What Linen and nnx gave."""
COMPARABLE = 1e-3  # twins whose outputs differ by more compute something else
_CLOSE = 1e-6  # where a constant stands for some leaves: it hides more than it should
_POOR = 0.03  # the constant: small, as it adds up over all summed elements


class Ground(NamedTuple):
    """Where both sides can be compared.

    Attributes:
      sides: both, with the leaves that only one of them has held, and outputs in one order.
      inputs: what they are run on.
      outputs: what they gave.
      rich: the forms that have numbers of their own.
      constant: whether the others are held at a constant, which may hide that the models differ.
      notes: what was found out about both models as a whole.
      problem: why there is no common ground, else None.
    """

    sides: Both
    inputs: Sequence[Any]
    outputs: Outputs
    rich: set[SlotForm]
    constant: bool
    notes: tuple[str, ...]
    problem: str | None

    @property
    def partial(self) -> bool:
        """Whether there are forms that are not rich."""
        return self.rich != {form for side in self.sides for form in side.forms} - {HELD}

    def values(self, number: int) -> Array:
        """(elements,) float32, what one side was run on; made anew, as it is as large as it."""
        return _values(self.sides[number], self.rich, self.constant)


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
                        return attempt
                    problem = problem or attempt.problem  # the plainest way's is the one to tell
        except Exception as error:  # the user's own model: whatever it raises is the reason
            problem = not_run(error)
    return Ground(both, given, ([], []), set(), False, (), problem)


def not_run(error: Exception) -> str:
    """What is said where a model raises an error.

    Example:
        >>> not_run(ValueError("no gradient"))
        'the twins could not be run in float64: ValueError: no gradient'
    """
    return f"the twins could not be run in float64: {type(error).__name__}: {error}"


# How much of it can be rich: three ways, the one that tells most first


def _by_shape(both: Both, inputs: Sequence[Any]) -> Ground:
    """Numbers in forms that the sides have equally often, and by shape elsewhere."""
    return _attempt(both, inputs, _balanced(both), constant=False)


def _all_rich(both: Both, inputs: Sequence[Any]) -> Ground:
    """Numbers in forms that the sides have equally often, and a constant elsewhere."""
    return _attempt(both, inputs, _balanced(both), constant=True)


def _some_rich(both: Both, inputs: Sequence[Any]) -> Ground:
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


def _attempt(both: Both, inputs: Sequence[Any], rich: set[SlotForm], constant: bool) -> Ground:
    """Runs both sides on equal values, and sees whether their outputs agree."""
    # One after the other: the values of both at once would take twice the memory.
    ours = run(both[0], inputs, _values(both[0], rich, constant)).outputs
    theirs = run(both[1], inputs, _values(both[1], rich, constant)).outputs
    outputs = ours, theirs
    attempt = Ground(both, inputs, outputs, rich, constant, (), problem=None)
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


def _values(side: SlottedSide, rich: set[SlotForm], constant: bool) -> Array:
    """(elements,) float32: equal values for slots of equal form.

    For forms that are not rich one constant, or the numbers of the leaf's shape. They are run in
    float64, and kept in half of that.
    """
    values = np.full(side.trace.size, 0.5, np.float32)
    shaped = values if constant or set(side.forms) <= rich else _shaped(side)
    for form in dict.fromkeys(side.forms):
        # Drawn once for all slots of the form, however large they are.
        equal = pattern(*form[1:]) if form in rich else None
        for number in side.slots_of_form(form):
            ids = side.flow.slots[number].numbers()
            if equal is not None:
                values[ids] = equal
            else:
                values[ids] = _POOR if constant else shaped[ids]
    for path, held in side.held.items():
        side.trace.part(values, path)[...] = held
    return values


def _shaped(side: SlottedSide) -> Array:
    """(elements,) float32: equal values for leaves of equal shape."""
    values = np.zeros(side.trace.size, np.float32)
    for path, leaf in side.trace.leaves.items():
        # As if it were used whole: summed over all axes but the last, a vector over none.
        columns = leaf.shape[-1] if len(leaf.shape) > 1 else int(np.prod(leaf.shape))
        summed = int(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 1
        if columns and summed:
            side.trace.part(values, path)[...] = pattern(columns, summed).T.reshape(leaf.shape)
    return values
