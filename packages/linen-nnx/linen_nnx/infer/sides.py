"""Both sides of a twin, cut into slots of comparable form.

A form is what must agree before two slots can be twins: collection and (N, K). The sides of
`example.py` have the same three forms, in the same order:

    Linen    up/kernel       (params, 2, 2)      first/kernel    nnx
             up/bias         (params, 2, 1)      first/bias
             down/kernel     (params, 2, 2)      last

    >>> from linen_nnx.infer.example import two_layers
    >>> from linen_nnx.infer.trace import trace_linen, trace_nnx
    >>> linen, nnx = sides(trace_linen(two_layers()), trace_nnx(two_layers()), {})
    >>> linen.forms, even((linen, nnx))
    ([('params', 2, 2), ('params', 2, 1), ('params', 2, 2)], True)

Where one side keeps in one leaf what the other keeps in several (experts, stacked on an axis) and
the dataflow does not show it, the slots of the one leaf are cut along that axis.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from linen_nnx.infer.counted import Counted
from linen_nnx.infer.dataflow import Flow, Slot, flow
from linen_nnx.infer.memory import give_back
from linen_nnx.infer.trace import Trace

Array = np.ndarray
SlotForm = tuple[Any, ...]
"""(collection, N, K), or `HELD` for a slot that has no twin and is held at a value."""
HELD: SlotForm = ("held",)


@dataclass(frozen=True)
class SlottedSide:
    """One side, ready to be compared.

    Attributes:
      trace: the side as a function.
      flow: its slots, and what flows into each.
      forms: the form of each slot.
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
    def _ends(self) -> Array:
        """(leaves,): one more than the number of the last element of each."""
        return np.array([span.stop for span in self.trace.spans.values()], int)

    @cached_property
    def first_leaf(self) -> list[str]:
        """For each slot the path of the leaf of its first element."""
        first = [slot.first for slot in self.flow.slots]
        return [self.paths[number] for number in np.searchsorted(self._ends, first, "right")]

    @cached_property
    def leaves_of_slot(self) -> list[list[str]]:
        """For each slot the paths of the leaves of its elements."""
        return [self.leaves_of(slot.elements) for slot in self.flow.slots]

    @cached_property
    def slots_of(self) -> dict[str, list[int]]:
        """For each leaf the slots that hold some of its elements; none for an unused leaf."""
        slots: dict[str, list[int]] = {path: [] for path in self.paths}
        for number, paths in enumerate(self.leaves_of_slot):
            for path in paths:
                slots[path].append(number)
        return slots

    def leaves_of(self, elements: Counted) -> list[str]:
        """The paths of the leaves that elements belong to."""
        numbers = np.searchsorted(self._ends, elements.bounds, "right")
        # Nearly every slot is of one leaf, and looking up each element of a large one takes long.
        if numbers[0] != numbers[1]:
            numbers = np.searchsorted(self._ends, elements.array(), "right")
        return [self.paths[number] for number in np.unique(numbers)]

    def gather(self, leaves: Mapping[str, Any], elements: Counted) -> Array:
        """The values of elements in the shape of their numbers, from the leaves that hold them."""
        paths = self.leaves_of(elements)
        numbers = elements.array()
        flat = {path: np.asarray(leaves[path]).reshape(-1) for path in paths}
        if len(paths) == 1:
            return flat[paths[0]][numbers - self.trace.spans[paths[0]].start]
        values = np.zeros(numbers.shape, np.result_type(*flat.values()))
        for path, array in flat.items():
            span = self.trace.spans[path]
            inside = (numbers >= span.start) & (numbers < span.stop)
            values[inside] = array[numbers[inside] - span.start]
        return values

    def slots_of_form(self, form: SlotForm) -> list[int]:
        """The slots of a form."""
        return [slot for slot, other in enumerate(self.forms) if other == form]

    def holding(self, held: Mapping[str, Array]) -> "SlottedSide":
        """The side with some more leaves held at values: their slots have the form `HELD`."""
        forms = list(self.forms)
        for path in held:
            for number in self.slots_of[path]:
                forms[number] = HELD
        return replace(self, forms=forms, held={**self.held, **held})


