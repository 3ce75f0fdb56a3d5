"""Finds where a model first uses each element of each leaf, and what flows into that place.

`flow(trace)` reads the jaxpr of one side. It computes nothing. In place of arrays it carries the
*numbers* of leaf elements along and looks where they end up. The Linen side of `example.py` has
ten elements:

    down/kernel  [[0 1]        up/bias  [4 5]        up/kernel  [[6 7]
                  [2 3]]                                         [8 9]]

    forward pass            elements that the two outputs use     slot             what flows in
    a = x @ up/kernel       6 and 8         7 and 9               0  [[6 8] [7 9]]
    b = a + up/bias         4               5                     1  [[4] [5]]     slot 0
    h = tanh(b)             -               -
    y = h @ down/kernel     0 and 2         1 and 3               2  [[0 2] [1 3]] slots 0 and 1

    >>> from linen_nnx.infer.example import two_layers
    >>> from linen_nnx.infer.trace import trace_linen
    >>> found = flow(trace_linen(two_layers()))
    >>> [slot.numbers().tolist() for slot in found.slots]
    [[[6, 8], [7, 9]], [[4], [5]], [[0, 2], [1, 3]]]
    >>> found.above.astype(int).tolist()
    [[0, 0, 0], [1, 0, 0], [1, 1, 0]]

The nnx side keeps `down/kernel` transposed in a leaf `last`. Its third slot is (2, 2) all the same:
three rules make slots independent of how a model is written.

1. An operation that only moves elements (cast, reshape, transpose, broadcast, slice, concatenate)
   is followed and not counted as a use. What it gives is still a *view* of leaves.
2. The first operation that computes with an element is its first use. A product that sums over K
   inputs for N outputs gives (N, K) elements, anything else (N, 1).
3. A use does not become a slot at once. A fused layer computes `x @ qkv + bias` and cuts the result
   in three; a port has three layers. So a use leaves a *tag* on its output, which is moved and cut
   as the output is. The tag becomes slots when something else consumes the output:

    x @ qkv                  one tag, 12 columns        a product of 12 columns
    q, k, v = split(...)     three tags, 4 columns      as if each had been a product of its own
    q @ k.T                  q and k become slots       here both are consumed
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from linen_nnx.infer.counted import Counted
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
from linen_nnx.infer.masks import holds_bit, mask_of, renamed, unpacked
from linen_nnx.infer.trace import Trace

Array = np.ndarray
Site = tuple[int, ...]
_FOLD = 1 << 16  # integer arrays up to this size (positions, indices) are computed on the way


class Slot(NamedTuple):
    """One first use of leaf elements.

    Attributes:
      elements: (N, K) element numbers, counted through all leaves of the side in their order.
      lane: `(how many, which)`. A product under `nn.vmap` runs several layers as one batch; each
        entry of the batch is a lane. Lanes of one batch do not flow into each other.
    """

    elements: Counted
    lane: tuple[int, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K)."""
        return self.elements.shape

    @property
    def first(self) -> int:
        """The number of its first element."""
        return self.elements.first

    def numbers(self) -> Array:
        """(N, K) element numbers, made anew: they are as large as what they number."""
        return self.elements.array()


class Use(NamedTuple):
    """One equation that uses leaf elements for the first time.

    Attributes:
      site: where the equation is. `(3,)` is the fourth equation of the jaxpr; `(3, 0, 7)` is
        equation 7 in iteration 0 of a scan that is equation 3.
      columns: in the shape of the output, the element that each place uses, or -1. Where `rows` is
        given, the row that each place uses. In the shape of an operand, where the equation keeps no
        element in its place.
      rows: (rows, K) for a product: the elements that each row sums over.
      inputs: which operands depend on the model's inputs.
    """

    site: Site
    columns: Array
    rows: Array | None
    inputs: tuple[int, ...]


