"""The dataflow of a traced forward pass: where, in which order and in which form leaves are used.

`flow(trace)` walks a jaxpr through jit, remat, scan, while, cond and custom derivatives without
computing anything. Casts, reshapes, transposes, broadcasts, slices and concatenations of a leaf
are views of its elements, and so are slices of what a leaf was applied to. Every first use becomes
a `Slot`: the leaf elements in the form in which the computation sees them, (N, K) for a product
that sums over K and (N, 1) for everything else. Two models that compute the same have the same
slots, however their leaves are named, stacked, fused, transposed or reshaped.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.extend.core import Literal

from linen_nnx.twin import Trace

Array = np.ndarray
_FOLD = 1 << 16  # integer arrays up to this size (positions, indices) are computed on the way
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")
_ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil clamp "
    "convert_element_type copy copy_p cos cosh device_put div eq erf erf_inv erfc exp exp2 expm1 "
    "floor ge gt integer_pow is_finite le log log1p logistic lt max min mul name ne neg nextafter "
    "not optimization_barrier or pow reduce_precision rem round rsqrt select_n sharding_constraint "
    "sign sin sinh sqrt square stop_gradient sub tan tanh xor".split()
)
_PARALLEL = frozenset({"device_put", "optimization_barrier"})  # many in, as many out, untouched


class Slot(NamedTuple):
    """One first use of leaf elements.

    ids: (N, K) element numbers, counted through all leaves of the side in their order.
    order: what sorts slots by first use.
    site: the address of the equation: its index, within nested jaxprs the chain of indices; the
      iteration follows the index of a scan.
    lane: (how many, which): of a product batched over several layers (nn.vmap), the entry. Lanes
      of one batch do not flow into each other.
    """

    ids: Array
    order: tuple[int, int]
    site: tuple[int, ...]
    lane: tuple[int, int]
    above: int
    base: int


class Flow(NamedTuple):
    """All slots of one side, by first use.

    starts: the number of the first element of each leaf.
    above: (slots, slots) bool; [a, b]: what b gives flows into the place where a is used.
    base: the same, where a acts directly, element by element, on what b gives (a bias on a
      product); such a b is not above.
    """

    slots: list[Slot]
    starts: dict[str, int]
    size: int
    above: Array
    base: Array


class _Tag(NamedTuple):
    """Columns of a leaf that are still in line with the axes of a value, -1 where there is none.

    A column is an element or, with `rows` (columns, K), one output of a product.
    """

    bit: int
    columns: Array
    rows: Array | None
    keys: Array | None  # the batch entry that each column of a batched product belongs to
    order: int
    site: tuple[int, ...]
    above: int
    base: int


class _Value(NamedTuple):
    """What is known of one variable: a view of leaves (`views`), or an activation, or a constant."""

    views: tuple[Array, ...] = ()
    tags: tuple[_Tag, ...] = ()
    mask: int = 0  # the bits of all tags that flow in
    active: bool = False
    const: Array | None = None


def flow(trace: Trace) -> Flow:
    """The slots of a traced side."""
    starts, count, values = {}, 0, []
    for path, leaf in trace.leaves.items():
        starts[path] = count
        size = int(np.prod(leaf.shape))
        values.append(_Value(views=(np.arange(count, count + size).reshape(leaf.shape),)))
        count += size
    walk = _Walk(count)
    values += [_Value(active=True) for _ in trace.inputs]
    for out in walk.run(trace.jaxpr.jaxpr, trace.jaxpr.consts, values, ()):
        walk.flush(out)
    return walk.finish(starts)


class _Walk:
    def __init__(self, size: int) -> None:
        self.size = size
        self.owner = np.full(size, -1)  # element -> the tag of its first use
        self.slot_of = np.full(size, -1)
        self.slots: list[Slot] = []
        self.tags: list[_Tag] = []
        self.covers: dict[int, list[int]] = {}  # bit -> slots; complete once a tag is flushed

    def run(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[_Value], site: tuple[int, ...]
    ) -> list[_Value]:
        """The values that a jaxpr returns."""
        known = dict(zip(jaxpr.constvars, map(_constant, consts), strict=True))
        known.update(zip(jaxpr.invars, args, strict=True))

        def read(atom: Any) -> _Value:
            return _constant(atom.val) if isinstance(atom, Literal) else known[atom]

        for number, eqn in enumerate(jaxpr.eqns):
            outs = self.equation(eqn, [read(atom) for atom in eqn.invars], (*site, number))
            known.update(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, eqn: Any, args: list[_Value], site: tuple[int, ...]) -> Sequence[_Value]:
        name, params = eqn.primitive.name, eqn.params
        shape = eqn.outvars[0].aval.shape if eqn.outvars else ()
        inner = next((params[key] for key in _CALLS if key in params), None)
        if name == "scan":
            return self.scan(params, args, site)
        if name == "while":
            return self.loop(params, args, site)
        if name == "cond":
            return self.branches(params, args, site)
        if inner is not None:
            return self.run(*_opened(inner), args, site)
        if all(arg.const is not None for arg in args) and (folded := _fold(eqn, args)):
            return folded
        if name in _PARALLEL:
            return args
        if name in _ELEMENTWISE:
            return [self.elementwise(args, shape, site)]
        move = _movement(eqn, args)
        if move is not None and (args[0].views or args[0].tags):
            return [self.moved(args[0], cut) for cut in move]
        if name in ("concatenate", "stack"):
            return [self.joined(eqn, args, shape, site)]
        if name == "dot_general":
            weight = 1 if args[1].views else 0
            if args[weight].views:
                return [self.product(args, weight, *_dot(eqn, weight), shape, site)]
        if name == "conv_general_dilated" and args[1].views:
            out, into, *window = params["dimension_numbers"].rhs_spec
            feature = params["dimension_numbers"].out_spec[1]
            return [self.product(args, 1, [], [out], [*window, into], [feature], shape, site)]
        if name == "gather" and args[0].views and (dims := _lookup(eqn)):
            return [self.product(args, 0, [], *dims, shape, site)]
        mask = 0
        for arg in args:
            mask |= self.flush(arg, site)
        active = any(arg.active or arg.views for arg in args)
        return [_Value(mask=mask, active=active) for _ in eqn.outvars]

    # Control flow

    def scan(self, params: Any, args: list[_Value], site: tuple[int, ...]) -> list[_Value]:
        """Runs the body once; once per step where that shows which elements a step uses."""
        fixed = params["num_consts"]
        carried = fixed + params["num_carry"]
        consts, carry, rows = args[:fixed], args[fixed:carried], args[carried:]
        counts = any(value.const is not None and value.const.ndim == 0 for value in carry)
        sliced = any(row.views or row.tags for row in rows)
        steps = range(params["length"])
        if not sliced and not (counts and any(value.views for value in consts)):
            steps = range(1)
        collected: list[list[_Value]] = []
        for step in reversed(steps) if params["reverse"] else steps:
            now = [self.row(row, step) for row in rows]
            outs = self.run(*_opened(params["jaxpr"]), [*consts, *carry, *now], (*site, step))
            carry = outs[: params["num_carry"]]
            collected.append(outs[params["num_carry"] :])
        if params["reverse"]:
            collected.reverse()
        return [*carry, *(self.stacked(list(rows), site) for rows in zip(*collected, strict=True))]

    def row(self, value: _Value, step: int) -> _Value:
        if value.const is not None:
            return _Value(const=value.const[step])
        return self.moved(value, lambda array: array[step])

    def stacked(self, values: list[_Value], site: tuple[int, ...]) -> _Value:
        """The outputs of all steps as one value, its pending tags flushed."""
        mask = 0
        for value in values:
            mask |= self.flush(value, site)
        return _Value(mask=mask, active=any(value.active or value.views for value in values))

    def loop(self, params: Any, args: list[_Value], site: tuple[int, ...]) -> list[_Value]:
        tests, bodies = params["cond_nconsts"], params["body_nconsts"]
        # A constant that a loop counts up is none.
        carry = [a._replace(const=None) for a in args[tests + bodies :]]
        for out in self.run(*_opened(params["cond_jaxpr"]), [*args[:tests], *carry], (*site, 0)):
            self.flush(out, site)
        body = _opened(params["body_jaxpr"])
        return self.run(*body, [*args[tests : tests + bodies], *carry], (*site, 1))

    def branches(self, params: Any, args: list[_Value], site: tuple[int, ...]) -> list[_Value]:
        outs = [
            self.run(*_opened(branch), args[1:], (*site, number))
            for number, branch in enumerate(params["branches"])
        ]
        self.flush(args[0], site)
        return [self.stacked(list(values), site) for values in zip(*outs, strict=True)]

    # Views and tags

    def touch(
        self, views: Sequence[Array], site: tuple[int, ...], above: int = 0, base: int = 0
    ) -> tuple[list[_Tag], int]:
        """Tags for the elements that are used for the first time, and the bits of all."""
        tags, bits = [], 0
        for view in views:
            lean = _lean(view)
            used = np.where(lean < 0, -2, self.owner[lean])
            bits |= _bits(np.unique(used[used >= 0]))
            fresh = used == -1
            if fresh.any():
                columns = view if fresh.all() else np.broadcast_to(
                    np.where(fresh, lean, -1), view.shape
                )  # fmt: skip
                tag = self.tag(columns, None, None, site, above, base)
                self.owner[lean[fresh]] = tag.bit
                tags.append(tag)
                bits |= 1 << tag.bit
        return tags, bits

    def tag(
        self,
        columns: Array,
        rows: Array | None,
        keys: Array | None,
        site: tuple[int, ...],
        above: int,
        base: int,
    ) -> _Tag:
        number = len(self.tags)
        self.tags.append(_Tag(number, columns, rows, keys, number, site, above, base))
        return self.tags[-1]

    def elementwise(
        self, args: list[_Value], shape: tuple[int, ...], site: tuple[int, ...]
    ) -> _Value:
        active = [arg for arg in args if arg.active]
        views = [np.broadcast_to(view, shape) for arg in args for view in arg.views]
        if not active:
            return _Value(views=tuple(views))
        tags: list[_Tag] = []
        mask = 0
        for arg in active:
            mask |= arg.mask
            tags += [t for t in arg.tags if t.bit not in self.covers and not _among(t, tags)]
        pending = _bits([tag.bit for tag in tags])
        new, bits = self.touch(views, site, mask & ~pending, pending)
        return _Value(tags=(*tags, *new), mask=mask | bits, active=True)

    def moved(self, value: _Value, move: Callable[[Array], Array]) -> _Value:
        """The value after a movement of its elements, which may leave some of them out."""
        if not value.active:
            return _Value(views=tuple(move(view) for view in value.views))
        renamed: dict[int, int] = {}
        tags: list[_Tag] = []
        for tag in value.tags:
            if tag.bit in self.covers:
                continue
            columns = move(tag.columns)
            if columns.size < tag.columns.size and _cut(tag.columns, columns):
                part = self.tag(columns, tag.rows, tag.keys, tag.site, tag.above, tag.base)
                part = part._replace(order=tag.order)
                self.tags[part.bit] = part
                renamed[tag.bit] = part.bit
                tags.append(part)
            else:
                tags.append(tag._replace(columns=columns))
        if renamed:
            for place, tag in enumerate(tags):
                tags[place] = tag._replace(base=_renamed(tag.base, renamed))
                self.tags[tag.bit] = tags[place]
        return _Value(tags=tuple(tags), mask=_renamed(value.mask, renamed), active=True)

    def joined(
        self, eqn: Any, args: list[_Value], shape: tuple[int, ...], site: tuple[int, ...]
    ) -> _Value:
        """A concatenation or stack of values of any kind."""
        stack = eqn.primitive.name == "stack"
        axis = eqn.params["axis" if stack else "dimension"]
        widths = [1 if stack else atom.aval.shape[axis] for atom in eqn.invars]
        starts = np.cumsum([0, *widths])
        active = any(arg.active for arg in args)

        def place(array: Array, start: int) -> Array:
            lean = _lean(np.expand_dims(array, axis) if stack else array, keep=axis)
            sizes = [shape[axis] if k == axis else size for k, size in enumerate(lean.shape)]
            out = np.full(sizes, -1)
            out[(*[slice(None)] * axis, slice(start, start + lean.shape[axis]))] = lean
            return np.broadcast_to(out, shape)

        if not active and all(len(arg.views) == 1 for arg in args):
            whole = [place(arg.views[0], s) for arg, s in zip(args, starts, strict=False)]
            return _Value(views=(np.maximum.reduce(whole),))
        tags: list[_Tag] = []
        mask = 0
        for arg, start in zip(args, starts, strict=False):
            new, bits = self.touch(arg.views, site)
            mask |= arg.mask | bits
            pending = [tag for tag in (*arg.tags, *new) if tag.bit not in self.covers]
            tags += [tag._replace(columns=place(tag.columns, start)) for tag in pending]
        return _Value(tags=tuple(tags), mask=mask, active=active or bool(mask))

    def product(
        self,
        args: list[_Value],
        weight: int,
        batch: list[int],
        free: list[int],
        summed: list[int],
        places: list[int],
        shape: tuple[int, ...],
        site: tuple[int, ...],
    ) -> _Value:
        """A sum over products with a leaf; its axes `batch` and `free` become the axes `places`."""
        above = 0
        for number, arg in enumerate(args):
            above |= self.flush(arg, site) if number != weight else arg.mask
        view, *others = sorted(args[weight].views, key=lambda v: -_varying(v).size)
        above |= self.flush(_Value(views=tuple(others)), site)
        ids = view.transpose([*batch, *free, *summed])
        grid = ids.shape[: len(batch) + len(free)]
        rows = ids.reshape(int(np.prod(grid)), -1)
        owners = self.owner[rows]
        bits = _bits(np.unique(owners[owners >= 0]))
        fresh = (owners < 0).all(axis=1)
        if not fresh.any():
            return _Value(mask=above | bits, active=True)
        columns = np.where(fresh, np.arange(len(rows)), -1).reshape(grid)
        sizes = [1] * len(shape)
        for place, size in zip(places, grid, strict=True):
            sizes[place] = size
        many = int(np.prod([view.shape[axis] for axis in batch]))
        keys = np.repeat(np.arange(many), len(rows) // many) if many > 1 else None
        ranked = columns.transpose(np.argsort(places)).reshape(sizes)
        tag = self.tag(np.broadcast_to(ranked, shape), rows, keys, site, above, 0)
        self.owner[rows[fresh]] = tag.bit
        return _Value(tags=(tag,), mask=above | bits | 1 << tag.bit, active=True)

    def flush(self, value: _Value, site: tuple[int, ...] = ()) -> int:
        """Makes slots of all that is pending on a value; returns the bits that flow out of it."""
        new, bits = self.touch(value.views, site)
        for tag in (*value.tags, *new):
            if tag.bit not in self.covers:
                self.register(tag, value.tags)
        return value.mask | bits

    def register(self, tag: _Tag, beside: Sequence[_Tag]) -> None:
        columns = _varying(tag.columns).ravel()
        numbers, first = np.unique(columns, return_index=True)
        numbers = numbers[np.argsort(first)]
        numbers = numbers[numbers >= 0]
        rows = numbers[:, None] if tag.rows is None else tag.rows[numbers]
        seen = self.slot_of[rows[:, 0]]
        covers = np.unique(seen[seen >= 0]).tolist()
        keys = _keys(tag, beside, numbers)[seen < 0]
        fresh = rows[seen < 0]
        for key in np.unique(keys):
            part = fresh[keys == key]
            order = (tag.order, int(numbers[seen < 0][keys == key].min()))
            covers.append(len(self.slots))
            self.slot_of[part] = len(self.slots)
            lane = (len(np.unique(keys)), int(key))
            self.slots.append(Slot(part, order, tag.site, lane, tag.above, tag.base))
        self.covers[tag.bit] = covers

    def finish(self, starts: dict[str, int]) -> Flow:
        """Registers what nothing consumed, and turns bits into slots."""
        for tag in reversed(self.tags):  # parts before the whole they were cut from
            if tag.bit not in self.covers:
                self.register(tag, ())
        ranks = sorted(range(len(self.slots)), key=lambda number: self.slots[number].order)
        slots = [self.slots[number] for number in ranks]
        position = {number: rank for rank, number in enumerate(ranks)}
        cover = np.zeros((len(self.tags), len(slots)), np.float32)
        for bit, numbers in self.covers.items():
            cover[bit, [position[number] for number in numbers]] = 1
        above = _unpacked([slot.above for slot in slots], len(self.tags)) @ cover > 0
        base = _unpacked([slot.base for slot in slots], len(self.tags)) @ cover > 0
        return Flow(slots, starts, self.size, above, base & ~above)


# Equations


def _opened(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def _constant(value: Any) -> _Value:
    """A constant, with its value where it is a small array of integers or booleans."""
    kind = getattr(value, "dtype", None) or np.result_type(value)
    small = getattr(kind, "kind", "") in "iub" and np.size(value) <= _FOLD
    return _Value(const=np.asarray(value)) if small else _Value()


def _fold(eqn: Any, args: list[_Value]) -> list[_Value] | None:
    """The values of an equation of integer constants, if it is one."""
    for out in eqn.outvars:
        if out.aval.size > _FOLD or getattr(out.aval.dtype, "kind", "?") not in "iub":
            return None
    outs = eqn.primitive.bind(*(arg.const for arg in args), **eqn.params)
    return [_constant(out) for out in (outs if eqn.primitive.multiple_results else [outs])]


def _movement(eqn: Any, args: list[_Value]) -> list[Callable[[Array], Array]] | None:
    """What an equation does to the elements of its first operand, one function per output."""
    params, shape = eqn.params, eqn.outvars[0].aval.shape
    match eqn.primitive.name:
        case "reshape":
            return [lambda a: a.reshape(shape)] if params["dimensions"] is None else None
        case "transpose":
            return [lambda a: a.transpose(params["permutation"])]
        case "squeeze" | "expand_dims":
            return [lambda a: a.reshape(shape)]
        case "broadcast_in_dim":
            return [lambda a: _broadcast(a, shape, params["broadcast_dimensions"])]
        case "rev":
            return [lambda a: np.flip(a, params["dimensions"])]
        case "slice":
            steps = params["strides"] or (1,) * len(shape)
            cut = tuple(map(slice, params["start_indices"], params["limit_indices"], steps))
            return [lambda a: a[cut]]
        case "split":
            ends = np.cumsum(params["sizes"])
            axis = params["axis"]
            return [
                lambda a, low=end - size, high=end: a[(*[slice(None)] * axis, slice(low, high))]
                for end, size in zip(ends, params["sizes"], strict=True)
            ]
        case "gather" | "dynamic_slice" if all(arg.const is not None for arg in args[1:]):
            rest = [arg.const for arg in args[1:]]
            params = {**params, "fill_value": -1} if "fill_value" in params else params
            return [lambda a: np.asarray(eqn.primitive.bind(np.int32(a), *rest, **params))]
    return None


def _broadcast(array: Array, shape: tuple[int, ...], dims: Sequence[int]) -> Array:
    sizes = [1] * len(shape)
    for dim, size in zip(dims, array.shape, strict=True):
        sizes[dim] = size
    return np.broadcast_to(array.reshape(sizes), shape)


def _dot(eqn: Any, weight: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Of a leaf in a dot product: batch, free and summed axes, and where they are in the output.

    Summed axes come in the order of the other operand's axes, which is the order of a reshape.
    """
    contract, batch = eqn.params["dimension_numbers"]
    summed = [axis for _, axis in sorted(zip(contract[1 - weight], contract[weight], strict=True))]
    batched = list(batch[weight])
    ranks = [atom.aval.ndim for atom in eqn.invars]
    free = [axis for axis in range(ranks[weight]) if axis not in (*summed, *batched)]
    before = len(batched) + (ranks[0] - len(summed) - len(batched) if weight else 0)
    return batched, free, summed, [*range(len(batched)), *range(before, before + len(free))]


