"""Which leaves no output of a model sees: running it tells nothing of those.

    attention: softmax(q @ (k + b))      the same number is added to all scores of a query, and
                                         softmax takes it away: no output sees the key bias b

A leaf without sight has a gradient of rounding alone, which is different on the two sides, and a
conversion may put anything there without being found out. So it is left out of what is compared,
and named.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from linen_nnx.disk.state import Id
from linen_nnx.proof.checks import Check
from linen_nnx.proof.closeness import gaps
from linen_nnx.proof.compare import epsilon
from linen_nnx.proof.routes import name_of
from linen_nnx.proof.subject import Arrays, Subject

# In float64 a gradient that is 0 but for rounding is some 1e-16 of the others.
_BLIND = 1e-10
# A gradient so many times larger than rounding may make the largest one is a real one.
_SEEN = 1e3


def sight(subject: Subject, state: Arrays, inputs: Sequence[Any]) -> tuple[set[Id], Check]:
    """The leaves that no output sees, and the check that names them.

    The check does not fail for them: they are right by their rule and bytes, which is all that
    can be known.
    """
    name = "every leaf is seen by an output"
    try:
        if _is_plainly_seen(subject, state, inputs):
            return set(), Check(name, True)
        slopes = subject.gradient(state, inputs, wide=True, updates=True)
        dark = _dark(slopes)
        if dark and _moves(subject, state, inputs, dark):
            # A gradient may be 0 by decree (stop_gradient), and the leaf seen all the same.
            dark = [id for id in dark if not _moves(subject, state, inputs, [id])]
    except Exception as error:  # the user's own model: whatever it raises is the reason
        return set(), Check(name, None, (f"not to be run in float64: {error!r}",))
    # Integers have no gradient at all.
    blind = {*dark, *(subject.leaves.keys() - slopes.keys())}
    why = "is seen by none: right by its rule and bytes alone"
    details = sorted(f"`{name_of(id)}` {why}" for id in blind)
    return blind, Check(name, None if blind else True, tuple(details))


def _is_plainly_seen(subject: Subject, state: Arrays, inputs: Sequence[Any]) -> bool:
    """Whether every leaf has a gradient far above rounding, in the model's own dtypes already.

    Then no program in float64 has to be compiled to tell, which is most of what a proof costs.
    """
    slopes = subject.gradient(state, inputs)
    if not slopes or subject.trace.updates or slopes.keys() != subject.leaves.keys():
        return False
    sizes, unit = [], 0.0
    for slope in slopes.values():
        sizes.append(_size(slope))
        unit = max(unit, epsilon(slope))
    rounding = unit * max(sizes)
    return min(sizes) > _SEEN * rounding


def _dark(slopes: dict[Id, np.ndarray]) -> list[Id]:
    """The leaves whose gradient in float64 is 0, or nothing but rounding."""
    sizes = {id: _size(slope) for id, slope in slopes.items()}
    seen = [size for size in sizes.values() if size > 0]
    # The median, as one gradient that explodes would make all others look like rounding.
    limit = _BLIND * float(np.median(seen)) if seen else 0.0
    return [id for id, size in sizes.items() if size <= limit]


def _size(slope: np.ndarray) -> float:
    return float(np.abs(slope).max(initial=0))


def _moves(subject: Subject, state: Arrays, inputs: Sequence[Any], ids: list[Id]) -> bool:
    """Whether other values in some leaves move anything that the model gives."""
    random = np.random.default_rng(0)
    other = {id: state[id] * random.uniform(0.5, 1.5, state[id].shape) for id in ids}
    outs, updates = subject.forward(state, inputs, wide=True)
    outs_then, updates_then = subject.forward({**state, **other}, inputs, wide=True)
    moved = gaps({**outs, **updates}, {**outs_then, **updates_then}, 0.0)
    return max(moved.values()) > 1e-12
