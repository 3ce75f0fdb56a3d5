"""Both sides of a twin, cut into slots of comparable form.

A form is what must agree before two slots can be twins: collection and (N, K). Where one side keeps
in one leaf what the other keeps in several (experts, stacked on an axis) and the dataflow does not
show it, the slots of the one leaf are cut along that axis.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from linen_nnx.infer.dataflow import Flow, Slot, flow
from linen_nnx.infer.trace import Trace

Array = np.ndarray
SlotForm = tuple[Any, ...]
"""(collection, N, K), or `HELD` for a slot that has no twin and is held at a value."""
HELD: SlotForm = ("held",)


@dataclass(frozen=True)
class SlottedSide:
    """One side, ready to be compared: its trace, its slots, and the form of each slot.

    held: the leaves that the other side has not, with the values at which both compute the same.
    """

    trace: Trace
    flow: Flow
    forms: list[SlotForm]
    held: Mapping[str, Array] = field(default_factory=dict)

    @cached_property
    def paths(self) -> list[str]:
        """The paths of all leaves."""
        return list(self.trace.leaves)

    @cached_property
    def owner(self) -> Array:
        """(elements,): the number of the leaf that each element belongs to."""
        sizes = [numbers.size for numbers in self.trace.numbers.values()]
        return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)

    @cached_property
    def first(self) -> list[str]:
        """For each slot the path of the leaf of its first element."""
        return [self.paths[self.owner[slot.ids[0, 0]]] for slot in self.flow.slots]

    @cached_property
    def slots_of(self) -> dict[str, list[int]]:
        """For each leaf the slots that hold some of its elements."""
        slots: dict[str, list[int]] = {path: [] for path in self.paths}
        for number, slot in enumerate(self.flow.slots):
            for path in self.leaves_of(slot.ids):
                slots[path].append(number)
        return slots

    def leaves_of(self, ids: Array) -> list[str]:
        """The paths of the leaves that elements belong to."""
        owners = self.owner[ids]
        first, last = int(owners.min()), int(owners.max())
        numbers = [first] if first == last else np.unique(owners)
        return [self.paths[number] for number in numbers]

    def holding(self, held: Mapping[str, Array]) -> "SlottedSide":
        """The side with some more leaves held at values."""
        forms = list(self.forms)
        for path in held:
            for number in self.slots_of[path]:
                forms[number] = HELD
        return replace(self, forms=forms, held={**self.held, **held})


Both = tuple[SlottedSide, SlottedSide]
"""The Linen side and the nnx side."""


def sides(linen: Trace, nnx: Trace, alone: Mapping[str, float]) -> Both:
    """Both sides; `alone` holds Linen leaves that have no twin, with the value to keep them at."""
    named = [{leaf.collection for leaf in trace.leaves.values()} for trace in (linen, nnx)]
    both = []
    for trace in (linen, nnx):
        side = SlottedSide(trace, flow(trace), [])
        for slot, path in zip(side.flow.slots, side.first, strict=True):
            collection = trace.leaves[path].collection
            if named[0] != named[1] and collection != "params":
                collection = "other"  # the sides name them differently: no evidence
            side.forms.append((collection, *slot.ids.shape))
        both.append(side)
    held = {path: np.full(linen.leaves[path].shape, value) for path, value in alone.items()}
    both[0] = both[0].holding(held)
    return _parted(_cut(both[0], both[1])), _parted(_cut(both[1], both[0]))


def odd_vectors(linen: SlottedSide, nnx: SlottedSide) -> tuple[list[str], list[str]]:
    """The vectors that only one side has (a bias that the port lacks), by their place."""
    counts = Counter(linen.forms), Counter(nnx.forms)
    surplus = counts[0] - counts[1], counts[1] - counts[0]
    paired = list(zip(*in_order(linen.forms, nnx.forms), strict=True)) or [(), ()]
    found: tuple[list[str], list[str]] = [], []
    for number, side in enumerate((linen, nnx)):
        for form, count in surplus[number].items():
            alike = [k for k, other in enumerate(side.forms) if other == form]
            odd = [k for k in alike if k not in paired[number]]
            if form != HELD and form[-1] == 1 and len(odd) == count:
                found[number].extend(dict.fromkeys(side.first[k] for k in odd))
    return found


def in_order(one: Sequence[Any], two: Sequence[Any]) -> list[tuple[int, int]]:
    """Places of equal items, in order, as many as there can be (a longest common subsequence)."""
    start, ends = 0, [len(one), len(two)]
    while start < min(ends) and one[start] == two[start]:
        start += 1
    while start < min(ends) and one[ends[0] - 1] == two[ends[1] - 1]:
        ends = [end - 1 for end in ends]
    most = Counter[tuple[int, int]]()  # of the rests from two places on, the number of pairs
    for a in range(ends[0] - 1, start - 1, -1):
        for b in range(ends[1] - 1, start - 1, -1):
            fewer = max(most[a + 1, b], most[a, b + 1])
            most[a, b] = 1 + most[a + 1, b + 1] if one[a] == two[b] else fewer
    pairs = [(k, k) for k in range(start)]
    a = b = start
    while a < ends[0] and b < ends[1]:
        if one[a] == two[b]:
            pairs.append((a, b))
            a, b = a + 1, b + 1
        elif most[a + 1, b] >= most[a, b + 1]:
            a += 1
        else:
            b += 1
    return pairs + [(ends[0] + k, ends[1] + k) for k in range(len(one) - ends[0])]


def _parted(side: SlottedSide) -> SlottedSide:
    """The side without flow from one lane of a batch to another."""
    counts, lanes = np.array([slot.lane for slot in side.flow.slots]).reshape(-1, 2).T
    apart = (counts[:, None] == counts) & (counts > 1) & (lanes[:, None] != lanes)
    parted = side.flow._replace(above=side.flow.above & ~apart)
    return replace(side, flow=parted)


def _cut(side: SlottedSide, other: SlottedSide) -> SlottedSide:
    """The side with slots cut where that gives forms that the other side has more of."""
    mine, theirs = Counter(side.forms), Counter(other.forms)
    cuts: dict[int, list[Array]] = {}
    for form in [form for form in mine if form != HELD and mine[form] > theirs[form]]:
        slots = [k for k, known in enumerate(side.forms) if known == form]
        for number in slots if mine[form] - theirs[form] == len(slots) else ():
            for parts in _axes(side, side.flow.slots[number]):
                small = (form[0], *parts[0].shape)
                if theirs[small] - mine[small] >= len(parts):
                    mine[small] += len(parts)
                    cuts[number] = parts
                    break
    if not cuts:
        return side
    origin: list[int] = []
    slots_now: list[Slot] = []
    forms: list[SlotForm] = []
    for number, (slot, form) in enumerate(zip(side.flow.slots, side.forms, strict=True)):
        parts = cuts.get(number, ())
        origin += [number] * (len(parts) or 1)
        slots_now += [Slot(ids, (len(parts), lane)) for lane, ids in enumerate(parts)] or [slot]
        forms += [(form[0], *ids.shape) for ids in parts] or [form]
    grid = np.ix_(origin, origin)
    cut = side.flow._replace(slots=slots_now, above=side.flow.above[grid])
    return replace(side, flow=cut, forms=forms)


def _axes(side: SlottedSide, slot: Slot) -> list[list[Array]]:
    """The ways to cut a slot along an axis of its one leaf, by columns (N) or by rows (K)."""
    ways = []
    path, *others = side.leaves_of(slot.ids)
    shape = side.trace.leaves[path].shape
    for axis, count in enumerate(shape if not others else ()):
        places = np.unravel_index(slot.ids - side.trace.numbers[path].flat[0], shape)[axis]
        if (places == places[:, :1]).all():
            parts = [slot.ids[places[:, 0] == k] for k in range(count)]
        elif (places == places[:1]).all():
            parts = [slot.ids[:, places[0] == k] for k in range(count)]
        else:
            continue
        if count > 1 and len({part.shape for part in parts}) == 1 and parts[0].size:
            ways.append(parts)
    return ways