def _lookup(eqn: Any) -> tuple[list[int], list[int], list[int]] | None:
    """Of a leaf that is looked up by index: free and indexed axes, and places in the output."""
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    indexed = list(numbers.collapsed_slice_dims)
    free = [axis for axis in range(len(sizes)) if axis not in indexed]
    whole = all(sizes[axis] == eqn.invars[0].aval.shape[axis] for axis in free)
    plain = whole and not numbers.operand_batching_dims and indexed
    return (free, indexed, list(numbers.offset_dims)) if plain else None


# Arrays of numbers


def _lean(array: Array, keep: int | None = None) -> Array:
    """The array with every broadcast axis cut to length 1."""
    return array[
        tuple(
            slice(0, 1) if stride == 0 and axis != keep else slice(None)
            for axis, stride in enumerate(array.strides)
        )
    ]


def _varying(array: Array) -> Array:
    """The array with every axis along which it is constant cut to length 1."""
    array = _lean(array)
    for axis in range(array.ndim):
        first = array[(*[slice(None)] * axis, slice(0, 1))]
        if array.shape[axis] > 1 and (array == first).all():
            array = first
    return array


def _cut(before: Array, after: Array) -> bool:
    """Whether a movement left columns out, rather than copies of the same ones."""
    return len(np.unique(_lean(after))) < len(np.unique(_lean(before)))


def _among(tag: _Tag, tags: list[_Tag]) -> bool:
    return any(
        tag.bit == other.bit
        and (tag.columns is other.columns or np.array_equal(tag.columns, other.columns))
        for other in tags
    )


def _keys(tag: _Tag, beside: Sequence[_Tag], numbers: Array) -> Array:
    """Which of the parts of a batched product each column belongs to, or acts on."""
    if tag.keys is not None:
        return tag.keys[numbers]
    for other in beside:
        if tag.rows is None and other.keys is not None and tag.base >> other.bit & 1:
            found, first = np.unique(tag.columns, return_index=True)
            owners = other.columns.reshape(-1)[first[np.searchsorted(found, numbers)]]
            return np.where(owners < 0, -1, other.keys[owners])
    return np.zeros(len(numbers), int)


def _bits(numbers: Sequence[int] | Array) -> int:
    mask = 0
    for number in numbers:
        mask |= 1 << int(number)
    return mask


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
