"""Pairs the outputs of two models that return them in different containers.

Linen returns {"aux": (2,), "logits": (2, 5)}      nnx returns (logits, aux, hidden)
matched by value: aux with [1], logits with [0]; `hidden` is nnx's alone and left out
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from linen_nnx.infer.trace import Trace

Array = np.ndarray


class OutputOrder(NamedTuple):
    """Which outputs of either side correspond, in one order, and what to say of it."""

    places: tuple[list[int], list[int]]
    notes: tuple[str, ...]


def matched(
    traces: tuple[Trace, Trace], outputs: tuple[list[Array], list[Array]], tolerance: float
) -> OutputOrder | None:
    """The order in which outputs agree in value.

    Args:
      traces: the two sides, which name the outputs.
      outputs: what they gave on equal ground.
      tolerance: outputs agree that differ by no more, relative to their size.

    Returns:
      None where the outputs agree as they stand, or in no order. So it is, too, where both sides
      return containers of one form: that an output has no equal is then a fault of the model, not
      another way to return it.
    """
    names = traces[0].outputs, traces[1].outputs
    if names[0] == names[1] or not all(outputs):
        return None
    pairs: list[tuple[int, int]] = []
    free = list(range(len(outputs[1])))
    for ours, out in enumerate(outputs[0]):
        # Two outputs may have one value (zeros, say): that of the same name goes first.
        near = sorted(free, key=lambda k: _last(names[1][k]) != _last(names[0][ours]))
        for theirs in near:
            if _equal(out, outputs[1][theirs], tolerance):
                pairs.append((ours, theirs))
                free.remove(theirs)
                break
    # Each output of the side with fewer must have an equal; what the other has over is its alone.
    counts = len(outputs[0]), len(outputs[1])
    as_they_stand = [(k, k) for k in range(max(counts))]
    if len(pairs) < min(counts) or pairs == as_they_stand:
        return None
    left, right = map(list, zip(*pairs, strict=True))
    return OutputOrder((left, right), _notes(names, pairs))


def _notes(
    names: tuple[Sequence[str], Sequence[str]], pairs: Sequence[tuple[int, int]]
) -> tuple[str, ...]:
    """What was matched with what, and what has no equal."""
    shown = [f"{_shown(names[0][a])} = {_shown(names[1][b])}" for a, b in pairs]
    notes = [f"the outputs stand in different containers; by value, {', '.join(shown)}"]
    for side, word in enumerate(("Linen", "nnx")):
        known = {pair[side] for pair in pairs}
        alone = [_shown(name) for k, name in enumerate(names[side]) if k not in known]
        if alone:
            notes.append(f"outputs that only {word} has are not compared: {', '.join(alone)}")
    return tuple(notes)


def _equal(one: Array, two: Array, tolerance: float) -> bool:
    if one.shape != two.shape:
        return False
    # Integers and booleans do not round.
    if not {one.dtype.kind, two.dtype.kind} <= {"f", "c"}:
        return np.array_equal(one, two)
    size = max(np.abs(one).max(initial=0), np.abs(two).max(initial=0), 1e-30)
    return bool(np.abs(one - two).max(initial=0) <= tolerance * size)


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _shown(name: str) -> str:
    return f"`{name}`" if name else "the output"
