"""The points at which two sides are compared: a use of a leaf on each, and what the two gave.

    Linen                            nnx                            points
    use 0: q = x @ params/q          use 0: qkv = x @ qkv           (0, 0): q with a third of qkv
    use 1: k = x @ params/k                                         (1, 0): k with a third of qkv
    use 2: y = s @ params/out        use 1: y = s @ out             (2, 1)

Uses that share leaf elements make a point. A leaf that only one side has (a bias that the port
lacks) shares none. If other leaves of its layer are paired, it is compared with the last use in the
layer across: what a Dense gives without its bias stands against what the other gives with it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from linen_nnx.proof.compare import Error, Value, Verdict, aligned, judge, spec
from linen_nnx.proof.side_run import SideRun

Array = np.ndarray
Both = tuple[SideRun, SideRun]


@dataclass(eq=False)
class Point:
    """A use on each side, whose values are compared.

    Attributes:
      uses: the numbers of the two uses, Linen's first.
      shape: dtype and shape of the values, of both if they differ.
      values: what the two gave, in one form and order; None where there is no common form.
      error: how far apart the values are, and `verdict` what that means.
    """

    uses: tuple[int, int]
    shape: str
    values: tuple[Value, Value] | None
    error: Error | None = None
    verdict: Verdict = "other form"


def points(both: Both, mate: Array) -> list[Point]:
    """All points, judged, in the order of use on the Linen side.

    mate: (nnx elements,): the Linen element that each is, -1 for none.
    """
    numbers = np.arange(both[0].side.trace.size), mate
    pairs = _sharing(both, mate)
    found = [_point(both, pair, numbers) for pair in pairs]
    found += [_point(both, pair, None) for pair in _of_one_side(both, pairs)]
    for point in found:
        if point.values is not None:
            point.error, point.verdict = judge(*point.values)
    return sorted(found, key=lambda point: point.uses)


def feeds(known: Sequence[Point], above: dict[int, set[int]]) -> dict[Point, list[Point]]:
    """For each point those that flow into it with no other in between.

    known: points with values. above: for each Linen use the uses that flow into it.
    """
    number_of: dict[int, set[int]] = {}
    for number, point in enumerate(known):
        number_of.setdefault(point.uses[0], set()).add(number)
    all_above: list[set[int]] = []
    for point in known:
        numbers: set[int] = set()
        for use in above[point.uses[0]]:
            # A use that was not compared is no point; what is above it is above this, too.
            numbers |= number_of.get(use, set())
        all_above.append(numbers)

    direct: dict[Point, list[Point]] = {}
    for point, numbers in zip(known, all_above, strict=True):
        behind: set[int] = set()
        for number in numbers:
            behind |= all_above[number]
        direct[point] = [known[number] for number in numbers - behind]
    return direct


def shape_of(values: tuple[Value, Value]) -> str:
    """Dtype and shape of two values, once if they are the same."""
    ours, theirs = spec(values[0].own), spec(values[1].own)
    return ours if ours == theirs else f"{ours} / {theirs}"


def _sharing(both: Both, mate: Array) -> list[tuple[int, int]]:
    """The pairs of uses that share leaf elements."""
    one, two = both
    here = np.flatnonzero(mate >= 0)
    # An element that no equation uses (a leaf of an unused head) has -1 for its use.
    uses = np.stack([one.flow.owner[mate[here]], two.flow.owner[here]])
    is_used = (uses >= 0).all(0)
    return [(ours, theirs) for ours, theirs in np.unique(uses[:, is_used], axis=1).T.tolist()]


def _of_one_side(both: Both, pairs: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Pairs for the uses of one side alone, in a layer that is paired through other leaves."""
    one, two = both
    across_linen: dict[str, list[int]] = {}
    across_nnx: dict[str, list[int]] = {}
    left_linen, left_nnx = set(one.leaf), set(two.leaf)
    for ours, theirs in pairs:
        across_linen.setdefault(one.layer(ours), []).append(theirs)
        across_nnx.setdefault(two.layer(theirs), []).append(ours)
        left_linen.discard(ours)
        left_nnx.discard(theirs)

    # The last use across: it gives what the layer as a whole gives, with all that it adds.
    for use in left_linen:
        if others := across_linen.get(one.layer(use)):
            yield use, max(others)
    for use in left_nnx:
        if others := across_nnx.get(two.layer(use)):
            yield max(others), use


def _point(both: Both, uses: tuple[int, int], numbers: tuple[Array, Array] | None) -> Point:
    """A point, not yet judged.

    numbers: by which the elements of both sides are aligned, so that values in other forms can be
      compared; None for uses that share no elements.
    """
    one, two = both[0].value(uses[0]), both[1].value(uses[1])
    # The equation of a branch that was not taken has given nothing.
    if one is None or two is None:
        return Point(uses, "", None)
    values = (one, two) if one.own.shape == two.own.shape else None
    if numbers is not None:
        at = both[0].flow.uses[uses[0]], both[1].flow.uses[uses[1]]
        values = aligned((one, two), at, numbers)
    return Point(uses, shape_of((one, two)), values)
