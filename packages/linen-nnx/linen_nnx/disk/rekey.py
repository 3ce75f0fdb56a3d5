"""Engine 1: immutable data files stay as they are, and one new tree names their bytes anew.

Four leaves of a Linen state, which a rule book stacks and renames. The tree of an OCDBT store says
of each array in which file its chunk lies, at which offset and with which length:

    params.l0.w   .zarray, 0.0   -> d/a7f3   0  +128        layers.w   .zarray        (new, inline)
    params.l1.w   .zarray, 0.0   -> d/a7f3 128  +128                   0.0.0  -> d/a7f3   0  +128
    params.out.b  .zarray, 0     -> d/a7f3 256   +32                   1.0.0  -> d/a7f3 128  +128
    step          .zarray, 0     -> d/a7f3 288    +8        out.b      .zarray, 0 -> d/a7f3 256 +32
                                                            step       .zarray, 0 -> d/a7f3 288  +8

So the file `d/a7f3` is copied (or hard-linked) to the same place in the result, whatever its size,
and a tree of a few kilobytes is written beside it. No array is decoded, and the digest of a data
file stays what it was. Where a conversion streams some leaves as well (`stream.py`), the trees of
both engines become one.

A store of one directory per array has no tree: there the chunks' files are copied under new names.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from linen_nnx.book.moves import Move
from linen_nnx.disk import ocdbt, ocdbt_writing
from linen_nnx.disk.chunks import Grid
from linen_nnx.disk.complete import files_below
from linen_nnx.disk.engines import KEPT, STREAMED, done_by, engine_of
from linen_nnx.disk.item import Item
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.placing import Placer
from linen_nnx.disk.sources import Source


def write_store(
    out: Path, source: Source, moves: Sequence[Move[Leaf, Leaf]], placer: Placer
) -> None:
    """Fills the store of the new item `out` (an empty directory) with the targets of all moves."""
    items = source.items
    kept, streamed = done_by(KEPT, moves), done_by(STREAMED, moves)
    # A file has no items: what comes of it is an item as Orbax writes them today, with a tree.
    in_tree = not items or items[0].ocdbt
    if in_tree:
        _place_data_files(out, items, kept, placer)
    else:
        _place_arrays(out, items, kept, placer)
    if streamed:
        from linen_nnx.disk.stream import stream  # needs numpy and tensorstore

        stream(streamed, source.reader, out, in_tree, placer.progress)
    if in_tree:
        # Tensorstore has written a tree of the streamed leaves alone, which this one replaces.
        written = ocdbt.read(out) if streamed else {}
        ocdbt_writing.write(out, written | _named_anew(items, kept))


def kept_names(moves: Sequence[Move[Leaf, Leaf]], item: int) -> list[str]:
    """The stored names of an item's leaves whose bytes stay as they are."""
    names = []
    for move in done_by(KEPT, moves):
        names += [leaf.stored for leaf in move.sources if leaf.item == item]
    return names


def _place_data_files(
    out: Path, items: Sequence[Item], moves: Sequence[Move[Leaf, Leaf]], placer: Placer
) -> None:
    """Places the data files that hold bytes of the sources, and no others.

    A file in which only dropped or streamed leaves lie stays behind.
    """
    # A model and its optimizer that were saved one by one are two items, with files of their own.
    for number, item in enumerate(items):
        for file in item.data_files(kept_names(moves, number)):
            placer.place(file, out / file.relative_to(item.path))


def _named_anew(items: Sequence[Item], moves: Sequence[Move[Leaf, Leaf]]) -> ocdbt.Tree:
    """The entries of the sources' trees under their new names."""
    trees = [item.tree or {} for item in items]
    tree: ocdbt.Tree = {}
    for move in moves:
        if engine_of(move) == "chunks":
            for leaf in move.targets:
                tree[leaf.name] = _entries(leaf, trees)
        elif move.targets[0].zarr is not None:  # an empty node and a text have no entry
            (source,) = move.sources
            tree[move.targets[0].name] = trees[source.item][source.stored]
    return tree


def _entries(leaf: Leaf, trees: Sequence[ocdbt.Tree]) -> dict[str, ocdbt.Value]:
    """The entry of an array that is made of stored chunks: its new metadata, and its chunks."""
    grid = _grid(leaf)
    entries: dict[str, ocdbt.Value] = {grid.metadata_key: json.dumps(grid.metadata).encode()}
    for place, ref in grid.chunks.items():
        array = trees[ref.item][ref.array]
        if ref.key in array:  # a chunk of fill values alone may be left out
            entries[grid.key(place)] = array[ref.key]
    return entries


def _place_arrays(
    out: Path, items: Sequence[Item], moves: Sequence[Move[Leaf, Leaf]], placer: Placer
) -> None:
    """Places the files of every kept array, for stores of one directory per array."""
    for move in moves:
        # Chunk by chunk where an array is made of several, else the whole directory.
        if engine_of(move) == "chunks":
            for leaf in move.targets:
                _place_chunks(out / leaf.name, _grid(leaf), items, placer)
        elif move.targets[0].zarr is not None:
            (source,) = move.sources
            folder = items[source.item].path / source.stored
            for file in files_below(folder):
                placer.place(file, out / move.targets[0].name / file.relative_to(folder))


def _place_chunks(folder: Path, grid: Grid, items: Sequence[Item], placer: Placer) -> None:
    """Places the chunks of one array in its new directory, and writes its metadata there."""
    for place, ref in grid.chunks.items():
        file = items[ref.item].path / ref.array / ref.key
        if file.exists():  # as above: a chunk of fill values alone may be left out
            placer.place(file, folder / grid.key(place))
    folder.mkdir(exist_ok=True)
    (folder / grid.metadata_key).write_text(json.dumps(grid.metadata))


def _grid(leaf: Leaf) -> Grid:
    """The chunks of a target that the engine `chunks` writes."""
    assert leaf.zarr is not None and leaf.chunks is not None
    return Grid(leaf.zarr, leaf.chunks)
