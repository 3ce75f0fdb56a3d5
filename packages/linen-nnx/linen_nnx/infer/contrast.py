"""Says where two models treat a leaf in different ways, in leaves and places."""

from collections.abc import Iterable, Mapping

import numpy as np

from linen_nnx.infer.sides import Both, SlottedSide


def contrast(
    both: Both, linen: Iterable[str], nnx: Iterable[str], mates: Mapping[str, frozenset[str]]
) -> str | None:
    """How the uses of some leaves differ; None where the dataflow tells no difference.

    mates: for each Linen leaf that has a rule the nnx leaves that it becomes.
    """
    paths = list(linen), list(nnx)
    counts = [
        sum(len(side.slots_of[path]) for path in each)
        for side, each in zip(both, paths, strict=True)
    ]
    names = [_listed(each) for each in paths]
    if counts[0] != counts[1]:
        uses = [_uses(count, len(each)) for count, each in zip(counts, paths, strict=True)]
        return f"Linen uses {names[0]} {uses[0]}, nnx uses {names[1]} {uses[1]}"
    before = [_before(side, each) for side, each in zip(both, paths, strict=True)]
    known = {path for path in before[0] if path in mates}
    more = [path for path in known if not mates[path] <= before[1]]
    if more:
        return f"Linen applies {_listed(sorted(more)[:3])} before {names[0]}, nnx not"
    ours = set[str]().union(*(mates[path] for path in known))
    every = set[str]().union(*mates.values())
    if less := sorted((before[1] & every) - ours):
        return f"nnx applies {_listed(less[:3])} before {names[1]}, Linen not"
    return None


def _uses(count: int, leaves: int) -> str:
    if count <= leaves:
        return "whole"
    return f"in {count} parts"


def _before(side: SlottedSide, paths: Iterable[str]) -> set[str]:
    """The leaves that flow into the places where some leaves are used."""
    found = set[str]()
    for path in paths:
        for slot in side.slots_of[path]:
            found |= {side.first[k] for k in np.flatnonzero(side.flow.above[slot])}
    return found


def _listed(paths: Iterable[str]) -> str:
    return " + ".join(f"`{path}`" for path in paths)
