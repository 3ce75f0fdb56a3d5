"""Guesses which leaves only one side has, before it is known which leaf is whose.

    Linen               nnx
    attn/k/kernel       key/kernel      on both sides
    -                   key/bias        softmax cancels it; zeros, from its constructor
    -                   pe              a table that Linen computes in its call
    -                   up/lora_a       an adapter's
    stats/count         -               a variable that is no parameter
    norm/scale          norm/scale      zeros there, ones here: 1 + scale against scale

Such a leaf is held at the value that its model's constructor gives it. With the right guess the
outputs of both sides agree, which `ground.py` tries out. So a guess may be wrong. The likeliest
come first, and there are 40 at most.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from linen_nnx.infer.sides import Both, SlottedSide, even, odd_vectors

Array = np.ndarray
Held = tuple[Mapping[str, Array], Mapping[str, Array]]
"""For Linen and nnx: the leaves that the other side has not, with their values."""
_FORMS = 4  # pairs of names whose leaves may hold the same in two forms
_GROUPS = 5  # kinds of leaves of which every subset is tried: 31 at most


def guesses(both: Both) -> Iterator[Held]:
    """Yields guesses at the leaves that only one side has, the likeliest first, each once.

    The first is that there are none.
    """
    yield {}, {}
    seen: set[tuple[frozenset[str], ...]] = {(frozenset(), frozenset())}
    for linen, nnx in _likely(both):
        key = frozenset(linen), frozenset(nnx)
        if key in seen:
            continue
        seen.add(key)
        ours = {path: both[0].trace.constructed(path) for path in linen}
        yield ours, {path: both[1].trace.constructed(path) for path in nnx}


def _likely(both: Both) -> Iterator[tuple[Sequence[str], Sequence[str]]]:
    """Linen and nnx leaves that the other side may lack, by path; some of them twice."""
    yield from itertools.islice(_in_another_form(both), _FORMS)
    # With the same forms on both sides none is lacking.
    if even(both):
        return
    # Variables that are no parameters, where the other side has none: tables, counts, masks.
    linen, nnx = _constants(both[0], both[1]), _constants(both[1], both[0])
    yield linen, nnx
    # Adapters and tables beside them.
    surplus = _surplus(both)
    added = [path for path in surplus if _looks_added(both[1], path)]
    yield linen, [*nnx, *added]
    # Biases and scales that one side lacks, by their place among the others.
    nothing = np.zeros(0)  # only which leaves are left counts here, not their values
    without_constants = both[0].holding(dict.fromkeys(linen, nothing))
    for more in ([], added):
        start = [*nnx, *more]
        odd = odd_vectors(without_constants, both[1].holding(dict.fromkeys(start, nothing)))
        yield [*linen, *odd[0]], [*start, *odd[1]]
    # Any other kind of leaf of which nnx has more, in all layers at once or in none.
    kinds: dict[str, list[str]] = {}
    for path in set(surplus) - set(added):
        kinds.setdefault(re.sub(r"\d+", "*", path), []).append(path)
    names = sorted(kinds)[:_GROUPS]
    for count in range(1, len(names) + 1):
        for chosen in itertools.combinations(names, count):
            paths = itertools.chain.from_iterable(kinds[name] for name in chosen)
            yield linen, [*nnx, *added, *paths]


def _in_another_form(both: Both) -> Iterator[tuple[list[str], list[str]]]:
    """Vectors of one name on either side that may be one another, in another form.

    A norm that multiplies by `1 + scale` starts with zeros, one that multiplies by `scale` with
    ones. So there are as many of each shape on both sides, and their constructors' values differ.
    """
    linen, nnx = _flat_vectors(both[0]), _flat_vectors(both[1])
    pairs = list(itertools.product(linen, nnx))
    pairs.sort(key=lambda pair: pair[0][0] != pair[1][0])  # those of one name first
    for one, two in pairs:
        counts: list[Counter[tuple[int, ...]]] = []
        for side, paths in ((both[0], linen[one]), (both[1], nnx[two])):
            counts.append(Counter(side.trace.leaves[path].shape for path in paths))
        if one[1] != two[1] and counts[0] == counts[1]:
            yield linen[one], nnx[two]


def _flat_vectors(side: SlottedSide) -> dict[tuple[str, float], list[str]]:
    """The used vectors that their constructor fills with one number, by their name and it."""
    found: dict[tuple[str, float], list[str]] = {}
    for path, leaf in side.trace.leaves.items():
        if leaf.collection == "params" and len(leaf.shape) == 1 and side.slots_of[path]:
            values = side.trace.constructed(path)
            if values.size and (values == values[0]).all():
                key = path.rpartition("/")[2], float(values[0])
                found.setdefault(key, []).append(path)
    return found


def _constants(side: SlottedSide, other: SlottedSide) -> list[str]:
    """The leaves that are no parameters, where the other side has only parameters."""
    if _without_params(other):
        return []
    return _without_params(side)


def _without_params(side: SlottedSide) -> list[str]:
    """The leaves of a side that are no parameters."""
    leaves = side.trace.leaves.items()
    return [path for path, leaf in leaves if leaf.collection != "params"]


def _surplus(both: Both) -> list[str]:
    """The nnx leaves whose forms nnx uses more often than Linen does."""
    more = Counter(both[1].forms) - Counter(both[0].forms)
    found: list[str] = []
    for path, slots in both[1].slots_of.items():
        if slots and all(both[1].forms[slot] in more for slot in slots):
            found.append(path)
    return found


def _looks_added(side: SlottedSide, path: str) -> bool:
    """Whether a leaf looks like no weight of the original: an adapter's, or a fixed table."""
    if "lora" in side.trace.kinds.get(path, "").lower() or "lora" in path.lower():
        return True
    # Numbers that differ, and that no seed changes, were computed: no initialiser does that.
    value = side.trace.constructed(path)
    is_uneven = bool(value.size > 1 and (value != value.flat[0]).any())
    return is_uneven and not side.trace.varies(path)
