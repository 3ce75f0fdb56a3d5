"""Says where two models treat a leaf in different ways, in leaves and places.

Where gradients of whole leaves have shown a rule, its note adds how the dataflow differs:

    Linen    (h @ c/kernel + c/bias) * t2
    nnx      (h * scales/1) @ c/kernel + scales/1 * c/bias
    note     Linen applies `params/c/bias` + `params/c/kernel` before `params/t2`, nnx not

In the twin of `example.py`, a wrong pair of kernels would get this one:

    >>> from linen_nnx.infer.example import two_layers
    >>> from linen_nnx.infer.sides import sides
    >>> from linen_nnx.infer.trace import trace_linen, trace_nnx
    >>> both = sides(trace_linen(two_layers()), trace_nnx(two_layers()), {})
    >>> biases = {"params/up/bias": frozenset({"first/bias"})}
    >>> contrast(both, ["params/up/kernel"], ["last"], biases)
    'nnx applies `first/bias` before `last`, Linen not'
"""

from collections.abc import Iterable, Mapping

import numpy as np

from linen_nnx.infer.sides import Both, SlottedSide


def contrast(
    both: Both, linen: Iterable[str], nnx: Iterable[str], mates: Mapping[str, frozenset[str]]
) -> str | None:
    """How the uses of some leaves differ.

    Args:
      both: the two sides.
      linen, nnx: the leaves of either side that belong together.
      mates: for each Linen leaf that has a rule the nnx leaves that it becomes.

    Returns:
      a clause, or None where the dataflow tells no difference.
    """
    ours, theirs = list(linen), list(nnx)
    ours_named, theirs_named = _listed(ours), _listed(theirs)
    our_uses, their_uses = _count(both[0], ours), _count(both[1], theirs)
    # The same leaves in another number of parts: one model cuts what the other uses whole.
    if our_uses != their_uses:
        first = f"Linen uses {ours_named} {_parts(our_uses, len(ours))}"
        return f"{first}, nnx uses {theirs_named} {_parts(their_uses, len(theirs))}"
    # The same parts at another place: other leaves come before. Only leaves that have a rule can be
    # looked for on the other side.
    before_ours = _before(both[0], ours) & mates.keys()
    before_theirs = _before(both[1], theirs)
    more = [path for path in before_ours if not mates[path] <= before_theirs]
    if more:
        return f"Linen applies {_listed(sorted(more)[:3])} before {ours_named}, nnx not"
    expected = set[str]().union(*(mates[path] for path in before_ours))
    with_a_rule = set[str]().union(*mates.values())
    less = sorted((before_theirs & with_a_rule) - expected)
    if less:
        return f"nnx applies {_listed(less[:3])} before {theirs_named}, Linen not"
    return None


def _count(side: SlottedSide, paths: Iterable[str]) -> int:
    """In how many slots some leaves are used."""
    return sum(len(side.slots_of[path]) for path in paths)


def _parts(uses: int, leaves: int) -> str:
    return "whole" if uses <= leaves else f"in {uses} parts"


def _before(side: SlottedSide, paths: Iterable[str]) -> set[str]:
    """The leaves that flow into the places where some leaves are used."""
    found = set[str]()
    for path in paths:
        for slot in side.slots_of[path]:
            for above in np.flatnonzero(side.flow.above[slot]):
                found.add(side.first_leaf[above])
    return found


def _listed(paths: Iterable[str]) -> str:
    return " + ".join(f"`{path}`" for path in paths)
