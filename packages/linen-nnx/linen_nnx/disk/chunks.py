"""The algebra of stored chunks: which changes of arrays need no byte of them decoded.

Renaming never touches a chunk. Stacking, cutting along chunk borders, joining whole chunks, and
reshaping an array of one chunk change the metadata and the chunks' names, but no chunk: a new
axis of length one leaves the bytes of a chunk in row-major order as they are.

Four layers, each with a bias of shape [2] in one chunk, are stacked. The result has the shape
[4, 2] and chunks of [1, 2], and each of its chunks is the one chunk of a layer:

    layers.0.bias / 0    -->    layers.bias / 0.0
    layers.1.bias / 0    -->    layers.bias / 1.0
    layers.2.bias / 0    -->    layers.bias / 2.0
    layers.3.bias / 0    -->    layers.bias / 3.0

    >>> from linen_nnx.book.actions import Permute
    >>> from linen_nnx.book.specs import Spec
    >>> from linen_nnx.disk.leaves import DICT, Key
    >>> from linen_nnx.disk.zarr_metadata import fresh_metadata
    >>> bias = fresh_metadata(Spec((2,), "float32"), zarr3=False)
    >>> layers = [
    ...     Leaf((Key(f"layers.{n}.bias", DICT),), "jax.Array", bias, stored=f"layers.{n}.bias")
    ...     for n in range(4)
    ... ]
    >>> (stacked,) = apply([Gather("stack", axis=0, count=4, inner=1)], layers)
    >>> stacked.shape, stacked.chunk_shape
    ([4, 2], [1, 2])
    >>> for place, ref in stacked.chunks.items():
    ...     print(f"{ref.array} / {ref.key}  -->  {stacked.key(place)}")
    layers.0.bias / 0  -->  0.0
    layers.1.bias / 0  -->  1.0
    layers.2.bias / 0  -->  2.0
    layers.3.bias / 0  -->  3.0

Cut into halves along the first axis, it becomes two arrays of shape [2, 2]: the border at 2 lies
between two chunks. A transpose would move the bytes inside each chunk, so it has no such answer:

    >>> halves = apply([Gather("stack", 0, 4, 1), Spread("concat", 0, (2, 2))], layers)
    >>> [half.shape for half in halves]
    [[2, 2], [2, 2]]
    >>> apply([Permute((0,))], layers) is None
    True
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from linen_nnx.book.actions import Action, Gather, Reform, Spread
from linen_nnx.disk.leaves import ChunkRef, Leaf
from linen_nnx.disk.zarr_metadata import chunk_shapes, chunked_parts, metadata_name

GridPlace = tuple[int, ...]
"""Which chunk of an array: its number along each axis."""
# A chunk's place and name take 275 bytes of memory. An array in more chunks than these, which would
# take 290 MB, is streamed.
_MOST_CHUNKS = 1 << 20


@dataclass(frozen=True)
class Grid:
    """An array as the chunks it is stored in: zarr metadata, and a chunk for each grid place.

    Example:
      >>> metadata = {"zarr_format": 2, "shape": [6, 5], "chunks": [2, 5]}
      >>> grid = Grid(metadata, {})
      >>> [grid.key(place) for place in grid.places()]
      ['0.0', '1.0', '2.0']
    """

    metadata: dict[str, Any]
    chunks: Mapping[GridPlace, ChunkRef]

    @property
    def shape(self) -> list[int]:
        return list(self.metadata["shape"])

    @property
    def chunk_shape(self) -> list[int]:
        return chunk_shapes(self.metadata)[0]

    @property
    def counts(self) -> list[int]:
        """How many chunks there are along each axis. The last may reach beyond the array."""
        return [-(-n // step) for n, step in zip(self.shape, self.chunk_shape, strict=True)]

    def places(self) -> Iterator[GridPlace]:
        """The place of every chunk, in order and one by one: a damaged shape may ask for 2**60."""
        return _places(self.counts) if 0 not in self.counts else iter(())

    @property
    def metadata_key(self) -> str:
        """The name of its metadata below its own."""
        return metadata_name(self.metadata["zarr_format"] == 3)

    def key(self, place: GridPlace) -> str:
        """The name of a chunk below the array's own."""
        numbers = [str(number) for number in place]
        if self.metadata["zarr_format"] == 3:
            return "/".join(["c", *numbers])
        # The one chunk of a zarr2 array without axes is called "0".
        return self.metadata.get("dimension_separator", ".").join(numbers) or "0"


