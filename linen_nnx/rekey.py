"""Engine 1: immutable data files stay as they are, and one new tree names their bytes anew.

The data files of an OCDBT store are copied (or hard-linked) to the same relative path. Then, in
one transaction, every leaf's entries are copied by reference from the source's tree to a new one.
A store of one directory per array has its directories copied under their new names.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tensorstore as ts

from linen_nnx.chunks import Grid, apply
from linen_nnx.digests import Digest, hash_file
from linen_nnx.layouts import Change
from linen_nnx.store import Item, Leaf, open_kv
from linen_nnx.stream import Reader, fresh_metadata, stream

Engine = Literal["name", "chunks", "stream", "drop"]
# As Orbax writes its stores: values up to 1 KB lie in the tree, which is one node.
_CONFIG = {"compression": {"id": "zstd"}, "max_decoded_node_bytes": 100_000_000}
_CONFIG["max_inline_value_bytes"] = 1024


@dataclass(frozen=True)
class Job:
    """A change, the engine that does it, and its targets with all that their data settles."""

    change: Change
    engine: Engine
    targets: tuple[Leaf, ...]
    grids: tuple[Grid, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes in memory of what it writes."""
        return sum(leaf.nbytes for leaf in self.targets)


def choose(change: Change, zarr3: bool, readable_only: bool = False) -> Job:
    """The engine for one change: `name` and `chunks` decode no byte.

    `readable_only`: the source is no store whose chunks could be named anew.
    """
    if not change.targets:
        return Job(change, "drop", ())
    if not change.actions and not (readable_only and change.targets[0].zarr):
        return Job(change, "name", change.targets)
    grids = None if readable_only else apply(change.actions, change.sources)
    if grids is not None and change.sources:
        stored = [(grid.metadata, tuple(grid.steps)) for grid in grids]
        engine: Engine = "chunks"
    else:
        specs = change.specs or [leaf.spec for leaf in change.targets]
        stored = [(fresh_metadata(spec, zarr3), tuple(spec.shape)) for spec in specs]
        engine = "stream"
    targets = tuple(
        dataclasses.replace(leaf, zarr=metadata, write_shape=shape if leaf.sharding else None)
        for leaf, (metadata, shape) in zip(change.targets, stored, strict=True)
    )
    return Job(change, engine, targets, tuple(grids) if engine == "chunks" and grids else ())


class Placer:
    """Puts files in place by copy or by hard link; copies are synced to disk, and all are hashed.

    The work goes on in threads, so that the disk, the hash and the caller's own work overlap.
    """

    def __init__(self, link: bool, hash_links: bool, progress: Callable[[str], None]) -> None:
        self._link = link
        self.hash_links = hash_links
        self.progress = progress
        self._pool = ThreadPoolExecutor(4)
        self._working: dict[Path, Future[Digest | None]] = {}
        self.fell_back: str | None = None
        """Why hard links were not possible, if they were asked for and were not."""
        self.placed: dict[Path, Path] = {}
        """The source of each file put in place."""
        self.linked: set[Path] = set()

    def place(self, source: Path, target: Path) -> None:
        """Makes `target`, and the directories above it, with the bytes of `source`."""
        target.parent.mkdir(parents=True, exist_ok=True)
        self.placed[target] = source
        if self._link and self.fell_back is None:
            try:
                os.link(source, target)
                self.linked.add(target)
                if self.hash_links:
                    self._working[target] = self._pool.submit(hash_file, target)
                return
            except OSError as error:
                self.fell_back = f"{error.strerror}: {target.parent}"
        self._working[target] = self._pool.submit(_copy, source, target)

    def wait(self, targets: Iterable[Path]) -> None:
        """Waits until these can be read."""
        for target in targets:
            if target in self._working:
                self._working[target].result()

    def finish(self) -> dict[Path, Digest]:
        """Waits until every copy is on disk. Returns the digests of what was copied or hashed."""
        found = {}
        for number, (target, future) in enumerate(self._working.items(), start=1):
            self.progress(f"copying files: {number} of {len(self._working)}")
            if (digest := future.result()) is not None:
                found[target] = digest
        return found

    def __enter__(self) -> "Placer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _copy(source: Path, target: Path) -> Digest:
    """Copies a file through to disk; returns the digest of the copy."""
    with source.open("rb", buffering=0) as old, target.open("xb", buffering=0) as new:
        left = os.fstat(old.fileno()).st_size
        while left:
            count = os.copy_file_range(old.fileno(), new.fileno(), left)
            if not count:
                raise OSError(f"{source} became shorter while it was copied")
            left -= count
        digest = hash_file(target)
        os.fsync(new.fileno())
    return digest