class Flow(NamedTuple):
    """All slots of one side, by first use.

    Attributes:
      above: (slots, slots) bool; `above[a, b]` says that what slot b gives flows into the place
        where slot a is used.
      uses: the equations of the slots, by number; none, unless they were asked for.
      owner: (elements,) int32; the number of the use of each element, -1 if none. Likewise.
    """

    slots: list[Slot]
    above: Array
    uses: dict[int, Use]
    owner: Array


class _Tag(NamedTuple):
    """A first use that no slot stands for yet, and where its elements are in a value.

    Attributes:
      bit: its number among all tags, and its bit in masks.
      columns: in the shape of the value, the element at each place, or -1. Where `rows` is given,
        the row at each place.
      order: the number of the use; the parts that a tag is cut into keep it.
      above: the mask of the tags that flow into the use.
      rows: (rows, K) for a product: the elements that each row sums over.
      lanes: (rows,) for a product: the batch entry of each row.
    """

    bit: int
    columns: Array
    order: int
    above: int
    rows: Array | None = None
    lanes: Array | None = None


class _Value(NamedTuple):
    """What is known of one variable of the jaxpr.

    A value that depends on leaves alone has `views`: arrays of element numbers in its shape, -1
    where no element is; several, if leaves were combined (`w * scale`). A value that depends on the
    inputs is `active`, with the tags that are still in line with its axes. A small array of
    integers that depends on neither is a `const`. `mask` names all tags that flow in.
    """

    views: tuple[Array, ...] = ()
    tags: tuple[_Tag, ...] = ()
    mask: int = 0
    active: bool = False
    const: Array | None = None


def flow(trace: Trace, uses: bool = False) -> Flow:
    """Finds the slots of a traced side; the example above shows what they are.

    Args:
      trace: the side.
      uses: whether to keep the equations, too. They number elements one by one, and so take more
        memory than the model.
    """
    values: list[_Value] = []
    for path in trace.leaves:
        values.append(_Value(views=(trace.numbers(path),)))
    for _ in trace.inputs:
        values.append(_Value(active=True))
    walk = _Walk(trace.size, uses)
    outputs = walk.run(trace.jaxpr, values, ())
    walk.flush(outputs, ())
    return walk.finish()


