"""The dataflow of a traced forward pass: where, in which order and in which form leaves are used.

`flow(trace)` walks a jaxpr through jit, remat, scan, while, cond and custom derivatives without
computing anything. Casts, reshapes, transposes, broadcasts, slices and concatenations of a leaf
are views of its elements, and so are slices of what a leaf was applied to. Every first use becomes
a `Slot`: the leaf elements in the form in which the computation sees them, (N, K) for a product
that sums over K and (N, 1) for everything else. Two models that compute the same have the same
slots, however their leaves are named, stacked, fused, transposed or reshaped.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from linen_nnx.infer.equations import (
    ELEMENTWISE,
    Axes,
    Movement,
    broadcast,
    movements,
    product_axes,
)
from linen_nnx.infer.jaxprs import (
    bind,
    branches,
    called,
    interpret,
    param,
    scan_parts,
    while_parts,
)
from linen_nnx.infer.trace import Trace

Array = np.ndarray
Site = tuple[int, ...]
_FOLD = 1 << 16  # integer arrays up to this size (positions, indices) are computed on the way


class Slot(NamedTuple):
    """One first use of leaf elements.

    ids: (N, K) element numbers, counted through all leaves of the side in their order.
    lane: (how many, which): of a product batched over several layers (nn.vmap), the entry. Lanes
      of one batch do not flow into each other.
    """

    ids: Array
    lane: tuple[int, int]


class Use(NamedTuple):
    """One equation that uses leaf elements for the first time, and where they are in its output.

    site: the address of the equation: its index, within nested jaxprs the chain of indices; the
      iteration follows the index of a scan.
    columns: -1 or an element number at each place of the output (or of an operand, where the
      equation keeps no element in its place); with `rows` (columns, K) the number of a row, whose
      elements a product sums over. inputs: its operands that depend on the model's inputs.
    """

    site: Site
    columns: Array
    rows: Array | None
    inputs: tuple[int, ...]


class Flow(NamedTuple):
    """All slots of one side, by first use.

    above: (slots, slots) bool; [a, b]: what b gives flows into the place where a is used.
    uses: the equations of the slots; owner: for each element the number of its use, -1 if none.
    """

    slots: list[Slot]
    above: Array
    uses: dict[int, Use]
    owner: Array


class _Tag(NamedTuple):
    """Columns that are still in line with the axes of a value, -1 where there is none.

    A column is a leaf element or, with `rows` (columns, K), one output of a product; `lanes` are
    the batch entries of such outputs. `order` tells of the first use, `above` (bits of tags) what
    flows into it.
    """

    bit: int
    columns: Array
    order: int
    above: int
    rows: Array | None = None
    lanes: Array | None = None


class _Value(NamedTuple):
    """What is known of one variable: views of leaves, or tags of an activation, or a constant."""

    views: tuple[Array, ...] = ()
    tags: tuple[_Tag, ...] = ()
    mask: int = 0  # the bits of all tags that flow in
    active: bool = False
    const: Array | None = None


def flow(trace: Trace) -> Flow:
    """The slots of a traced side."""
    values = [_Value(views=(numbers,)) for numbers in trace.numbers.values()]
    walk = _Walk(sum(numbers.size for numbers in trace.numbers.values()))
    values += [_Value(active=True) for _ in trace.inputs]
    walk.flush(walk.run(trace.jaxpr, values, ()), ())
    return walk.finish()


class _Walk:
    def __init__(self, size: int) -> None:
        self.owner = np.full(size, -1, np.int32)  # element -> the tag of its first use
        self.slot_of = np.full(size, -1, np.int32)
        self.slots: list[tuple[tuple[int, int], int, Slot]] = []  # with its order and `above`
        self.tags: list[_Tag] = []
        self.uses: dict[int, Use] = {}
        self.inputs: tuple[int, ...] = ()  # of the equation at hand
        self.covers: dict[int, list[int]] = {}  # bit -> slots, once a tag is flushed

    def run(self, jaxpr: Any, args: Sequence[_Value], site: Site) -> list[_Value]:
        """The values that a jaxpr, open or closed, returns."""

        def equation(number: int, eqn: Any, given: list[_Value]) -> Sequence[_Value]:
            return self.equation(eqn, given, (*site, number))

        return interpret(jaxpr, args, _constant, equation)

    def equation(self, eqn: Any, args: list[_Value], site: Site) -> Sequence[_Value]:
        name = eqn.primitive.name
        self.inputs = tuple(number for number, arg in enumerate(args) if arg.active)
        if control := {"scan": self.scan, "while": self.loop, "cond": self.branches}.get(name):
            return control(eqn, args, site)
        if (inner := called(eqn)) is not None:
            return self.run(inner, args, site)
        if all(arg.const is not None for arg in args) and (folded := _fold(eqn, args)):
            return folded
        if name in ELEMENTWISE:
            several = len(eqn.outvars) > 1  # an optimization_barrier, say: nothing is combined
            shapes = [out.aval.shape for out in eqn.outvars]
            return args if several else [self.elementwise(args, shapes[0], site)]
        if name in ("concatenate", "stack"):
            return [self.joined(eqn, args, site)]
        rest = [arg.const for arg in args[1:]]
        if args and (args[0].views or args[0].tags) and (moves := movements(eqn, rest)):
            return [self.moved(args[0], move) for move in moves]
        for weight in (1, 0):
            if weight < len(args) and args[weight].views and (axes := product_axes(eqn, weight)):
                return [self.product(args, weight, axes, eqn.outvars[0].aval.shape, site)]
        return [self.mixed(args, site)] * len(eqn.outvars)

    # Control flow

    def scan(self, eqn: Any, args: list[_Value], site: Site) -> list[_Value]:
        """Runs the body once; once per step where that shows which elements a step uses."""
        scan = scan_parts(eqn)
        fixed, carry, rows = scan.operands(args)
        counts = any(value.const is not None and value.const.ndim == 0 for value in carry)
        every = any(row.views or row.tags for row in rows) or (
            counts and any(value.views for value in fixed)
        )
        collected = []
        for step in scan.steps() if every else (0,):
            now = [_row(self, row, step) for row in rows]
            outs = self.run(scan.body, [*fixed, *carry, *now], (*site, step))
            carry = outs[: scan.carried]
            collected.append(outs[scan.carried :])
        return [*carry, *(self.mixed(each, site) for each in zip(*collected, strict=True))]

    def loop(self, eqn: Any, args: list[_Value], site: Site) -> list[_Value]:
        loop = while_parts(eqn)
        of_test, of_body, carry = loop.operands(args)
        carry = [value._replace(const=None) for value in carry]  # it may be counted up
        test = self.run(loop.test, [*of_test, *carry], (*site, 0))
        self.flush(test, site)
        return self.run(loop.body, [*of_body, *carry], (*site, 1))

    def branches(self, eqn: Any, args: list[_Value], site: Site) -> list[_Value]:
        outs = [
            self.run(branch, args[1:], (*site, number))
            for number, branch in enumerate(branches(eqn))
        ]
        self.flush(args[:1], site)
        return [self.mixed(each, site) for each in zip(*outs, strict=True)]

    # Views and tags

    def touch(self, views: Iterable[Array], site: Site, above: int = 0) -> tuple[list[_Tag], int]:
        """Tags for the elements that are used for the first time, and the bits of all."""
        tags, bits = [], 0
        for view in views:
            small = unbroadcast(view)
            used = np.where(small < 0, -2, self.owner[small])
            bits |= _bits(np.unique(used[used >= 0]))
            if (fresh := used == -1).any():
                columns = np.broadcast_to(np.where(fresh, small, -1), view.shape)
                tags.append(self.tag(columns, site, above))
                self.owner[small[fresh]] = tags[-1].bit
        return tags, bits | _bits(tag.bit for tag in tags)

    def tag(self, columns: Array, site: Site, above: int, *product: Array | None) -> _Tag:
        tag = _Tag(len(self.tags), columns, len(self.tags), above, *product)
        self.tags.append(tag)
        self.uses[tag.bit] = Use(site, columns, tag.rows, self.inputs)
        return tag

    def elementwise(self, args: list[_Value], shape: tuple[int, ...], site: Site) -> _Value:
        views = [np.broadcast_to(view, shape) for arg in args for view in arg.views]
        if not any(arg.active for arg in args):
            return _Value(views=tuple(views))
        tags: list[_Tag] = []
        mask = 0
        for arg in args:
            mask |= arg.mask
            wide = (_spread(tag, shape) for tag in self.pending(arg))
            tags += [tag for tag in wide if not _among(tag, tags)]
        new, bits = self.touch(views, site, mask)
        return _Value(tags=(*tags, *new), mask=mask | bits, active=True)

    def moved(self, value: _Value, move: Movement) -> _Value:
        """The value after a movement of its elements, which may leave some of them out."""
        if not value.active:
            return _Value(views=tuple(move(view) for view in value.views))
        tags = [tag._replace(columns=move(tag.columns)) for tag in self.pending(value)]
        parts: dict[int, int] = {}
        for place, (tag, old) in enumerate(zip(tags, self.pending(value), strict=True)):
            if tag.columns.size < old.columns.size and _cut(old.columns, tag.columns):
                parts[tag.bit] = len(self.tags)
                tags[place] = tag._replace(bit=len(self.tags))
                self.tags.append(tags[place])
        if parts:  # of what was cut with it only this part flows on
            tags = [tag._replace(above=_renamed(tag.above, parts)) for tag in tags]
            for tag in tags:
                self.tags[tag.bit] = tag
        return _Value(tags=tuple(tags), mask=_renamed(value.mask, parts), active=True)

    def joined(self, eqn: Any, args: list[_Value], site: Site) -> _Value:
        """A concatenation or stack of values of any kind."""
        stack, shape = eqn.primitive.name == "stack", eqn.outvars[0].aval.shape
        axis = param(eqn, "axis" if stack else "dimension")
        ends = np.cumsum([1 if stack else atom.aval.shape[axis] for atom in eqn.invars])

        def place(array: Array, end: int) -> Array:
            small = unbroadcast(np.expand_dims(array, axis) if stack else array, keep=axis)
            out = np.full((*small.shape[:axis], shape[axis], *small.shape[axis + 1 :]), -1)
            out[(*[slice(None)] * axis, slice(end - small.shape[axis], end))] = small
            return np.broadcast_to(out, shape)

        if not any(arg.active for arg in args) and all(len(arg.views) == 1 for arg in args):
            whole = [place(arg.views[0], end) for arg, end in zip(args, ends, strict=True)]
            return _Value(views=(np.maximum.reduce(whole),))
        tags: list[_Tag] = []
        mask = 0
        for arg, end in zip(args, ends, strict=True):
            new, bits = self.touch(arg.views, site)
            mask |= arg.mask | bits
            every = [*self.pending(arg), *new]
            tags += [tag._replace(columns=place(tag.columns, end)) for tag in every]
        return _Value(tags=tuple(tags), mask=mask, active=bool(mask) or any(a.active for a in args))

    def product(
        self, args: list[_Value], weight: int, axes: Axes, shape: tuple[int, ...], site: Site
    ) -> _Value:
        """A sum over products with a leaf."""
        view, *others = sorted(args[weight].views, key=lambda each: -_varying(each).size)
        rest = [arg for number, arg in enumerate(args) if number != weight]
        above = self.flush([*rest, _Value(views=tuple(others))], site)
        ids = view.transpose([*axes.batch, *axes.free, *axes.summed])
        grid = ids.shape[: len(axes.places)]
        rows = ids.reshape(int(np.prod(grid)), -1)
        owners = self.owner[rows]
        bits = _bits(np.unique(owners[owners >= 0]))
        fresh = (owners < 0).all(axis=1)
        if not fresh.any():
            return _Value(mask=above | bits, active=True)
        columns = np.where(fresh, np.arange(len(rows)), -1).reshape(grid)
        columns = broadcast(columns, shape, axes.places)
        count = int(np.prod(grid[: len(axes.batch)]))
        lanes = np.repeat(np.arange(count), len(rows) // count)
        tag = self.tag(columns, site, above, rows, lanes)
        self.owner[rows[fresh]] = tag.bit
        return _Value(tags=(tag,), mask=above | bits | 1 << tag.bit, active=True)

    def mixed(self, args: Sequence[_Value], site: Site) -> _Value:
        """What comes of values in a way that keeps no element in its place."""
        active = any(arg.active or arg.views for arg in args)
        return _Value(mask=self.flush(args, site), active=active)

    def pending(self, value: _Value) -> list[_Tag]:
        return [tag for tag in value.tags if tag.bit not in self.covers]

    def flush(self, values: Iterable[_Value], site: Site) -> int:
        """Makes slots of all that is pending on values; returns the bits that flow out of them."""
        mask = 0
        for value in values:
            new, bits = self.touch(value.views, site)
            for tag in (*self.pending(value), *new):
                if tag.bit not in self.covers:
                    self.register(tag, value.tags)
            mask |= value.mask | bits
        return mask

    def register(self, tag: _Tag, beside: Sequence[_Tag]) -> None:
        numbers, first = np.unique(_varying(tag.columns), return_index=True)
        numbers = numbers[np.argsort(first)]
        numbers = numbers[numbers >= 0]
        rows = numbers[:, None] if tag.rows is None else tag.rows[numbers]
        seen = self.slot_of[rows[:, 0]]
        covers = np.unique(seen[seen >= 0]).tolist()
        lanes = _lanes(tag, beside, numbers)
        for lane in np.unique(lanes[seen < 0]):
            part = (seen < 0) & (lanes == lane)
            slot = Slot(rows[part], (len(np.unique(lanes)), int(lane)))
            covers.append(len(self.slots))
            self.slot_of[slot.ids] = len(self.slots)
            self.slots.append(((tag.order, int(numbers[part].min())), tag.above, slot))
        self.covers[tag.bit] = covers

    def finish(self) -> Flow:
        """Registers what nothing consumed, and turns bits into slots."""
        for tag in reversed(self.tags):  # parts before the whole they were cut from
            if tag.bit not in self.covers:
                self.register(tag, ())
        ranks = sorted(range(len(self.slots)), key=lambda number: self.slots[number][0])
        place = {number: rank for rank, number in enumerate(ranks)}
        cover = np.zeros((len(self.tags), len(ranks)), np.float32)
        for bit, numbers in self.covers.items():
            cover[bit, [place[number] for number in numbers]] = 1
        above = _unpacked([self.slots[number][1] for number in ranks], len(self.tags)) @ cover > 0
        slots = [self.slots[number][2] for number in ranks]
        return Flow(slots, above, self.uses, self.owner)


def _fold(eqn: Any, args: list[_Value]) -> list[_Value] | None:
    """The values of an equation of integer constants, if it is one."""
    for out in eqn.outvars:
        if out.aval.size > _FOLD or getattr(out.aval.dtype, "kind", "?") not in "iub":
            return None
    return [_constant(out) for out in bind(eqn, [arg.const for arg in args])]


def _constant(value: Any) -> _Value:
    """A constant, with its value where it is a small array of integers or booleans."""
    kind = getattr(value, "dtype", None) or np.result_type(value)
    small = getattr(kind, "kind", "?") in "iub" and np.size(value) <= _FOLD
    return _Value(const=np.asarray(value)) if small else _Value()


def _row(walk: _Walk, value: _Value, step: int) -> _Value:
    """What a scan hands to one step."""
    if value.const is not None:
        return _Value(const=value.const[step])
    return walk.moved(value, lambda array: array[step])


def unbroadcast(array: Array, keep: int | None = None) -> Array:
    """The array with every broadcast axis cut to length 1."""
    ones = (stride == 0 and axis != keep for axis, stride in enumerate(array.strides))
    return array[tuple(slice(0, 1) if one else slice(None) for one in ones)]


def _varying(array: Array) -> Array:
    """The array with every axis along which it is constant cut to length 1."""
    array = unbroadcast(array)
    for axis in range(array.ndim):
        first = array[(*[slice(None)] * axis, slice(0, 1))]
        if array.shape[axis] > 1 and (array == first).all():
            array = first
    return array


def _cut(before: Array, after: Array) -> bool:
    """Whether a movement left columns out, rather than copies of the same ones."""
    return len(np.unique(unbroadcast(after))) < len(np.unique(unbroadcast(before)))


def _spread(tag: _Tag, shape: tuple[int, ...]) -> _Tag:
    """The tag in the shape of an output; axes of length 1 are repeated."""
    same = tag.columns.shape == shape
    return tag if same else tag._replace(columns=np.broadcast_to(tag.columns, shape))


def _among(tag: _Tag, tags: list[_Tag]) -> bool:
    return any(
        tag.bit == other.bit
        and (tag.columns is other.columns or np.array_equal(tag.columns, other.columns))
        for other in tags
    )


def _lanes(tag: _Tag, beside: Sequence[_Tag], numbers: Array) -> Array:
    """Which lane of a batched product each column belongs to, or acts on."""
    if tag.lanes is not None:
        return tag.lanes[numbers]
    for other in beside:
        if other.lanes is not None and other.lanes.any() and tag.above >> other.bit & 1:
            found, first = np.unique(tag.columns, return_index=True)
            acts_on = other.columns.reshape(-1)[first[np.searchsorted(found, numbers)]]
            return np.where(acts_on < 0, -1, other.lanes[acts_on])
    return np.zeros(len(numbers), int)


def _bits(numbers: Iterable[int]) -> int:
    return sum({1 << int(number) for number in numbers})


def _renamed(mask: int, names: dict[int, int]) -> int:
    for old, new in names.items():
        if mask >> old & 1:
            mask = mask & ~(1 << old) | 1 << new
    return mask


def _unpacked(masks: list[int], count: int) -> Array:
    """(masks, count) float32 of 0 and 1."""
    width = (count + 7) // 8
    data = b"".join(mask.to_bytes(width, "little") for mask in masks)
    bits = np.frombuffer(data, np.uint8).reshape(len(masks), width)
    return np.unpackbits(bits, axis=1, bitorder="little")[:, :count].astype(np.float32)
