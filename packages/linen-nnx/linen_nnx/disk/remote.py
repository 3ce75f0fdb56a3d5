"""Paths to objects in buckets, under the names that `Path` has for reading.

    as_path("gs://bucket/runs/1")      a Remote
    as_path("runs/1")                  a plain Path

A `Remote` is a `Path`, so that whatever finds and reads checkpoints takes either. What it does not
do is stand for a file of this machine: handed to the system (`open`, `os.stat`), it raises.

A path keeps no state beside its text, as `/` and `parent` make new ones all the time; what is known
of a bucket is kept in `bucket.Bucket`, one for each.
"""

import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from linen_nnx.book.reading import ObjectPath
from linen_nnx.disk.checked import StoreError

if TYPE_CHECKING:
    from linen_nnx.disk.bucket import Bucket, Entry

SCHEMES = ("gs", "s3")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://(.*)", re.DOTALL)


def as_path(text: str | Path) -> Path:
    """What a text names: a path of this machine, or one in a bucket.

    A bucket is looked at afresh from here on: what was known of that tree is forgotten.

    Raises:
      StoreError: for a URL of another kind, or one that can name no object.

    Example:
      >>> as_path("gs://bucket/runs/1").name, str(as_path("gs://bucket/runs") / "1")
      ('1', 'gs://bucket/runs/1')
      >>> as_path("ftp://host/1")
      Traceback (most recent call last):
      linen_nnx.disk.checked.StoreError: ftp://host/1 is of a kind that is not read: known gs://, s3://
    """
    if isinstance(text, Path):
        return text
    # `Path` would read `gs://bucket/a` as the relative path `gs:/bucket/a`, without a word.
    match = _URL.fullmatch(text)
    if match is None:
        return Path(text)
    scheme, rest = match[1].lower(), match[2]
    if scheme not in SCHEMES:
        known = ", ".join(f"{known}://" for known in SCHEMES)
        raise StoreError(f"{text} is of a kind that is not read: known {known}")
    bucket, *names = rest.rstrip("/").split("/")
    if not bucket:
        raise StoreError(f"{text} names no bucket: expected {scheme}://BUCKET/PATH")
    # `Path` would drop these, and so name another object; object_store refuses them, too.
    if any(name in ("", ".", "..") for name in names):
        raise StoreError(f"{text} has an element that is empty, `.` or `..`: no object is named so")
    path = Remote(f"{scheme}:/{bucket}", *names)
    path.bucket.look_again(path.key)
    return path


class Remote(ObjectPath):
    """A path to an object, or to all objects below a name: `gs://bucket/a/b`.

    As text inside it is `gs:/bucket/a/b`, which `Path` takes apart as it does any other.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return re.sub(rf"^({'|'.join(SCHEMES)}):/", r"\1://", super().__str__())

    def __fspath__(self) -> NoReturn:
        # The system would take `gs://bucket/a` for a relative path, and find or make a file there.
        raise TypeError(f"{self} lies in a bucket: no file of this machine has that name")

    @property
    def scheme(self) -> str:
        """`gs` or `s3`."""
        return self.parts[0][:-1]

    @property
    def bucket(self) -> "Bucket":
        """The bucket that it lies in."""
        from linen_nnx.disk.bucket import bucket_of  # not needed for files

        return bucket_of(self.scheme, self.parts[1])

    @property
    def key(self) -> str:
        """The object's name in its bucket."""
        return "/".join(self.parts[2:])

    # Where it leads to. A bucket has no links, and no folder that a path could be relative to.

    def absolute(self) -> "Remote":
        return self

    def resolve(self, strict: bool = False) -> "Remote":
        return self

    # What lies there.

    def _found(self) -> "Entry | None":
        return self.bucket.find(self.key)

    def exists(self, *, follow_symlinks: bool = True) -> bool:
        return self._found() is not None

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:
        found = self._found()
        return found is not None and found.is_folder

    def is_file(self, *, follow_symlinks: bool = True) -> bool:
        found = self._found()
        return found is not None and not found.is_folder

    def stat(self, *, follow_symlinks: bool = True) -> Any:
        """Size and time of an object, as `os.stat` gives them.

        Raises:
          FileNotFoundError: if there is no such object.
        """
        found = self._found()
        if found is None:
            raise self.bucket.missing(self.key)
        return found

    def iterdir(self) -> Iterator["Remote"]:  # pyrefly: ignore
        """What lies directly below. Raises `FileNotFoundError` if nothing does."""
        # As on a disk, where a folder is missing; a folder without anything in it there is not.
        names = list(self.bucket.children(self.key))
        if not names:
            raise self.bucket.missing(self.key)
        return (self / name for name in names)

    def glob(self, pattern: str, **_: Any) -> Iterator["Remote"]:  # pyrefly: ignore
        """Every path below that fits, as `*/run/metadata` does."""
        # Level by level: `*/run/metadata` is three of them, and only what fits is looked into.
        paths = [self]
        for part in pattern.split("/"):
            below = [path / name for path in paths for name in self.bucket.children(path.key)]
            paths = [path for path in below if fnmatch.fnmatchcase(path.name, part)]
        return iter(paths)

    def rglob(self, pattern: str, **_: Any) -> Iterator["Remote"]:  # pyrefly: ignore
        """Everything below at any depth whose name fits. It is listed in one request."""
        self.look_below()
        return (path for path in self._walk() if fnmatch.fnmatchcase(path.name, pattern))

    def look_below(self) -> None:
        """Lists everything below at once: what is asked of it from here on takes no request."""
        self.bucket.look_below(self.key)

    def _walk(self) -> Iterator["Remote"]:
        for name in self.bucket.children(self.key):
            yield self / name
            yield from (self / name)._walk()

    # Its bytes.

    def read_bytes(self) -> bytes:
        return self.bucket.read(self.key)

    def read_range(self, start: int, length: int) -> bytes:
        # Stores answer a range that begins behind the end with an error, and one that ends there
        # with fewer bytes: neither says what is wrong.
        size = self.stat().st_size
        if size < start + length:
            raise ValueError(f"it ends before byte {start + length}")
        return self.bucket.read_range(self.key, start, length) if length else b""

    def blocks(self) -> Iterator[Any]:
        """All bytes, in order, as buffers of a megabyte or so."""
        return self.bucket.blocks(self.key)

    def local(self) -> Path:
        return self.bucket.local(self.key)
