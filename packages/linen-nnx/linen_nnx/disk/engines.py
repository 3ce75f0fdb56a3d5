"""Which engine writes the targets of a move on disk, and what that settles about them.

Of a stack of two layers, of a rename, and of a step count whose dtype changes:

    l0/w, l1/w -> layers/w    chunks    the two chunks get new names; nothing is decoded
    out/bias   -> out/b       name      the whole array gets a new name
    step       -> step        stream    read, cast, written
    drop/rngs/key ->          drop      nothing is written

A move is settled once: then its targets have the metadata that they are stored with, and the engine
can be told from the move itself.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Literal

from linen_nnx.book.moves import Move
from linen_nnx.disk.chunks import Grid, apply
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.zarr_metadata import fresh_metadata

Engine = Literal["name", "chunks", "stream", "drop"]

KEPT: tuple[Engine, ...] = ("name", "chunks")
"""The engines that keep every byte of an array as it is stored."""
STREAMED: tuple[Engine, ...] = ("stream",)
"""The engine that reads, transforms and writes arrays."""


def engine_of(move: Move[Leaf, Leaf]) -> Engine:
    """The engine that writes the targets of a settled move.

    Example:
      >>> from linen_nnx.disk.leaves import Key, Leaf
      >>> kernel = Leaf((Key("kernel", 2),), "jax.Array")
      >>> engine_of(Move((kernel,), (kernel.at((Key("w", 2),)),)))
      'name'
      >>> engine_of(Move((kernel,), ()))
      'drop'
    """
    if not move.targets:
        return "drop"
    # What lies in a file has its name changed as well, but there is no stored chunk to point at.
    if not move.actions and not _lies_in_a_file(move):
        return "name"
    return "stream" if move.targets[0].chunks is None else "chunks"


def settled(move: Move[Leaf, Leaf], zarr3: bool) -> Move[Leaf, Leaf]:
    """The move with the metadata of its targets, and with their chunks where none is decoded.

    Args:
      move: as it was laid out; a target that keeps its bytes has its source's metadata already.
      zarr3: the format of new arrays, which is that of the source.
    """
    if engine_of(move) in ("name", "drop"):
        return move
    grids = _grids(move)
    if grids is None:
        return move._replace(targets=_new(move, zarr3))
    targets = []
    for leaf, grid in zip(move.targets, grids, strict=True):
        shape = tuple(grid.chunk_shape) if leaf.sharding else None
        targets.append(leaf._replace(zarr=grid.metadata, write_shape=shape, chunks=grid.chunks))
    return move._replace(targets=tuple(targets))


def done_by(
    engines: Collection[Engine], moves: Iterable[Move[Leaf, Leaf]]
) -> list[Move[Leaf, Leaf]]:
    """Those of some settled moves whose targets one of the engines writes."""
    return [move for move in moves if engine_of(move) in engines]


def nbytes_of(move: Move[Leaf, Leaf]) -> int:
    """Bytes in memory of what a move writes."""
    return sum(leaf.nbytes for leaf in move.targets)


def _lies_in_a_file(move: Move[Leaf, Leaf]) -> bool:
    """Whether arrays come from no store, so that there are no chunks to be named anew."""
    return bool(move.targets[0].zarr) and any(leaf.loose for leaf in move.sources)


def _grids(move: Move[Leaf, Leaf]) -> Sequence[Grid] | None:
    """The stored chunks that each target is made of; None if one would have to be decoded."""
    if not move.sources or any(leaf.loose for leaf in move.sources):
        return None
    return apply(move.actions, move.sources)


def _new(move: Move[Leaf, Leaf], zarr3: bool) -> tuple[Leaf, ...]:
    """The targets as new arrays of one chunk each."""
    # A loose leaf whose name alone changes has no specs: its target is described as it is.
    specs = move.specs or [leaf.spec for leaf in move.targets]
    targets = []
    for leaf, spec in zip(move.targets, specs, strict=True):
        shape = tuple(spec.shape) if leaf.sharding else None
        targets.append(leaf._replace(zarr=fresh_metadata(spec, zarr3), write_shape=shape))
    return tuple(targets)
