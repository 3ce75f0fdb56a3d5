"""Where a result is put, so that it is absent or complete: on a disk, or in a bucket."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from linen_nnx.disk.complete import files_below
from linen_nnx.disk.conversion import Conversion
from linen_nnx.disk.placing import Placer
from linen_nnx.disk.remote import Remote
from linen_nnx.disk.runs import Runs
from linen_nnx.disk.transaction import TargetError, left_over, publish, workspace

SPARE = 16 << 20  # bytes of room for the new tree and the side files


class Target(Protocol):
    """A place for a result.

    The result is written below `partial`, a path of this machine, and by the placer; `publish` puts
    it in its place. A target on a disk has the whole of it below `partial`; in a bucket, what the
    server copies never comes here.
    """

    notes: list[str]
    """What a person should know of where the result lies."""

    def is_there(self, relatives: Iterable[str]) -> bool:
        """Whether something lies at the target; `relatives` is where checkpoints of it would."""
        ...

    def check(self, path: Path, conversions: Sequence[Conversion], runs: Runs) -> None:
        """Raises `TargetError` where the result cannot be put: inside the source, or no room."""
        ...

    def writing(self) -> AbstractContextManager[tuple[Path, Placer]]:
        """Begins, and clears up at the end, whatever happens: yields `partial` and the placer."""
        ...

    def finish_checkpoint(self, folder: Path, is_step: bool) -> None:
        """Adds what readers ask for at such a place to a checkpoint below `partial`."""
        ...

    def publish(self, partial: Path, placer: Placer) -> None:
        """Puts the result in its place, durably."""
        ...

    def left_over(self) -> None:
        """Removes what a killed conversion left beside a result that is complete."""
        ...


def target_of(out: Path, link: bool, digest: bool, progress: Callable[[str], None]) -> Target:
    """The target that a path names.

    Args:
      out: the path.
      link: hard-link data files where possible, so that no array is read or written.
      digest: compute digests even where data files are not read otherwise.
      progress: is told what is being done.
    """
    if isinstance(out, Remote):
        from linen_nnx.disk.in_bucket import InBucket  # not needed for files

        return InBucket(out, link, digest, progress)
    return OnDisk(out, link, digest, progress)


class OnDisk:
    """A directory or a file: it is written beside its place, synced, and renamed."""

    def __init__(
        self, out: Path, link: bool, digest: bool, progress: Callable[[str], None]
    ) -> None:
        self._out, self._link, self._digest, self._progress = out, link, digest, progress
        self.notes: list[str] = []

    def is_there(self, relatives: Iterable[str]) -> bool:
        # A link that leads nowhere is something, too.
        return os.path.lexists(self._out)

    def check(self, path: Path, conversions: Sequence[Conversion], runs: Runs) -> None:
        parent = self._out.absolute().parent
        if not parent.is_dir():
            raise TargetError(f"{parent} is no directory: make it first")
        refuse_inside(self._out, path, conversions)
        needed = SPARE + _bytes_needed(path, conversions, self._link, runs)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise TargetError(
                f"{parent} has {free / 1e9:.2f} GB free, the conversion needs {needed / 1e9:.2f} GB"
                + ("" if self._link else ": make room, or use --link on the source's file system")
            )

    @contextmanager
    def writing(self) -> Iterator[tuple[Path, Placer]]:
        # What is copied is hashed on its way; a link has to be read for it.
        hash_links = not self._link or self._digest
        with (
            workspace(self._out) as partial,
            Placer(self._link, hash_links, self._progress) as placer,
        ):
            yield partial, placer

    def finish_checkpoint(self, folder: Path, is_step: bool) -> None:
        """Nothing: the rename says that it is complete."""

    def publish(self, partial: Path, placer: Placer) -> None:
        self._progress("syncing to disk")
        # The placer has synced its own files while they were copied.
        fresh = [] if partial.is_dir() else [partial]
        for folder, _, names in os.walk(partial):
            files = [Path(folder, name) for name in names]
            fresh += [Path(folder), *(file for file in files if file not in placer.placed)]
        placer.sync(fresh)
        publish(partial, self._out)
        # Else the name itself may be lost with the power.
        placer.sync([self._out.absolute().parent])

    def left_over(self) -> None:
        left_over(self._out)


def refuse_inside(out: Path, path: Path, conversions: Iterable[Conversion]) -> None:
    """Raises `TargetError` for a target inside of the source, which stays as it is."""
    inside = {conversion.source.folder.resolve() for conversion in conversions}
    if path.is_dir():
        inside.add(path.resolve())
    # Resolved, as a symbolic link may lead into the source.
    above = out.absolute().parent.resolve()
    if any(folder in (above, *above.parents) for folder in inside):
        raise TargetError(f"{out} lies inside the source, which stays as it is: choose another")


def _bytes_needed(path: Path, conversions: Iterable[Conversion], link: bool, runs: Runs) -> int:
    """Bytes that all conversions write, but for their trees and side files."""
    count = sum(file.stat().st_size for file in runs.taken(path))
    for conversion in conversions:
        count += _taken_along(conversion, link)
        for one in conversion.with_beside:
            count += one.bytes_streamed
            count += 0 if link else one.bytes_stored
    return count


def _taken_along(conversion: Conversion, link: bool) -> int:
    """Bytes of the files beside the items, which a result takes along as they are."""
    source = conversion.source
    candidates = list(source.beside)
    for item in source.paths:
        candidates += item.iterdir()
    if not link:
        for child in source.beside:
            candidates += files_below(child) if child.is_dir() else []
    return sum(file.stat().st_size for file in candidates if file.is_file())
