"""Reads files that somebody else wrote: what lies there is checked before it is believed.

A path may lead to a pipe that nobody writes to, or to a device without an end; a file may be larger
than memory, or nest its brackets a million deep. Each is one `ValueError` that says what is wrong.
The caller adds which file it was.

What lies in a bucket is read through the same functions: an `ObjectPath` knows how.
"""

import json
import os
import stat
from io import FileIO
from pathlib import Path, PosixPath
from typing import Any

# A million leaves take 250 MB in `_METADATA`, the longest text of a checkpoint.
TEXT_LIMIT = 1 << 28

_KINDS = {
    stat.S_IFDIR: "directory",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFIFO: "pipe",
    stat.S_IFSOCK: "socket",
}


class ObjectPath(PosixPath):
    """A path to what no file system of this machine has: `linen_nnx.disk.remote` makes them.

    It has the names of `Path` for reading, and these two for bytes.
    """

    __slots__ = ()

    def read_range(self, start: int, length: int) -> bytes:
        """`length` bytes from `start` on. Raises as the function `read_range` does."""
        raise NotImplementedError

    def local(self) -> Path:
        """A file of this machine with the same bytes, for readers that need a whole file."""
        raise NotImplementedError


def open_file(path: str | Path) -> FileIO:
    """Opens a regular file, or what a symbolic link leads to if that is one, unbuffered.

    Of an object in a bucket it opens a copy, which is made once: ask `read_range` for a part.

    Raises:
      ValueError: for a pipe, a device, a socket or a directory, of which none is opened.
      OSError: for what is missing or may not be read.
    """
    if isinstance(path, ObjectPath):
        path = path.local()
    _refuse_special(os.stat(path))
    # Not blocking: the file may have become a pipe since, whose opening waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _refuse_special(os.fstat(descriptor))
    except ValueError:
        os.close(descriptor)
        raise
    return FileIO(descriptor)


def _refuse_special(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = _KINDS.get(stat.S_IFMT(found.st_mode), "special file")
        raise ValueError(f"it is a {kind}, expected a regular file")


def read_bytes(path: str | Path, limit: int = TEXT_LIMIT) -> bytes:
    """The content of a regular file of at most `limit` bytes. Raises as `open_file` does."""
    if isinstance(path, ObjectPath):
        size = path.stat().st_size
        if size > limit:
            raise ValueError(f"it has {size} bytes, expected at most {limit}")
        return path.read_range(0, size)
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"it has {size} bytes, expected at most {limit}")
        content = file.read(size)
    if len(content) < size:
        raise ValueError(f"it became shorter than {size} bytes while it was read")
    return content


def read_range(path: Path, start: int, length: int) -> bytes:
    """`length` bytes of a file from `start` on. Raises as `open_file` does.

    Raises `ValueError` for a file that ends before, too.
    """
    if isinstance(path, ObjectPath):
        return path.read_range(start, length)
    with open_file(path) as file:
        # Asked first, as the place may be damaged, and then be larger than any file can be.
        if os.fstat(file.fileno()).st_size < start + length:
            raise ValueError(f"it ends before byte {start + length}")
        return os.pread(file.fileno(), length, start)


def size_of(path: Path) -> int:
    """The bytes of a file that can be read. Raises as `open_file` does."""
    if isinstance(path, ObjectPath):
        return path.stat().st_size
    with open_file(path) as file:
        return os.fstat(file.fileno()).st_size


def read_text(path: str | Path, limit: int = TEXT_LIMIT) -> str:
    """The content of a file as text. Raises `ValueError` for bytes that are not UTF-8, too."""
    return read_bytes(path, limit).decode()


def parse_json(text: str | bytes) -> Any:
    """The value that JSON stands for. Raises `ValueError` for what is none, or nests too deep.

    Example:
      >>> parse_json('{"a": [1, 2]}')
      {'a': [1, 2]}
      >>> parse_json("[" * 100_000)
      Traceback (most recent call last):
      ValueError: its brackets nest too deep
    """
    try:
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:  # the parser's own limit, of about a thousand levels
        raise ValueError("its brackets nest too deep") from None


def read_json(path: str | Path, limit: int = TEXT_LIMIT) -> Any:
    """The value of a JSON file. Raises as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, limit))
