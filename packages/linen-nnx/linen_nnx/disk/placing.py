"""Puts the files of a source in place, by copy or by hard link, and hashes them on the way.

Three things take their time, and they overlap: the kernel copies a file in steps, a hash reads back
what lies in memory still, and the disk begins to write as soon as the first step is there.

    copy     [step 1][step 2][step 3]
    disk              [write 1      ][write 2, 3 ... ]
    hash                              [whole file]
"""

import errno
import os
from collections.abc import Callable, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

from linen_nnx.disk.checked import StoreError, open_data
from linen_nnx.disk.digests import Digest, hash_file
from linen_nnx.disk.remote import Remote
from linen_nnx.disk.transfers import download

_STEP = 32 << 20  # bytes of a file that are copied before the disk gets to work on them
# What the kernel says where two file systems, or one of them, do not know `copy_file_range`.
_NO_RANGES = (errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM)


class Placer:
    """Puts files in place by copy or by hard link; copies are synced to disk, and all are hashed.

    The work goes on in threads, so that the disk, the hash and the caller's own work overlap.
    """

    def __init__(
        self, link: bool, hash_links: bool, progress: Callable[[str], None], threads: int = 4
    ) -> None:
        self._link = link
        self.hash_links = hash_links
        self.progress = progress
        self._pool = ThreadPoolExecutor(threads)
        # One thread: the disk writes one file after another, whoever asks.
        self._flusher = ThreadPoolExecutor(1)
        self._working: dict[Path, Future[Digest]] = {}
        self._stopped = False
        self.fell_back: str | None = None
        """Why hard links were not possible, if they were asked for and were not."""
        self.placed: dict[Path, Path] = {}
        """The source of each file put in place."""
        self.unread: set[Path] = set()
        """The files whose bytes did not pass here: links, and copies that a server has made."""

    def place(self, source: Path, target: Path) -> None:
        """Makes `target`, and the directories above it, with the bytes of `source`.

        Of a symbolic link it takes what the link leads to: caches of models keep their files so.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        self.placed[target] = source
        # Where one link was refused, the next would be: the file systems stay the same.
        may_link = self._link and self.fell_back is None
        if not (may_link and self._linked(source, target)):
            self._working[target] = self._pool.submit(self._copy, source, target)
        elif self.hash_links:
            self._working[target] = self._pool.submit(hash_file, target)

    def _linked(self, source: Path, target: Path) -> bool:
        """Whether a hard link could be made."""
        if isinstance(source, Remote):
            self.fell_back = f"{source} lies in a bucket"
            return False
        try:
            os.link(os.path.realpath(source, strict=True), target)
        except OSError as error:
            self.fell_back = f"{error.strerror}: {target.parent}"
            return False
        self.unread.add(target)
        return True

    def _copy(self, source: Path, target: Path) -> Digest:
        """Copies a file through to disk, which begins with the first step; returns its digest."""
        if isinstance(source, Remote):
            return download(source, target, self._has_stopped)
        flushes: list[Future[None]] = []
        try:
            with open_data(source) as old, target.open("xb", buffering=0) as new:
                left = os.fstat(old.fileno()).st_size
                while left:
                    if self._stopped:
                        raise CancelledError
                    count = _copy_some(old.fileno(), new.fileno(), min(left, _STEP))
                    if not count:
                        raise StoreError(f"{source} became shorter while it was copied")
                    left -= count
                    # The next flush is not asked for before the last one has ended: it would wait
                    # in line, and would find nothing to do.
                    if left and all(flush.done() for flush in flushes):
                        flushes.append(self._flusher.submit(os.fdatasync, new.fileno()))
                # Hashed before the last sync, which the disk does not need the processor for.
                digest = hash_file(target)
                os.fsync(new.fileno())
                # The file must not be closed while a flush may still use its descriptor.
                for flush in flushes:
                    flush.result()
        except OSError as error:
            if error.filename is not None:
                raise
            # What reads and writes by descriptor knows no names: a full disk should say which.
            raise OSError(error.errno, error.strerror, str(source), None, str(target)) from error
        return digest

    def _has_stopped(self) -> bool:
        return self._stopped

    def sync(self, paths: Iterable[Path]) -> None:
        """Writes files and directories through to disk, at once: they share a journal's commit."""
        list(self._pool.map(_sync, paths))

    def finish(self) -> dict[Path, Digest]:
        """Waits until every copy is on disk. Returns the digests of what was copied or hashed."""
        found = {}
        for number, (target, future) in enumerate(self._working.items(), start=1):
            self.progress(f"copying files: {number} of {len(self._working)}")
            found[target] = future.result()
        return found

    def __enter__(self) -> "Placer":
        return self

    def __exit__(self, *_: object) -> None:
        # After an error or a Ctrl-C, copies of gigabytes may be under way: each ends at its next
        # step.
        self._stopped = True
        self._pool.shutdown(cancel_futures=True)
        self._flusher.shutdown(cancel_futures=True)


def _copy_some(old: int, new: int, most: int) -> int:
    """Copies up to `most` bytes between open files, at their positions; returns how many."""
    try:
        if count := os.copy_file_range(old, new, most):
            return count
    except OSError as error:
        if error.errno not in _NO_RANGES:
            raise
    # Some file systems say that they copied nothing, where a plain read finds bytes.
    block = os.read(old, min(most, 1 << 20))
    left = memoryview(block)
    while left:
        left = left[os.write(new, left) :]
    return len(block)


def _sync(path: Path) -> None:
    """Writes a file or a directory through to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
