"""Engine 1: immutable data files stay as they are, and one new tree names their bytes anew.

The data files of an OCDBT store are copied (or hard-linked) to the same relative path. Then a new
tree is written, in which every leaf's entries are the source's own, under another name.
A store of one directory per array has its directories copied under their new names.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from linen_nnx.disk import ocdbt, ocdbt_writing
from linen_nnx.disk.chunks import Grid, apply
from linen_nnx.disk.complete import files_below
from linen_nnx.disk.layouts import Change
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.placing import Placer
from linen_nnx.disk.sources import Source
from linen_nnx.disk.store import Item
from linen_nnx.disk.zarr_metadata import fresh_metadata

Engine = Literal["name", "chunks", "stream", "drop"]


class Job(NamedTuple):
    """A change, the engine that does it, and its targets with all that their data settles."""

    change: Change
    engine: Engine
    targets: tuple[Leaf, ...]
    grids: tuple[Grid, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes in memory of what it writes."""
        return sum(leaf.nbytes for leaf in self.targets)


def choose(change: Change, zarr3: bool) -> Job:
    """The engine for one change: `name` and `chunks` decode no byte."""
    # What lies in no store has no chunks that could be named anew.
    loose = any(leaf.loose for leaf in change.sources)
    if not change.targets:
        return Job(change, "drop", ())
    if not change.actions and not (loose and change.targets[0].zarr):
        return Job(change, "name", change.targets)
    grids = None if loose else apply(change.actions, change.sources)
    if grids is not None and change.sources:
        stored = [(grid.metadata, tuple(grid.chunk_shape)) for grid in grids]
        engine: Engine = "chunks"
    else:
        specs = change.specs or [leaf.spec for leaf in change.targets]
        stored = [(fresh_metadata(spec, zarr3), tuple(spec.shape)) for spec in specs]
        engine = "stream"
    targets = tuple(
        leaf._replace(zarr=metadata, write_shape=shape if leaf.sharding else None)
        for leaf, (metadata, shape) in zip(change.targets, stored, strict=True)
    )
    return Job(change, engine, targets, tuple(grids) if engine == "chunks" and grids else ())


def write_store(out: Path, source: Source, jobs: Sequence[Job], placer: Placer) -> None:
    """Fills the store of the new item `out` (an empty directory) with every job's targets."""
    items = source.items
    moving = [job for job in jobs if job.engine in ("name", "chunks")]
    changed = [job for job in jobs if job.engine == "stream"]
    in_tree = not items or items[0].ocdbt
    if in_tree:
        for number, item in enumerate(items):
            for file in item.data_files(kept(moving, number)):
                placer.place(file, out / file.relative_to(item.path))
    else:
        _place_arrays(out, items, moving, placer)
    if changed:
        from linen_nnx.disk.stream import stream  # needs numpy and tensorstore

        arrays = [(job.change.sources, job.change.actions, job.targets) for job in changed]
        stream(arrays, source.reader, out, in_tree, placer.progress)
    if in_tree:
        streamed = ocdbt.read(out) if changed else {}
        ocdbt_writing.write(out, streamed | _moved(items, moving))


def kept(jobs: Sequence[Job], item: int) -> list[str]:
    """The stored names of an item's leaves whose bytes stay as they are."""
    moving = (job for job in jobs if job.engine in ("name", "chunks"))
    return [leaf.stored for job in moving for leaf in job.change.sources if leaf.item == item]


def _moved(items: Sequence[Item], jobs: Sequence[Job]) -> ocdbt.Tree:
    """The entries of the sources' trees under their new names."""
    trees = [item.tree or {} for item in items]
    tree: ocdbt.Tree = {}
    for job in jobs:
        if job.engine == "name" and job.targets[0].zarr is not None:
            (leaf,) = job.change.sources
            tree[job.targets[0].name] = trees[leaf.item][leaf.stored]
        for leaf, grid in zip(job.targets, job.grids, strict=False):
            values: dict[str, ocdbt.Value] = {grid.metadata_key: json.dumps(grid.metadata).encode()}
            for place, ref in grid.chunks.items():
                array = trees[ref.item][ref.array]
                if ref.key in array:  # a chunk of fill values alone may be left out
                    values[grid.key(place)] = array[ref.key]
            tree[leaf.name] = values
    return tree


def _place_arrays(out: Path, items: Sequence[Item], jobs: Sequence[Job], placer: Placer) -> None:
    """The same for stores of one directory per array."""
    for job in jobs:
        if job.engine == "name" and job.targets[0].zarr is not None:
            (leaf,) = job.change.sources
            folder = items[leaf.item].path / leaf.stored
            for file in files_below(folder):
                placer.place(file, out / job.targets[0].name / file.relative_to(folder))
        for leaf, grid in zip(job.targets, job.grids, strict=False):
            for place, ref in grid.chunks.items():
                source = items[ref.item].path / ref.array / ref.key
                if source.exists():
                    placer.place(source, out / leaf.name / grid.key(place))
            (out / leaf.name).mkdir(exist_ok=True)
            (out / leaf.name / grid.metadata_key).write_text(json.dumps(grid.metadata))
