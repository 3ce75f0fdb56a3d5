"""The algebra of stored chunks: which changes of arrays need no byte of them decoded.

Renaming never touches a chunk. Stacking, cutting along chunk borders, joining whole chunks, and
reshaping an array of one chunk change the metadata and the chunks' names, but no chunk: a new
axis of length one leaves the bytes of a chunk in row-major order as they are.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from linen_nnx.book.ops import Action, Gather, Reform, Spread
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.zarr_metadata import chunk_shapes, chunked_parts, metadata_name

Place = tuple[int, ...]
_CHUNKS = 1 << 20


@dataclass(frozen=True)
class ChunkRef:
    """One stored chunk: the item and the array that it lies in, and its key there."""

    item: int
    array: str
    key: str


@dataclass(frozen=True)
class Grid:
    """An array as the chunks it is stored in: zarr metadata, and a chunk for each grid place."""

    metadata: dict[str, Any]
    chunks: dict[Place, ChunkRef]

    @property
    def shape(self) -> list[int]:
        return list(self.metadata["shape"])

    @property
    def steps(self) -> list[int]:
        """The shape of a chunk."""
        return chunk_shapes(self.metadata)[0]

    @property
    def counts(self) -> list[int]:
        """How many chunks there are along each axis."""
        return [-(-n // step) for n, step in zip(self.shape, self.steps, strict=True)]

    def places(self) -> Iterator[Place]:
        """The place of every chunk, in order and one by one: a damaged shape may ask for 2**60."""
        return _places(self.counts) if 0 not in self.counts else iter(())

    @property
    def metadata_key(self) -> str:
        """The name of its metadata below its own."""
        return metadata_name(self.metadata["zarr_format"] == 3)

    def key(self, place: Place) -> str:
        """The name of a chunk below the array's own."""
        numbers = [str(number) for number in place]
        if self.metadata["zarr_format"] == 3:
            return "/".join(["c", *numbers])
        return self.metadata.get("dimension_separator", ".").join(numbers) or "0"


def _places(counts: Sequence[int]) -> Iterator[Place]:
    if not counts:
        yield ()
        return
    for first in range(counts[0]):
        for rest in _places(counts[1:]):
            yield (first, *rest)


def source_grid(leaf: Leaf) -> Grid | None:
    """The grid of a stored array; None if its encoding is not one that this module knows.

    None also for an array in a million chunks and more, which are too many to name each anew.
    """
    metadata = leaf.zarr
    if metadata is None or leaf.extension:
        return None
    if metadata["zarr_format"] == 2:
        plain = metadata["order"] == "C" and not metadata["filters"]
    else:
        names = [codec["name"] for codec in metadata["codecs"]]
        plain = "transpose" not in names and metadata["chunk_key_encoding"] == {"name": "default"}
    if not plain:
        return None
    grid = Grid(metadata, {})
    if math.prod(grid.counts) > _CHUNKS:
        return None
    for place in grid.places():
        grid.chunks[place] = ChunkRef(leaf.item, leaf.stored, grid.key(place))
    return grid


def apply(actions: Sequence[Action], sources: Sequence[Leaf]) -> list[Grid] | None:
    """The grids of the results; None if a chunk would have to be decoded on the way."""
    grids = [grid for leaf in sources if (grid := source_grid(leaf)) is not None]
    if len(grids) != len(sources):
        return None
    for action in actions:
        if isinstance(action, Gather):
            joined = [_join(action, group) for group in action.groups(grids)]
        elif isinstance(action, Spread):
            joined = [piece for grid in grids for piece in _cut(action, grid)]
        elif isinstance(action, Reform):
            joined = [_reshape(g, shape) for g, shape in zip(grids, action.shapes, strict=True)]
        else:
            return None
        grids = [grid for grid in joined if grid is not None]
        if len(grids) != len(joined):
            return None
    return grids


def _join(action: Gather, grids: Sequence[Grid]) -> Grid | None:
    axis, first = action.axis, grids[0]
    if any(_encoding(grid) != _encoding(first) for grid in grids):
        return None
    if action.kind == "stack":
        if any(grid.shape != first.shape for grid in grids):
            return None
        chunks = {
            tuple(_splice(place, axis, number)): ref
            for number, grid in enumerate(grids)
            for place, ref in grid.chunks.items()
        }
        shape = _splice(first.shape, axis, len(grids))
        return Grid(_with(first.metadata, shape, lambda sizes: _splice(sizes, axis, 1)), chunks)
    step = first.steps[axis]
    if any(grid.shape[axis] % step for grid in grids[:-1]):
        return None
    chunks, length = {}, 0
    for grid in grids:
        for place, ref in grid.chunks.items():
            chunks[tuple(_splice(place, axis, place[axis] + length // step, drop=1))] = ref
        length += grid.shape[axis]
    return Grid({**first.metadata, "shape": _splice(first.shape, axis, length, drop=1)}, chunks)


def _cut(action: Spread, grid: Grid) -> list[Grid | None]:
    axis, step = action.axis, grid.steps[action.axis]
    pieces: list[Grid | None] = []
    start = 0
    for size in action.sizes:
        end = start + size
        if start % step or (end % step and end != grid.shape[axis]):
            return [None]
        inside = {p: r for p, r in grid.chunks.items() if start <= p[axis] * step < end}
        if action.kind == "stack":
            if step != 1:
                return [None]
            chunks = {tuple(_splice(p, axis, drop=1)): ref for p, ref in inside.items()}
            shape = _splice(grid.shape, axis, drop=1)
            without = _with(grid.metadata, shape, lambda sizes: _splice(sizes, axis, drop=1))
            pieces.append(Grid(without, chunks))
        else:
            first = start // step
            chunks = {tuple(_splice(p, axis, p[axis] - first, drop=1)): inside[p] for p in inside}
            shape = _splice(grid.shape, axis, size, drop=1)
            pieces.append(Grid({**grid.metadata, "shape": shape}, chunks))
        start = end
    return pieces


def _reshape(grid: Grid, shape: tuple[int, ...]) -> Grid | None:
    whole = all(steps == grid.shape for steps in chunk_shapes(grid.metadata))
    if not (whole and len(grid.chunks) == 1 and math.prod(shape) == math.prod(grid.shape)):
        return None
    metadata = _with(grid.metadata, list(shape), lambda _: list(shape))
    return Grid(metadata, {(0,) * len(shape): next(iter(grid.chunks.values()))})


def _encoding(grid: Grid) -> Any:
    """Everything but the shape: arrays that agree in it can share one set of metadata."""
    return {key: value for key, value in grid.metadata.items() if key != "shape"}


def _with(
    metadata: dict[str, Any], shape: list[int], reform: Callable[[list[int]], list[int]]
) -> dict[str, Any]:
    """Metadata with another shape; `reform` changes the shapes of chunks, and those in a shard."""
    if metadata["zarr_format"] == 2:
        return {**metadata, "shape": shape, "chunks": reform(metadata["chunks"])}
    result = {**copy.deepcopy(metadata), "shape": shape}
    for part in chunked_parts(result):
        part["chunk_shape"] = reform(part["chunk_shape"])
    return result


def _splice(sizes: Sequence[int], axis: int, *new: int, drop: int = 0) -> list[int]:
    """The sizes with `new` ones at `axis`, in place of as many as are dropped."""
    return [*sizes[:axis], *new, *sizes[axis + drop :]]