Both = tuple[SlottedSide, SlottedSide]
"""The Linen side and the nnx side."""


def sides(linen: Trace, nnx: Trace, alone: Mapping[str, float]) -> Both:
    """Finds the slots of both sides.

    Args:
      linen, nnx: the traced sides.
      alone: Linen leaves that have no twin, with the value to keep them at.
    """
    are_named_alike = _collections(linen) == _collections(nnx)
    both: list[SlottedSide] = []
    for trace in (linen, nnx):
        side = SlottedSide(trace, flow(trace), [])
        for slot, path in zip(side.flow.slots, side.first_leaf, strict=True):
            collection = trace.leaves[path].collection
            # `batch_stats` against a Variable type of one's own: that names differ proves nothing.
            if collection != "params" and not are_named_alike:
                collection = "other"
            side.forms.append((collection, *slot.shape))
        both.append(side)
        give_back()
    held = {path: np.full(linen.leaves[path].shape, value) for path, value in alone.items()}
    both[0] = both[0].holding(held)
    return _parted(_cut(both[0], both[1])), _parted(_cut(both[1], both[0]))


def _collections(trace: Trace) -> set[str]:
    """The collections of a side's leaves."""
    return {leaf.collection for leaf in trace.leaves.values()}


def even(both: Both) -> bool:
    """Whether both sides have the same forms, equally often."""
    return Counter(both[0].forms) == Counter(both[1].forms)


# What stands where on the other side


def odd_vectors(linen: SlottedSide, nnx: SlottedSide) -> tuple[list[str], list[str]]:
    """The vectors that only one side has (a bias that the port lacks), by their place.

    Linen   kernel  bias  kernel  bias  kernel         the second bias stands where nnx has
    nnx     kernel  bias  kernel        kernel         nothing: it is the odd one
    """
    counts = Counter(linen.forms), Counter(nnx.forms)
    surplus = counts[0] - counts[1], counts[1] - counts[0]
    pairs = in_order(linen.forms, nnx.forms)
    found: tuple[list[str], list[str]] = [], []
    for number, side in enumerate((linen, nnx)):
        paired = {pair[number] for pair in pairs}
        for form, count in surplus[number].items():
            if form == HELD or form[-1] != 1:
                continue
            odd = [slot for slot in side.slots_of_form(form) if slot not in paired]
            # If more slots of the form have no pair, places do not tell which is the odd one.
            if len(odd) == count:
                found[number].extend(dict.fromkeys(side.first_leaf[slot] for slot in odd))
    return found


def in_order(one: Sequence[Any], two: Sequence[Any]) -> list[tuple[int, int]]:
    """Places of equal items, in order, as many as there can be (a longest common subsequence).

    Example:
        >>> in_order("kbkbk", "kbkk")
        [(0, 0), (1, 1), (2, 2), (4, 3)]
    """
    # What both begin and end with is nearly all, and the table below grows with the square.
    start, ends = 0, [len(one), len(two)]
    while start < min(ends) and one[start] == two[start]:
        start += 1
    while start < min(ends) and one[ends[0] - 1] == two[ends[1] - 1]:
        ends = [ends[0] - 1, ends[1] - 1]
    most = Counter[tuple[int, int]]()  # of the rests from two places on, the number of pairs
    for a in range(ends[0] - 1, start - 1, -1):
        for b in range(ends[1] - 1, start - 1, -1):
            fewer = max(most[a + 1, b], most[a, b + 1])
            most[a, b] = 1 + most[a + 1, b + 1] if one[a] == two[b] else fewer
    pairs = list(zip(range(start), range(start), strict=True))
    a = b = start
    while a < ends[0] and b < ends[1]:
        if one[a] == two[b]:
            pairs.append((a, b))
            a, b = a + 1, b + 1
        elif most[a + 1, b] >= most[a, b + 1]:
            a += 1
        else:
            b += 1
    for k in range(len(one) - ends[0]):
        pairs.append((ends[0] + k, ends[1] + k))
    return pairs


