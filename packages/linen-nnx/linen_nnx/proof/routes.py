"""Which leaves of a source become which of the result, and what that means for their gradients.

    Linen                        nnx                           route
    params/q, params/k           qkv                           (q, k) -> (qkv)         concat
    params/embed                 embed, head                   (embed) -> (embed, head)  copies
    params/a, params/b           shared                        (a, b) -> (shared)        joins

Gradients go the way of their leaves, but for the last two. Of an embedding that is one leaf on one
side and two on the other, the gradient is the sum of the gradients of the two.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from linen_nnx.book.actions import Agree
from linen_nnx.book.moves import Move
from linen_nnx.disk.conversion import Conversion
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.state import Id, State
from linen_nnx.proof.subject import Arrays

Array = np.ndarray


Route = Move[Id | str, Id | str]
"""What some leaves of the source become, in the keys of the two states."""


def gradients_of(
    route: Route, ours: Sequence[Array], theirs: Sequence[Array]
) -> tuple[list[Array], list[Array]]:
    """The gradients of both sides in one form, in which they are comparable.

    Args:
      route: from leaves of the source to leaves of the result.
      ours: by the sources.
      theirs: by the targets.

    Example:
        >>> from linen_nnx.book.ops import Copies
        >>> ends = (Id("params", "embed"),), (Id("", "embed"), Id("", "head"))
        >>> tied = Move(*ends, (Copies((None, None)),))
        >>> gradients_of(tied, [np.array([3.0])], [np.array([1.0]), np.array([2.0])])
        ([array([3.])], [array([3.])])
    """
    if route.joins:
        return [_summed(route, ours)], list(theirs)
    if route.copies:
        flat = np.concatenate([source.ravel() for source in ours])
        return [flat], [_added_up(route, ours, theirs)]
    return route.run(ours), list(theirs)


def equal_sources(route: Route, arrays: Arrays) -> list[Array]:
    """The sources of a route that joins, each made equal to the first."""
    perms = _agree(route).perms
    home = arrays[route.sources[0]]
    one = home if perms[0] is None else home.transpose(perms[0])
    homes = []
    for perm in perms:
        # `perm` leads from a home to the joined leaf, and its inverse back.
        homes.append(one if perm is None else one.transpose(np.argsort(perm)))
    return homes


def _agree(route: Route) -> Agree:
    (agree,) = (action for action in route.actions if isinstance(action, Agree))
    return agree


def _summed(route: Route, sources: Sequence[Array]) -> Array:
    """The sum of what several leaves hold, in the form of the one that they become."""
    turned = []
    for array, perm in zip(sources, _agree(route).perms, strict=True):
        turned.append(array if perm is None else array.transpose(perm))
    return np.asarray(sum(turned))


def _added_up(route: Route, sources: Sequence[Array], targets: Sequence[Array]) -> Array:
    """(elements,): for each element of a source the sum of what its copies hold."""
    ends = np.cumsum([0, *(source.size for source in sources)])
    numbers = []
    for start, source in zip(ends, sources, strict=False):
        numbers.append(np.arange(start, start + source.size).reshape(source.shape))
    total = np.zeros(ends[-1], targets[0].dtype)
    # Run on the numbers of elements, the route says which element each copy is of.
    for places, target in zip(route.run(numbers), targets, strict=True):
        np.add.at(total, places.ravel(), target.ravel())
    return total


def routes(conversion: Conversion, result: State) -> list[Route]:
    """The conversion's moves from leaves to leaves, in the keys of the two states."""
    old, new = _keys(conversion.state), _keys(result)
    found: list[Route] = []
    for move in conversion.moves:
        sources = [leaf.path for leaf in move.sources]
        targets = [leaf.path for leaf in move.targets]
        # What is filled has no source, and what is dropped no target.
        if not sources or not targets:
            continue
        # An empty node is a leaf of the tree, and holds nothing to run a model on.
        if not old.keys() >= {*sources} or not new.keys() >= {*targets}:
            continue
        keys = tuple(old[path] for path in sources), tuple(new[path] for path in targets)
        found.append(Move(*keys, move.actions))
    return found


def arrays_in(state: State) -> dict[Id | str, Leaf]:
    """Every array of a state, by the key that the proof knows it by."""
    return {k: v for k, v in {**state.model, **state.rest}.items() if v.zarr is not None}


def name_of(key: Id | str) -> str:
    """A key as text.

    Example:
        >>> name_of(Id("params", "first/kernel")), name_of("opt_state/0/count")
        ('params/first/kernel', 'opt_state/0/count')
    """
    return key if isinstance(key, str) else "/".join(filter(None, key))


def translated(
    found: Sequence[Route], arrays: Mapping[Any, Array], lossless: bool = False
) -> Arrays:
    """What routes make of some of the source's leaves; `lossless`: only those that keep bits."""
    result: Arrays = {}
    for route in found:
        sources = _taken(arrays, route.sources)
        if sources is not None and (route.lossless or not lossless):
            result.update(zip(route.targets, route.run(sources), strict=True))
    return result


def comparable_gradients(
    found: Sequence[Route], ours: Mapping[Id, Array], theirs: Mapping[Id, Array]
) -> tuple[Arrays, Arrays]:
    """Both gradients of what keeps its bits, by the names of the result's leaves.

    Of a value that is multiplied on the way the gradient is divided, and of one that is filled
    there is none.
    """
    left: Arrays = {}
    right: Arrays = {}
    for route in found:
        sources, targets = _taken(ours, route.sources), _taken(theirs, route.targets)
        if sources is None or targets is None or not route.lossless:
            continue
        mine, others = gradients_of(route, sources, targets)
        # Copies have one sum for all their targets: it goes by the name of the first.
        left.update(zip(route.targets, mine, strict=False))
        right.update(zip(route.targets, others, strict=False))
    return left, right


def _taken(arrays: Mapping[Any, Array], keys: Sequence[Id | str]) -> list[Array] | None:
    """The arrays with these keys; None where one of them lacks (integers have no gradient)."""
    if any(key not in arrays for key in keys):
        return None
    return [arrays[key] for key in keys]


def _keys(state: State) -> dict[str, Id | str]:
    """For the path on disk of each array its key."""
    return {leaf.path: key for key, leaf in arrays_in(state).items()}