def _places(counts: Sequence[int]) -> Iterator[GridPlace]:
    # `itertools.product` would hold the numbers of each axis in memory before the first place.
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
    if metadata is None or leaf.extension or not _is_row_major(metadata):
        return None
    grid = Grid(metadata, {})
    if math.prod(grid.counts) > _MOST_CHUNKS:
        return None
    chunks = {}
    for place in grid.places():
        chunks[place] = ChunkRef(leaf.item, leaf.stored, grid.key(place))
    return Grid(metadata, chunks)


def _is_row_major(metadata: dict[str, Any]) -> bool:
    """Whether each chunk, decoded, is its elements row by row, and is named in the usual way."""
    if metadata["zarr_format"] == 2:
        # A filter may store differences, or depend on the shape in ways that are not known here.
        return metadata["order"] == "C" and not metadata["filters"]
    codecs = [codec["name"] for codec in metadata["codecs"]]
    return "transpose" not in codecs and metadata["chunk_key_encoding"] == {"name": "default"}


def apply(actions: Sequence[Action], sources: Sequence[Leaf]) -> list[Grid] | None:
    """The grids of the results; None if a chunk would have to be decoded on the way."""
    grids = _all_or_none([source_grid(leaf) for leaf in sources])
    for action in actions:
        if grids is None:
            return None
        results: list[Grid | None] = []
        if isinstance(action, Gather):
            for group in action.groups(grids):
                results.append(_join(action, group))
        elif isinstance(action, Spread):
            for grid in grids:
                results += _cut(action, grid)
        elif isinstance(action, Reform):
            for grid, shape in zip(grids, action.shapes, strict=True):
                results.append(_reshape(grid, shape))
        else:
            return None
        grids = _all_or_none(results)
    return grids


def _all_or_none(grids: Sequence[Grid | None]) -> list[Grid] | None:
    """The grids if each one is there: a rule moves all of its arrays in one way or the other."""
    known = [grid for grid in grids if grid is not None]
    return known if len(known) == len(grids) else None


def _join(action: Gather, grids: Sequence[Grid]) -> Grid | None:
    """One array of several, or None."""
    first = grids[0]
    # One set of metadata has to describe the chunks of all.
    if any(_encoding(grid) != _encoding(first) for grid in grids):
        return None
    return _stack(action.axis, grids) if action.kind == "stack" else _concat(action.axis, grids)


def _stack(axis: int, grids: Sequence[Grid]) -> Grid | None:
    """Along a new axis, each array's chunks keep their places, and get the array's number."""
    first = grids[0]
    if any(grid.shape != first.shape for grid in grids):
        return None
    chunks = {}
    for number, grid in enumerate(grids):
        for place, ref in grid.chunks.items():
            chunks[tuple(_splice(place, axis, number))] = ref
    shape = _splice(first.shape, axis, len(grids))
    metadata = _with_shape(first.metadata, shape, lambda sizes: _splice(sizes, axis, 1))
    return Grid(metadata, chunks)


def _concat(axis: int, grids: Sequence[Grid]) -> Grid | None:
    """Along an axis that is there, the chunks of each array follow those of the one before it."""
    first = grids[0]
    step = first.chunk_shape[axis]
    # A last chunk that reaches beyond its array would leave a gap in the middle of the result.
    if any(grid.shape[axis] % step for grid in grids[:-1]):
        return None
    chunks, length = {}, 0
    for grid in grids:
        chunks_before = length // step
        for place, ref in grid.chunks.items():
            chunks[tuple(_splice(place, axis, place[axis] + chunks_before, drop=1))] = ref
        length += grid.shape[axis]
    shape = _splice(first.shape, axis, length, drop=1)
    return Grid({**first.metadata, "shape": shape}, chunks)