def sync(path: Path) -> None:
    """Writes a file or a directory through to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_store(
    out: Path, items: Sequence[Item], jobs: Sequence[Job], reader: Reader, placer: Placer
) -> None:
    """Fills the store of the new item `out` (an empty directory) with every job's targets."""
    context = ts.Context()
    ocdbt = not items or items[0].ocdbt
    moving = [job for job in jobs if job.engine in ("name", "chunks")]
    if ocdbt:
        for number, item in enumerate(items):
            for file in item.data_files(kept(moving, number)):
                placer.place(file, out / file.relative_to(item.path))
            placer.wait(out / node for node in (item.tree.own if item.tree else ()))
        store = open_kv(out, context, True, config=_CONFIG)
    else:
        _place_arrays(out, items, moving, placer)
        store = open_kv(out, context, False)
    changed = [
        (j.change.sources, j.change.actions, j.targets) for j in jobs if j.engine == "stream"
    ]
    stream(changed, reader, store, context, placer.progress)
    if ocdbt:
        _move_entries(out, items, moving, store, context)


def kept(jobs: Sequence[Job], item: int) -> list[str]:
    """The stored names of an item's leaves whose bytes stay as they are."""
    moving = (job for job in jobs if job.engine in ("name", "chunks"))
    return [leaf.stored for job in moving for leaf in job.change.sources if leaf.item == item]


def _move_entries(
    out: Path, items: Sequence[Item], jobs: Sequence[Job], store: ts.KvStore, context: ts.Context
) -> None:
    """Copies entries by reference, from the sources' trees to the new one, in one transaction."""
    olds = [open_kv(out, context, True, manifest=item.path) for item in items]
    transaction = ts.Transaction(atomic=True)
    new = store.with_transaction(transaction)
    only = ts.KvStore.KeyRange("", "\0")  # below a whole key, so no other key with that start
    pending: list[Any] = []
    for job in jobs:
        if job.engine == "name" and job.targets[0].zarr is not None:
            (leaf,) = job.change.sources
            old = olds[leaf.item] / f"{leaf.stored}/"
            pending.append(old.experimental_copy_range_to(new / f"{job.targets[0].name}/"))
        for leaf, grid in zip(job.targets, job.grids, strict=False):
            pending.append(new.write(_metadata_key(leaf), json.dumps(grid.metadata)))
            for place, ref in grid.chunks.items():
                target = new / f"{leaf.name}/{grid.key(place)}"
                pending.append(
                    (olds[ref.item] / ref.key).experimental_copy_range_to(target, source_range=only)
                )
    for future in pending:
        future.result()
    transaction.commit_sync()


def _place_arrays(out: Path, items: Sequence[Item], jobs: Sequence[Job], placer: Placer) -> None:
    """The same for stores of one directory per array."""
    for job in jobs:
        if job.engine == "name" and job.targets[0].zarr is not None:
            (leaf,) = job.change.sources
            folder = items[leaf.item].path / leaf.stored
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                placer.place(file, out / job.targets[0].name / file.relative_to(folder))
        for leaf, grid in zip(job.targets, job.grids, strict=False):
            for place, ref in grid.chunks.items():
                source = items[ref.item].path / ref.key
                if source.exists():  # a chunk of fill values alone may be left out
                    placer.place(source, out / leaf.name / grid.key(place))
            (out / leaf.name).mkdir(exist_ok=True)
            (out / _metadata_key(leaf)).write_text(json.dumps(grid.metadata))


def _metadata_key(leaf: Leaf) -> str:
    assert leaf.zarr is not None
    return f"{leaf.name}/{'zarr.json' if leaf.zarr['zarr_format'] == 3 else '.zarray'}"