class _Walk:
    """One walk through the equations of a side: collects tags, and makes slots of them."""

    def __init__(self, size: int, keeps_uses: bool) -> None:
        self.tags: list[_Tag] = []
        self.keeps_uses = keeps_uses
        self.uses: dict[int, Use] = {}
        self.slots: list[tuple[tuple[int, int], int, Slot]] = []  # with its order and `above`
        # By element: the tag of its first use, and its slot; -1 as long as it has none.
        self.owner = np.full(size, -1, np.int32)
        self.slot_of = np.full(size, -1, np.int32)
        # By tag, once it is flushed: the slots that stand for its elements.
        self.covers: dict[int, list[int]] = {}
        # Which operands of the equation at hand depend on the model's inputs.
        self.inputs: tuple[int, ...] = ()

    def run(self, jaxpr: Any, args: Sequence[_Value], site: Site) -> list[_Value]:
        """What is known of the results of a jaxpr, open or closed."""

        def equation(number: int, eqn: Any, given: list[_Value]) -> Sequence[_Value]:
            return self.equation(eqn, given, (*site, number))

        return interpret(jaxpr, args, _constant, equation)

    def equation(self, eqn: Any, args: list[_Value], site: Site) -> Sequence[_Value]:
        """What is known of the outputs of an equation."""
        name = eqn.primitive.name
        self.inputs = tuple(number for number, arg in enumerate(args) if arg.active)
        controls = {"scan": self.scan, "while": self.loop, "cond": self.branches}
        if name in controls:
            return controls[name](eqn, args, site)
        inner = called(eqn)
        if inner is not None:
            return self.run(inner, args, site)
        # Positions and loop counters are computed, so that a lookup by them is a known movement.
        consts = [arg.const for arg in args]
        if all(const is not None for const in consts):
            folded = _fold(eqn, consts)
            if folded:
                return folded
        if name in ELEMENTWISE:
            if len(eqn.outvars) > 1:  # an optimization_barrier, say: nothing is combined
                return args
            return [self.elementwise(args, eqn.outvars[0].aval.shape, site)]
        if name in ("concatenate", "stack"):
            return [self.joined(eqn, args, site)]
        if args and (args[0].views or args[0].tags):
            moves = movements(eqn, consts[1:])
            if moves:
                return [self.moved(args[0], move) for move in moves]
        # Most layers write `x @ w`, the weight second.
        for weight in (1, 0):
            if weight < len(args) and args[weight].views:
                axes = product_axes(eqn, weight)
                if axes:
                    shape = eqn.outvars[0].aval.shape
                    return [self.product(args, weight, axes, shape, site)]
        return [self.mixed(args, site)] * len(eqn.outvars)

    # Control flow

    def scan(self, eqn: Any, args: list[_Value], site: Site) -> list[_Value]:
        """The results of a scan: its body is run once, or once per step.

        Once per step, where steps use different elements. Layers stacked by `nn.scan` come in row
        by row; `fori_loop(0, 2, lambda k, x: x + p[k], x)` looks its row up by the counter.
        """
        scan = scan_parts(eqn)
        fixed, carry, rows = scan.operands(args)
        collected = []
        for step in scan.steps() if _steps_differ(fixed, carry, rows) else (0,):
            now = [_row(self, row, step) for row in rows]
            outs = self.run(scan.body, [*fixed, *carry, *now], (*site, step))
            carry = outs[: scan.carried]
            collected.append(outs[scan.carried :])
        # What the steps give row by row is stacked, which keeps no element in its place.
        stacked = [self.mixed(each, site) for each in zip(*collected, strict=True)]
        return [*carry, *stacked]

    def loop(self, eqn: Any, args: list[_Value], site: Site) -> list[_Value]:
        """The results of a while loop, whose body is run once."""
        loop = while_parts(eqn)
        of_test, of_body, carry = loop.operands(args)
        # A number that is constant before the loop may be counted up in it.
        carry = [value._replace(const=None) for value in carry]
        test = self.run(loop.test, [*of_test, *carry], (*site, 0))
        self.flush(test, site)
        return self.run(loop.body, [*of_body, *carry], (*site, 1))

    def branches(self, eqn: Any, args: list[_Value], site: Site) -> list[_Value]:
        """The results of a cond: those of all its branches together."""
        outs = []
        for number, branch in enumerate(branches(eqn)):
            outs.append(self.run(branch, args[1:], (*site, number)))
        self.flush(args[:1], site)
        return [self.mixed(each, site) for each in zip(*outs, strict=True)]

    # Views and tags

    def touch(self, views: Iterable[Array], site: Site, above: int = 0) -> tuple[list[_Tag], int]:
        """Tags the elements of some views that are used here for the first time.

        Returns the new tags, and the mask of the tags of all the elements, new and old.
        """
        tags: list[_Tag] = []
        mask = 0
        for view in views:
            # A bias of 4 elements, broadcast to (32, 128, 4), is looked up 4 times and not 16,384.
            small = unbroadcast(view)
            owner = np.where(small < 0, -2, self.owner[small])
            mask |= mask_of(np.unique(owner[owner >= 0]))
            fresh = owner == -1
            if fresh.any():
                # A large table is not copied for nothing: nearly always all of it is fresh.
                seen_first = small if fresh.all() else np.where(fresh, small, -1)
                tag = self.tag(np.broadcast_to(seen_first, view.shape), site, above)
                self.owner[small[fresh]] = tag.bit
                tags.append(tag)
        for tag in tags:
            mask |= 1 << tag.bit
        return tags, mask

    def tag(self, columns: Array, site: Site, above: int, *product: Array | None) -> _Tag:
        """A new tag, and the use that it stands for. `product`: the rows and lanes of one."""
        tag = _Tag(len(self.tags), columns, len(self.tags), above, *product)
        self.tags.append(tag)
        if self.keeps_uses:
            self.uses[tag.bit] = Use(site, columns, tag.rows, self.inputs)
        return tag

    def elementwise(self, args: list[_Value], shape: tuple[int, ...], site: Site) -> _Value:
        """The result of an equation that keeps every element in its place: `x + bias`, say."""
        views: list[Array] = []
        for arg in args:
            for view in arg.views:
                views.append(np.broadcast_to(view, shape))
        # `kernel * scale` without an input is no use yet: what is applied to it will be.
        if not _any_active(args):
            return _Value(views=tuple(views))
        tags: list[_Tag] = []
        mask = 0
        for arg in args:
            mask |= arg.mask
            for tag in self.pending(arg):
                wide = _spread(tag, shape)
                if not _among(wide, tags):  # `x * sigmoid(x)` has each tag of x twice
                    tags.append(wide)
        new, bits = self.touch(views, site, mask)
        return _Value(tags=(*tags, *new), mask=mask | bits, active=True)

    def moved(self, value: _Value, move: Movement) -> _Value:
        """A value after a movement of its elements, which may leave some of them out.

        A tag of which elements were left out is cut: the part that is left gets a bit of its own.
        """
        if not value.active:
            return _Value(views=tuple(move(view) for view in value.views))
        tags: list[_Tag] = []
        parts: dict[int, int] = {}  # bits, of the whole to the part
        for whole in self.pending(value):
            tag = whole._replace(columns=move(whole.columns))
            if tag.columns.size < whole.columns.size and _is_cut(whole.columns, tag.columns):
                tag = tag._replace(bit=len(self.tags))
                parts[whole.bit] = tag.bit
                self.tags.append(tag)
            tags.append(tag)
        if parts:
            # `split(x @ w + b)`: into a part of b flows that part of `x @ w` and not the whole.
            for place, tag in enumerate(tags):
                tag = tag._replace(above=renamed(tag.above, parts))
                tags[place] = self.tags[tag.bit] = tag
        return _Value(tags=tuple(tags), mask=renamed(value.mask, parts), active=True)

    def joined(self, eqn: Any, args: list[_Value], site: Site) -> _Value:
        """The result of a concatenation or a stack of values of any kind."""
        is_stack = eqn.primitive.name == "stack"
        shape = eqn.outvars[0].aval.shape
        axis = param(eqn, "axis" if is_stack else "dimension")
        sizes = [1 if is_stack else atom.aval.shape[axis] for atom in eqn.invars]
        ends = np.cumsum(sizes)

        def place(array: Array, end: int) -> Array:
            """One array in the shape of the result, with -1 where the others are."""
            whole = np.expand_dims(array, axis) if is_stack else array
            small = unbroadcast(whole, keep=axis)
            wide = *small.shape[:axis], shape[axis], *small.shape[axis + 1 :]
            out = np.full(wide, -1, array.dtype)
            own_part = slice(end - small.shape[axis], end)
            out[(*[slice(None)] * axis, own_part)] = small
            return np.broadcast_to(out, shape)

        # Leaves alone, side by side: `stack([w1, w2])` is one view, as if it were one leaf.
        if all(not arg.active and len(arg.views) == 1 for arg in args):
            parts = [place(arg.views[0], end) for arg, end in zip(args, ends, strict=True)]
            return _Value(views=(np.maximum.reduce(parts),))
        tags: list[_Tag] = []
        mask = 0
        for arg, end in zip(args, ends, strict=True):
            new, bits = self.touch(arg.views, site)
            mask |= arg.mask | bits
            for tag in (*self.pending(arg), *new):
                tags.append(tag._replace(columns=place(tag.columns, end)))
        return _Value(tags=tuple(tags), mask=mask, active=bool(mask) or _any_active(args))

    def product(
        self, args: list[_Value], weight: int, axes: Axes, shape: tuple[int, ...], site: Site
    ) -> _Value:
        """The result of a sum over products with operand `weight`, which is made of leaves."""
        # Of `kernel * scale` the kernel varies most: it is the weight. The scale counts as used
        # just before.
        view, *others = sorted(args[weight].views, key=lambda each: -_varying(each).size)
        rest = [*args[:weight], *args[weight + 1 :], _Value(views=tuple(others))]
        above = self.flush(rest, site)
        # One row for each output of the product, batch entry by batch entry.
        ids = view.transpose([*axes.batch, *axes.free, *axes.summed])
        grid = ids.shape[: len(axes.places)]
        rows = ids.reshape(int(np.prod(grid)), -1)
        owners = self.owner[rows]
        bits = mask_of(np.unique(owners[owners >= 0]))
        # Not a first use: a row one of whose elements was used before (a kernel applied twice).
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
        """The result of an equation that keeps no element in its place: a softmax's sum, say."""
        active = any(arg.active or arg.views for arg in args)
        return _Value(mask=self.flush(args, site), active=active)

    # From tags to slots

    def pending(self, value: _Value) -> list[_Tag]:
        """The tags of a value that no slot stands for yet."""
        return [tag for tag in value.tags if tag.bit not in self.covers]

    def flush(self, values: Iterable[_Value], site: Site) -> int:
        """Makes slots of all pending tags of some values; returns the mask of what they hand on."""
        mask = 0
        for value in values:
            new, bits = self.touch(value.views, site)
            for tag in (*self.pending(value), *new):
                # Asked again, as `x + x[::-1]` has one tag twice, with its columns in two orders.
                if tag.bit not in self.covers:
                    self.register(tag, value.tags)
            mask |= value.mask | bits
        return mask

    def register(self, tag: _Tag, beside: Sequence[_Tag]) -> None:
        """Makes a slot of the elements of a tag that have none: one for each lane."""
        # In the order in which they stand in the value: that is the same on both sides, in whatever
        # order the elements are stored.
        numbers = _by_appearance(_varying(tag.columns))
        numbers = numbers[numbers >= 0]
        rows = numbers[:, None] if tag.rows is None else _taken(tag.rows, numbers)
        seen = self.slot_of[rows[:, 0]]
        covers = np.unique(seen[seen >= 0]).tolist()
        lanes = _lanes(tag, beside, numbers)
        for lane in np.unique(lanes[seen < 0]):
            part = (seen < 0) & (lanes == lane)
            elements = rows if part.all() else rows[part]
            slot = Slot(Counted.of(elements), (len(np.unique(lanes)), int(lane)))
            covers.append(len(self.slots))
            self.slot_of[elements] = len(self.slots)
            # Parts of one use have one order: among them the first columns come first.
            order = tag.order, int(numbers[part].min())
            self.slots.append((order, tag.above, slot))
        self.covers[tag.bit] = covers

    def finish(self) -> Flow:
        """Makes slots of the tags that nothing consumed, and of masks of tags pairs of slots."""
        # Backwards: parts come after the whole that they were cut from. Once they have slots, the
        # whole makes a slot of no more than what is left of it.
        for tag in reversed(self.tags):
            if tag.bit not in self.covers:
                self.register(tag, ())
        in_order = sorted(range(len(self.slots)), key=lambda number: self.slots[number][0])
        place = {number: rank for rank, number in enumerate(in_order)}
        # (tags, slots), 1 where a slot stands for a tag. In float32, as numpy has no fast product
        # of booleans.
        cover = np.zeros((len(self.tags), len(in_order)), np.float32)
        for bit, numbers in self.covers.items():
            for number in numbers:
                cover[bit, place[number]] = 1
        slots: list[Slot] = []
        masks: list[int] = []
        for number in in_order:
            _, above, slot = self.slots[number]
            slots.append(slot)
            masks.append(above)
        flows_in = unpacked(masks, len(self.tags)) @ cover > 0
        return Flow(slots, flows_in, self.uses, self.owner if self.keeps_uses else np.zeros(0))