def _cut(action: Spread, grid: Grid) -> list[Grid | None]:
    """The pieces of one array; `[None]` where a border lies inside a chunk."""
    axis, step = action.axis, grid.chunk_shape[action.axis]
    # A chunk of several layers would have to be taken apart.
    if action.kind == "stack" and step != 1:
        return [None]
    pieces: list[Grid | None] = []
    start = 0
    for size in action.sizes:
        end = start + size
        # The array's own end is a border, wherever the last chunk reaches to.
        if start % step or (end % step and end != grid.shape[axis]):
            return [None]
        inside = {p: ref for p, ref in grid.chunks.items() if start <= p[axis] * step < end}
        if action.kind == "stack":
            pieces.append(_without_axis(axis, grid, inside))
        else:
            pieces.append(_slice(axis, grid, inside, start // step, size))
        start = end
    return pieces


def _without_axis(axis: int, grid: Grid, inside: dict[GridPlace, ChunkRef]) -> Grid:
    """One layer of a stack, made of the chunks `inside` it."""
    chunks = {}
    for place, ref in inside.items():
        chunks[tuple(_splice(place, axis, drop=1))] = ref
    shape = _splice(grid.shape, axis, drop=1)
    metadata = _with_shape(grid.metadata, shape, lambda sizes: _splice(sizes, axis, drop=1))
    return Grid(metadata, chunks)


def _slice(
    axis: int, grid: Grid, inside: Mapping[GridPlace, ChunkRef], first: int, size: int
) -> Grid:
    """A piece of length `size`, made of the chunks `inside` it, which are counted from `first`."""
    chunks = {}
    for place, ref in inside.items():
        chunks[tuple(_splice(place, axis, place[axis] - first, drop=1))] = ref
    shape = _splice(grid.shape, axis, size, drop=1)
    return Grid({**grid.metadata, "shape": shape}, chunks)


def _reshape(grid: Grid, shape: tuple[int, ...]) -> Grid | None:
    """The same elements in another shape: only one chunk of all of them has them row by row."""
    whole = all(sizes == grid.shape for sizes in chunk_shapes(grid.metadata))
    if not (whole and len(grid.chunks) == 1 and math.prod(shape) == math.prod(grid.shape)):
        return None
    metadata = _with_shape(grid.metadata, list(shape), lambda _: list(shape))
    (ref,) = grid.chunks.values()
    return Grid(metadata, {(0,) * len(shape): ref})


def _encoding(grid: Grid) -> Any:
    """Everything but the shape: arrays that agree in it can share one set of metadata."""
    return {key: value for key, value in grid.metadata.items() if key != "shape"}


def _with_shape(
    metadata: dict[str, Any], shape: list[int], reform: Callable[[list[int]], list[int]]
) -> dict[str, Any]:
    """Metadata with another shape; `reform` changes the shapes of chunks, and those in a shard."""
    if metadata["zarr_format"] == 2:
        return {**metadata, "shape": shape, "chunks": reform(metadata["chunks"])}
    # A deep copy, as the mappings inside are changed, and other leaves share them.
    result = {**copy.deepcopy(metadata), "shape": shape}
    for part in chunked_parts(result):
        part["chunk_shape"] = reform(part["chunk_shape"])
    return result


def _splice(sizes: Sequence[int], axis: int, *new: int, drop: int = 0) -> list[int]:
    """The sizes with `new` ones at `axis`, in place of as many as are dropped.

    Example:
      >>> _splice([4, 6], 1, 9), _splice([4, 6], 1, 9, drop=1), _splice([4, 6], 1, drop=1)
      ([4, 9, 6], [4, 9], [4])
    """
    return [*sizes[:axis], *new, *sizes[axis + drop :]]
