"""Trees in msgpack, as `flax.serialization` writes them: where each array lies, without reading it.

A file that holds `{"params": {"kernel": array of 400 MB}, "step": 7}` begins with these bytes:

    82                          a map of two entries
      a6 "params"               a key
      81                        a map of one entry
        a6 "kernel"
        c9 <length> 01          an extension of type 1: an array
          93                      its parts: three
            92 cd 2710 cd 2710    the shape [10000, 10000]
            a7 "float32"          the dtype
            c6 <length> ...       400 MB, of which only the place is kept
      a4 "step"
      07

So a walk over the file needs a few bytes for each leaf, where `flax.serialization` needs 951 MB for
400 MB of arrays, and `msgpack.Unpacker` reads every byte to get past it. Arrays are read one at a
time, from their places. What is written here, `flax.serialization` reads.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgpack
import numpy as np

from linen_nnx.book.reading import open_file
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.ranges import Array, FileArray, Range, sized

# The types of the extensions of flax.serialization.
_ARRAY, _COMPLEX, _SCALAR = 1, 2, 3
# The key that marks a map as an array in chunks of 1 GiB: an extension holds less than 4 GiB.
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK = 1 << 30
# No model nests deeper than some dozens; Python itself stops at 1000 calls.
_DEPTH = 100
# Bytes read at once: the heads of many small leaves, or of one large one.
_BLOCK = 1 << 14
# Bytes of a text: keys and strings of a checkpoint are short.
_LONGEST_TEXT = 1 << 20
# `first byte: (format of struct, kind)`. The kinds with a length are followed by their content.
_HEADS = {
    0xC4: (">B", "bytes"), 0xC5: (">H", "bytes"), 0xC6: (">I", "bytes"),
    0xC7: (">B", "extension"), 0xC8: (">H", "extension"), 0xC9: (">I", "extension"),
    0xCA: (">f", "number"), 0xCB: (">d", "number"),
    0xCC: (">B", "number"), 0xCD: (">H", "number"), 0xCE: (">I", "number"), 0xCF: (">Q", "number"),
    0xD0: (">b", "number"), 0xD1: (">h", "number"), 0xD2: (">i", "number"), 0xD3: (">q", "number"),
    0xD9: (">B", "text"), 0xDA: (">H", "text"), 0xDB: (">I", "text"),
    0xDC: (">H", "list"), 0xDD: (">I", "list"),
    0xDE: (">H", "map"), 0xDF: (">I", "map"),
}  # fmt: skip
_WORDS = {0xC0: None, 0xC2: False, 0xC3: True}


class _Head(NamedTuple):
    """The beginning of a value: its kind, and its length or (of numbers and words) itself."""

    kind: str
    value: Any


def read(path: Path) -> Any:
    """The tree of a file: dicts and lists of `FileArray` arrays, numbers, strings and None.

    Raises:
      StoreError: for what is no such file, damaged, or written by something else.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp(), "model.msgpack")
      >>> write(file, {"params": {"bias": np.zeros(3, "float32")}, "step": 7})
      >>> tree = read(file)
      >>> tree["params"]["bias"].shape, tree["step"]
      ((3,), 7)
    """
    try:
        with open_file(path) as file:
            return _Walk(path, file).whole()
    except (ValueError, struct.error, OverflowError) as error:
        raise StoreError(f"{path} cannot be read as msgpack: {error}{_guess(path)}") from None


def _guess(path: Path) -> str:
    """A sentence for the message: what a file that is no msgpack may be instead."""
    with open_file(path) as file:
        first = file.read(8)
    if first[:1] == b"\x80" and first[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return ". It begins like a pickle, which is refused, as reading one runs code from it"
    if first[:4] == b"PK\x03\x04":
        return ". It begins like a zip archive (.npz, or a file of PyTorch)"
    return ""


@dataclass
class _Walk:
    """One pass over a file."""

    path: Path
    file: BinaryIO
    at: int = 0
    """The byte that comes next."""
    block: bytes = b""
    start: int = 0
    """Where in the file the block at hand begins."""

    def __post_init__(self) -> None:
        self.size = os.fstat(self.file.fileno()).st_size

    def whole(self) -> Any:
        """The one value that the file holds."""
        tree = self.value(0)
        # Two saves in one file, or a file whose first byte is damaged.
        if (left := self.size - self.at) > 0:
            raise ValueError(f"{left} bytes follow behind the tree")
        return tree

    def value(self, depth: int) -> Any:
        """The next value."""
        if depth > _DEPTH:
            raise ValueError(f"it nests deeper than {_DEPTH} levels")
        kind, value = self._head()
        if kind in ("number", "word"):
            return value
        if kind == "text":
            return self._text(value)
        if kind == "list":
            return [self.value(depth + 1) for _ in range(self._count(value))]
        if kind == "map":
            return self._map(value, depth)
        if kind == "extension":
            return self._extension(value)
        raise ValueError(f"{value} raw bytes at byte {self.at}, which are no leaf")

    def _map(self, count: int, depth: int) -> Any:
        tree: dict[str, Any] = {}
        for _ in range(self._count(count)):
            key = self.value(depth + 1)
            # Flax writes the keys of a list as texts; other writers, as integers.
            if isinstance(key, bool) or not isinstance(key, str | int):
                raise ValueError(f"a key is a {type(key).__name__}, expected a string")
            if str(key) in tree:
                raise ValueError(f"the key `{key}` occurs twice")
            tree[str(key)] = self.value(depth + 1)
        return _joined(tree) if _CHUNKED in tree else tree

    def _extension(self, length: int) -> Any:
        """An array, a number of numpy, or a complex number."""
        (code,) = self._take(1)
        end = self.at + length
        # Inside is a list in msgpack again, of which the last part is the array's bytes.
        if code == _COMPLEX:
            self._parts(2)
            return complex(self._number(), self._number())
        if code not in (_ARRAY, _SCALAR):
            raise ValueError(f"an extension of type {code}, which flax.serialization does not have")
        self._parts(3)
        rank = self._count(self._sized("list"))
        shape = tuple([self._number() for _ in range(rank)])
        dtype = sized(self._text(self._sized("text")))
        held = self._sized("bytes")
        # Passed over without being read.
        start, self.at = self.at, end
        if start + held != end or end > self.size:
            raise ValueError(f"an array at byte {start} is cut off")
        return FileArray(shape, dtype, (Range(self.path, start, held),))

    def _parts(self, expected: int) -> None:
        if (count := self._sized("list")) != expected:
            raise ValueError(f"an extension has {count} parts, expected {expected}")

    def _number(self) -> Any:
        return self._sized("number")

    def _sized(self, expected: str) -> int:
        """The next value of a given kind, or its length."""
        kind, value = self._head()
        if kind != expected:
            raise ValueError(f"a {kind} at byte {self.at}, expected a {expected}")
        return value

    def _head(self) -> _Head:
        """The next byte, and the length or number behind it if it has one."""
        (first,) = self._take(1)
        # 0x00 to 0x7f and 0xe0 to 0xff are numbers themselves: 0 to 127, and -32 to -1.
        if first < 0x80:
            return _Head("number", first)
        if first >= 0xE0:
            return _Head("number", first - 256)
        # Short maps (0x80), lists (0x90) and texts (0xa0, 0xb0) have their length in the low bits.
        if first < 0xC0:
            short = (("map", 0x0F), ("list", 0x0F), ("text", 0x1F), ("text", 0x1F))
            kind, mask = short[(first >> 4) - 8]
            return _Head(kind, first & mask)
        if first in _WORDS:
            return _Head("word", _WORDS[first])
        if 0xD4 <= first <= 0xD8:
            return _Head("extension", 1 << (first - 0xD4))
        if first not in _HEADS:
            raise ValueError(f"byte {self.at - 1} begins no value")
        form, kind = _HEADS[first]
        (value,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return _Head(kind, value)

    def _text(self, length: int) -> str:
        if length > _LONGEST_TEXT:
            raise ValueError(f"a string of {length} bytes, more than {_LONGEST_TEXT}")
        return self._take(length).decode()

    def _count(self, count: int) -> int:
        """A number of values, compared with the bytes left: each value takes a byte at least."""
        if count > self.size - self.at:
            raise ValueError(f"{count} values are announced in fewer bytes")
        return count

    def _take(self, length: int) -> bytes:
        """The next bytes, which are few: what is long is passed over."""
        first = self.at - self.start
        # Behind an array the next bytes lie outside of the block at hand.
        if not 0 <= first <= len(self.block) - length:
            self.file.seek(self.at)
            self.block, self.start, first = self.file.read(max(_BLOCK, length)), self.at, 0
        data = self.block[first : first + length]
        if len(data) != length:
            raise ValueError("the file is cut off")
        self.at += length
        return data


def _joined(tree: Mapping[str, Any]) -> FileArray:
    """The array that flax has cut into chunks, each a flat piece of it.

    Its shape and its chunks are dicts whose keys count: `{"0": 3, "1": 5}` is the shape (3, 5).
    """
    pieces: list[Range] = []
    try:
        shape = tuple([tree["shape"][str(n)] for n in range(len(tree["shape"]))])
        chunks = [tree["chunks"][str(n)] for n in range(len(tree["chunks"]))]
        dtype = chunks[0].dtype
        for chunk in chunks:
            pieces += chunk.ranges
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("an array in chunks lacks some of them, or its shape") from None
    if any(chunk.dtype != dtype for chunk in chunks):
        raise ValueError("an array in chunks has chunks of several dtypes")
    return FileArray(shape, dtype, tuple(pieces))


def write(path: Path, tree: Any) -> None:
    """Writes a tree of dicts, arrays, numbers, strings and None, as `flax.serialization` does.

    Memory holds the tree, and twice its largest array. Raises `StoreError` for another leaf.
    """
    packer = msgpack.Packer()
    with path.open("wb") as file:
        for piece in _pieces(packer, tree):
            file.write(piece)


def _pieces(packer: Any, tree: Any) -> Iterator[bytes]:
    """The bytes of a tree, leaf by leaf, so that they are never in memory together."""
    if isinstance(tree, dict):
        yield packer.pack_map_header(len(tree))
        for key, value in tree.items():
            yield packer.pack(key)
            yield from _pieces(packer, value)
    elif isinstance(tree, np.ndarray) and tree.nbytes > _CHUNK:
        yield from _pieces(packer, _chunks(tree))
    elif isinstance(tree, np.ndarray | np.generic):
        # Flax reads a number of numpy back as one, and not as an array without axes.
        code = _ARRAY if isinstance(tree, np.ndarray) else _SCALAR
        parts = [list(tree.shape), tree.dtype.name, tree.tobytes()]
        yield packer.pack_ext_type(code, msgpack.packb(parts))
    elif isinstance(tree, complex):
        yield packer.pack_ext_type(_COMPLEX, msgpack.packb([tree.real, tree.imag]))
    elif tree is None or isinstance(tree, bool | int | float | str):
        yield packer.pack(tree)
    else:
        raise StoreError(f"msgpack cannot hold a {type(tree).__name__}")


def _chunks(array: Array) -> dict[str, Any]:
    """A large array as flax cuts it, into flat pieces."""
    flat = array.reshape(-1)
    step = max(1, _CHUNK // array.itemsize)
    parts = [flat[start : start + step] for start in range(0, flat.size, step)]
    numbered = {str(number): part for number, part in enumerate(parts)}
    shape = {str(number): size for number, size in enumerate(array.shape)}
    return {_CHUNKED: True, "shape": shape, "chunks": numbered}