def _any_active(values: Iterable[_Value]) -> bool:
    """Whether some of the values depends on the model's inputs."""
    return any(value.active for value in values)


def _steps_differ(fixed: Iterable[_Value], carry: Iterable[_Value], rows: Iterable[_Value]) -> bool:
    """Whether the steps of a scan use different elements."""
    for row in rows:
        if row.views or row.tags:
            return True
    # A number that is counted up, and leaves that it may look up.
    counts = any(value.const is not None and value.const.ndim == 0 for value in carry)
    return counts and any(value.views for value in fixed)


def _fold(eqn: Any, consts: list[Array | None]) -> list[_Value] | None:
    """The values of an equation of integer constants, if it is one."""
    for out in eqn.outvars:
        if out.aval.size > _FOLD or getattr(out.aval.dtype, "kind", "?") not in "iub":
            return None
    return [_constant(out) for out in bind(eqn, consts)]


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


# Arrays of numbers


def unbroadcast(array: Array, keep: int | None = None) -> Array:
    """The array with every broadcast axis, but the axis `keep`, cut to length 1.

    Example:
        >>> unbroadcast(np.broadcast_to([4, 5], (3, 2)))
        array([[4, 5]])
    """
    cut = [slice(None)] * array.ndim
    for axis, stride in enumerate(array.strides):
        if stride == 0 and axis != keep:
            cut[axis] = slice(0, 1)
    return array[tuple(cut)]


