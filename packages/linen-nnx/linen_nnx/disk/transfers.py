"""Files on their way into a bucket and out of one, hashed as they pass.

No file is held in memory: a download holds a block of 8 MB, an upload some parts of that size.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import xxhash

from linen_nnx.book.reading import open_file
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.digests import Digest
from linen_nnx.disk.remote import Remote

_BLOCK = 1 << 20  # bytes read at a time

Stopped = Callable[[], bool]
"""Whether to give up, as another transfer has failed or somebody has pressed Ctrl-C."""


def download(source: Remote, target: Path, stopped: Stopped) -> Digest:
    """Writes an object to a new file, through to disk.

    Raises:
      StoreError, OSError: where it cannot be read or written.
    """
    passed = _Passed(source, source.blocks(), stopped)
    with target.open("xb", buffering=0) as file:
        for block in passed:
            # An unbuffered file may take a part of what it is given.
            left = memoryview(block)
            while left:
                left = left[file.write(left) :]
        os.fsync(file.fileno())
    passed.check(source.stat().st_size)
    return passed.digest


def upload(source: Path, target: Remote, stopped: Stopped) -> Digest:
    """Puts a file, or an object of another bucket, below a prefix that is this process's own.

    Raises:
      StoreError, OSError: where it cannot be read or written.
    """
    # Both are asked for their size first, by which parts are cut, and what came is checked.
    if isinstance(source, Remote):
        size, blocks = source.stat().st_size, source.blocks()
    else:
        size, blocks = source.stat().st_size, _blocks(source)
    passed = _Passed(source, blocks, stopped)
    target.bucket.upload(target.key, passed, size)
    passed.check(size)
    return passed.digest


def copy_file(source: Path, target: Path) -> None:
    """Copies a side file to one of this machine, out of a bucket if it lies in one."""
    if isinstance(source, Remote):
        target.write_bytes(source.read_bytes())
    else:
        shutil.copyfile(source, target)


def _blocks(path: Path) -> Iterator[bytes]:
    with open_file(path) as file:
        while block := file.read(_BLOCK):
            yield block


class _Passed:
    """The blocks of a file, counted and hashed while another reads them."""

    def __init__(self, source: Path, blocks: Iterator[Any], stopped: Stopped) -> None:
        self._source, self._blocks, self._stopped = source, blocks, stopped
        self._state, self._size = xxhash.xxh3_128(), 0

    def __iter__(self) -> Iterator[Any]:
        for block in self._blocks:
            # Between two blocks: gigabytes may be under way when somebody presses Ctrl-C.
            if self._stopped():
                raise CancelledError
            self._state.update(block)
            self._size += len(block)
            yield block

    def check(self, size: int) -> None:
        """Refuses a file that has become another one on the way."""
        # A digest of what was read would vouch for the half of a file.
        if self._size != size:
            raise StoreError(f"{self._source} has {size} bytes, and {self._size} were read of it")

    @property
    def digest(self) -> Digest:
        return self._size, self._state.hexdigest()
