"""The algebra of stored chunks: which changes of arrays need no byte of them decoded.

Renaming never touches a chunk. Stacking, cutting along chunk borders, joining whole chunks, and
reshaping an array of one chunk change the metadata and the chunks' names, but no chunk: a new
axis of length one leaves the bytes of a chunk in row-major order as they are.
"""

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from linen_nnx.book.ops import Action, Gather, Reform, Spread
from linen_nnx.disk.store import Leaf, metadata_name

Place = tuple[int, ...]


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
        if self.metadata["zarr_format"] == 2:
            return list(self.metadata["chunks"])
        return list(self.metadata["chunk_grid"]["configuration"]["chunk_shape"])

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


def source_grid(leaf: Leaf) -> Grid | None:
    """The grid of a stored array; None if its encoding is not one that this module knows."""
    metadata = leaf.zarr
    if metadata is None or leaf.extension:
        return None
    if metadata["zarr_format"] == 2:
        plain = metadata["order"] == "C" and not metadata["filters"]
    else:
        names = {codec["name"] for codec in metadata["codecs"]}
        plain = "transpose" not in names and metadata["chunk_key_encoding"] == {"name": "default"}
    if not plain:
        return None
    grid = Grid(metadata, {})
    counts = [-(-n // step) for n, step in zip(grid.shape, grid.steps, strict=True)]
    for place in itertools.product(*map(range, counts)):
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
            (*place[:axis], number, *place[axis:]): ref
            for number, grid in enumerate(grids)
            for place, ref in grid.chunks.items()
        }
        size = len(grids)
        shape, steps = _insert(first.shape, axis, size), _insert(first.steps, axis, 1)
        return Grid(_with(first.metadata, shape, steps, axis, 1), chunks)
    step = first.steps[axis]
    if any(grid.shape[axis] % step for grid in grids[:-1]):
        return None
    chunks, start = {}, 0
    for grid in grids:
        for place, ref in grid.chunks.items():
            chunks[(*place[:axis], place[axis] + start // step, *place[axis + 1 :])] = ref
        start += grid.shape[axis]
    shape = first.shape
    shape[axis] = start
    return Grid({**first.metadata, "shape": shape}, chunks)


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
            chunks = {(*p[:axis], *p[axis + 1 :]): ref for p, ref in inside.items()}
            shape, steps = _drop(grid.shape, axis), _drop(grid.steps, axis)
            pieces.append(Grid(_with(grid.metadata, shape, steps, axis, None), chunks))
        else:
            first = start // step
            chunks = {(*p[:axis], p[axis] - first, *p[axis + 1 :]): r for p, r in inside.items()}
            shape = grid.shape
            shape[axis] = size
            pieces.append(Grid({**grid.metadata, "shape": shape}, chunks))
        start = end
    return pieces


def _reshape(grid: Grid, shape: tuple[int, ...]) -> Grid | None:
    whole = len(grid.chunks) == 1 and grid.shape == grid.steps
    if grid.metadata["zarr_format"] == 3:
        whole = whole and all(inner == grid.shape for inner in _inner_shapes(grid.metadata))
    if not whole or math.prod(shape) != math.prod(grid.shape):
        return None
    metadata = _with(grid.metadata, list(shape), list(shape), 0, None, list(shape))
    return Grid(metadata, {(0,) * len(shape): next(iter(grid.chunks.values()))})


def _encoding(grid: Grid) -> Any:
    """Everything but the shape: arrays that agree in it can share one set of metadata."""
    return {key: value for key, value in grid.metadata.items() if key != "shape"}


def _inner_shapes(metadata: dict[str, Any]) -> list[list[int]]:
    return [
        codec["configuration"]["chunk_shape"]
        for codec in metadata["codecs"]
        if codec["name"] == "sharding_indexed"
    ]


def _with(
    metadata: dict[str, Any],
    shape: list[int],
    steps: list[int],
    axis: int,
    size: int | None,
    inner: list[int] | None = None,
) -> dict[str, Any]:
    """Metadata with another shape and chunk shape; a shard's inner chunks change likewise."""
    if metadata["zarr_format"] == 2:
        return {**metadata, "shape": shape, "chunks": steps}
    result = copy.deepcopy(metadata)
    result["shape"] = shape
    result["chunk_grid"]["configuration"]["chunk_shape"] = steps
    for codec in result["codecs"]:
        if codec["name"] == "sharding_indexed":
            old = codec["configuration"]["chunk_shape"]
            changed = _drop(old, axis) if size is None else _insert(old, axis, size)
            codec["configuration"]["chunk_shape"] = inner if inner is not None else changed
    return result


def _insert(sizes: list[int], axis: int, size: int) -> list[int]:
    return [*sizes[:axis], size, *sizes[axis:]]


def _drop(sizes: list[int], axis: int) -> list[int]:
    return [*sizes[:axis], *sizes[axis + 1 :]]