def _varying(array: Array) -> Array:
    """The array with every axis along which it is constant cut to length 1."""
    array = unbroadcast(array)
    for axis in range(array.ndim):
        first = array[(*[slice(None)] * axis, slice(0, 1))]
        if array.shape[axis] > 1 and (array == first).all():
            array = first
    return array


def _by_appearance(array: Array) -> Array:
    """The different numbers of an array, each where it first appears.

    Example:
        >>> _by_appearance(np.array([[5, 3], [3, 4]]))
        array([5, 3, 4])
    """
    flat = array.reshape(-1)
    # A table of embeddings counts up: sorting it would take several times its memory.
    if (flat[1:] > flat[:-1]).all():
        return flat
    numbers, first = np.unique(flat, return_index=True)
    return numbers[np.argsort(first)]


def _taken(rows: Array, numbers: Array) -> Array:
    """Some rows of an array; the array itself where they are all of its rows, in their order."""
    if len(numbers) == len(rows) and (numbers == np.arange(len(rows))).all():
        return rows
    return rows[numbers]


def _is_cut(before: Array, after: Array) -> bool:
    """Whether a movement left columns out, rather than copies of the same ones."""
    return len(np.unique(unbroadcast(after))) < len(np.unique(unbroadcast(before)))


def _spread(tag: _Tag, shape: tuple[int, ...]) -> _Tag:
    """The tag in the shape of an output; axes of length 1 are repeated."""
    same = tag.columns.shape == shape
    return tag if same else tag._replace(columns=np.broadcast_to(tag.columns, shape))


def _among(tag: _Tag, tags: list[_Tag]) -> bool:
    """Whether a tag is among others, with its columns in the same places."""
    for other in tags:
        if tag.bit != other.bit:
            continue
        # Identity first: comparing large arrays takes long, and most are the same one.
        if tag.columns is other.columns or np.array_equal(tag.columns, other.columns):
            return True
    return False


def _lanes(tag: _Tag, beside: Sequence[_Tag], numbers: Array) -> Array:
    """Which lane of a batched product each column belongs to, or acts on; -1 for none.

    Three experts under `nn.vmap`: the product with their kernels has three lanes. A bias that is
    added has no lanes of its own, but each of its elements stands beside columns of one lane.
    """
    if tag.lanes is not None:
        return tag.lanes[numbers]
    for other in beside:
        if other.lanes is None or not other.lanes.any():
            continue
        if holds_bit(tag.above, other.bit):
            found, first = np.unique(tag.columns, return_index=True)
            acts_on = other.columns.reshape(-1)[first[np.searchsorted(found, numbers)]]
            return np.where(acts_on < 0, -1, other.lanes[acts_on])
    return np.zeros(len(numbers), int)