# Slots made comparable


def _parted(side: SlottedSide) -> SlottedSide:
    """The side without flow from one lane of a batch to another.

    Under `nn.vmap` three experts are one product, and one value flows on. In a list of experts none
    flows into another.
    """
    counts, lanes = np.array([slot.lane for slot in side.flow.slots]).reshape(-1, 2).T
    is_same_batch = (counts[:, None] == counts) & (counts > 1)
    apart = is_same_batch & (lanes[:, None] != lanes)
    parted = side.flow._replace(above=side.flow.above & ~apart)
    return replace(side, flow=parted)


def _cut(side: SlottedSide, other: SlottedSide) -> SlottedSide:
    """The side with slots cut where that gives forms that the other side has more of."""
    cuts = _cuts(side, other)
    if not cuts:
        return side
    origin: list[int] = []  # of each new slot, the slot that it is, or is a part of
    slots: list[Slot] = []
    forms: list[SlotForm] = []
    for number, (slot, form) in enumerate(zip(side.flow.slots, side.forms, strict=True)):
        parts = cuts.get(number)
        if parts is None:
            origin.append(number)
            slots.append(slot)
            forms.append(form)
            continue
        for lane, ids in enumerate(parts):
            origin.append(number)
            slots.append(Slot(Counted.of(ids), (len(parts), lane)))
            forms.append((form[0], *ids.shape))
    # What flowed into the whole flows into each part.
    above = side.flow.above[np.ix_(origin, origin)]
    return replace(side, flow=side.flow._replace(slots=slots, above=above), forms=forms)


def _cuts(side: SlottedSide, other: SlottedSide) -> dict[int, list[Array]]:
    """By slot, the parts that it is to be cut into.

    A form is cut if none of its slots has a twin, and into a form of which the other side has
    enough left over: three experts (3, 4, 8) in one leaf against three leaves (4, 8).
    """
    mine, theirs = Counter(side.forms), Counter(other.forms)
    cuts: dict[int, list[Array]] = {}
    surplus = [form for form in mine if form != HELD and mine[form] > theirs[form]]
    for form in surplus:
        slots = side.slots_of_form(form)
        if mine[form] - theirs[form] != len(slots):
            continue
        for number in slots:
            for parts in _ways_to_cut(side, side.flow.slots[number]):
                small = (form[0], *parts[0].shape)
                if theirs[small] - mine[small] >= len(parts):
                    mine[small] += len(parts)
                    cuts[number] = parts
                    break
    return cuts


def _ways_to_cut(side: SlottedSide, slot: Slot) -> list[list[Array]]:
    """The ways to cut a slot along an axis of its one leaf, by columns (N) or by rows (K)."""
    path, *others = side.leaves_of(slot.elements)
    if others:
        return []
    ids = slot.numbers()
    ways: list[list[Array]] = []
    shape = side.trace.leaves[path].shape
    first = side.trace.spans[path].start
    for axis, count in enumerate(shape):
        # (N, K): the index along the axis of each element. It must be that of a whole row or
        # column, or the parts would be no rectangles.
        places = np.unravel_index(ids - first, shape)[axis]
        if (places == places[:, :1]).all():
            parts = [ids[places[:, 0] == k] for k in range(count)]
        elif (places == places[:1]).all():
            parts = [ids[:, places[0] == k] for k in range(count)]
        else:
            continue
        is_even = len({part.shape for part in parts}) == 1
        if count > 1 and is_even and parts[0].size:
            ways.append(parts)
    return ways
