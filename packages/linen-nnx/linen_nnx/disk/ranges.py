"""Arrays that lie in files as plain bytes: where, of which shape and dtype, and how to read one.

A msgpack file of Flax has an array of over 1 GiB in chunks, so an array has one range or several:

    FileArray(shape (3,), dtype float32, ranges ((model.msgpack, from 40, 8 bytes),
                                                 (model.msgpack, from 60, 4 bytes)))
"""

import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy the names bfloat16, float8_*, int4)
import numpy as np

from linen_nnx.book.reading import open_file

Array = np.ndarray[Any, Any]
"""An array in memory."""


class Range(NamedTuple):
    """Consecutive bytes of a file."""

    path: Path
    start: int
    length: int


@dataclass(frozen=True)
class FileArray:
    """An array in row-major order, in one or more ranges that follow upon each other.

    Raises `ValueError` where shape, dtype and ranges contradict each other.

    Example:
      >>> import tempfile
      >>> file = Path(tempfile.mkdtemp(), "weights")
      >>> _ = file.write_bytes(np.arange(4, dtype="<i2").tobytes())
      >>> FileArray((2,), sized("int16"), (Range(file, 2, 4),)).read()
      array([1, 2], dtype=int16)
    """

    shape: tuple[int, ...]
    dtype: "np.dtype[Any]"
    ranges: tuple[Range, ...]

    def __post_init__(self) -> None:
        # The shape comes from a file, where `true` and 2.0 may stand for sizes.
        if any(type(size) is not int or size < 0 for size in self.shape):
            raise ValueError(f"an array has the shape {list(self.shape)}")
        expected = math.prod(self.shape) * self.dtype.itemsize
        found = sum(piece.length for piece in self.ranges)
        if found != expected:
            form = f"{self.dtype}{list(self.shape)}"
            raise ValueError(f"an array {form} has {found} bytes, expected {expected}")

    def read(self) -> Array:
        """The array itself, `shape` of `dtype`, in memory of its own."""
        # A mutable buffer that every range is read straight into: no copy, and an array that can
        # be written to.
        data = bytearray(sum(piece.length for piece in self.ranges))
        view, at = memoryview(data), 0
        for path, start, length in self.ranges:
            with open_file(path) as file:
                file.seek(start)
                _fill(file, view[at : at + length], path)
            at += length
        return np.frombuffer(data, self.dtype).reshape(self.shape)


def _fill(file: Any, view: memoryview, path: Path) -> None:
    """Reads until `view` is full: one read gives 2 GiB at most."""
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"{path} became shorter while it was read")
        done += count


@cache  # a file has thousands of arrays, and few dtypes
def sized(name: str) -> "np.dtype[Any]":
    """The dtype of a name, which must be one of numbers.

    Example:
      >>> sized("bfloat16").itemsize
      2
      >>> sized("object")
      Traceback (most recent call last):
      ValueError: the dtype `object` is none of numbers
    """
    try:
        dtype = np.dtype(name)
    except TypeError:
        raise ValueError(f"the dtype `{name}` is unknown") from None
    # Those of ml_dtypes, such as bfloat16, have the kind V and a name; structures have fields.
    if dtype.kind not in "biufcV" or dtype.name.startswith("void"):
        raise ValueError(f"the dtype `{name}` is none of numbers")
    return dtype
