"""Takes values out of JSON that somebody else wrote, each with the type and the size that it needs.

A checkpoint's side files may hold anything: a number where a mapping belongs, a shape of minus one,
a name that no file system can write. Each function here returns a value that is what it says, or
raises `ValueError` with what was expected and what was got. The caller adds where it was.

    >>> entry = {"key": "kernel", "key_type": 7}
    >>> text(field(entry, "key"))
    'kernel'
    >>> integer(field(entry, "key_type"), 1, 2)
    Traceback (most recent call last):
    ValueError: expected an integer from 1 to 2, got 7
"""

import math
import re
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import Any

from linen_nnx.book.reading import ObjectPath, open_file, parse_json, read_bytes, size_of
from linen_nnx.errors import Refusal

METADATA_LIMIT = 1 << 20
"""Bytes of one array's zarr metadata, which take some hundred."""
# Axes of an array: numpy's own limit was 32 until version 2, tensorstore's still is.
_RANK = 32
# Of one array: more than any disk, and still exact in every reader's integers.
_BYTES = 1 << 60
# Levels of a value that nothing here takes apart: real ones nest four deep.
_LEVELS = 32
_AT_ONCE = 16  # requests for files in a bucket
_SHOWN = 60  # characters of a value in a message

# What zarr calls the dtypes that numpy has not; zarr2 has codes such as `<f4` for the others.
_NAMED = r"bfloat16|u?int[24]|float8_e\d\w*|float4_e2m1fn"
_ZARR2_DTYPE = re.compile(rf"\|b1|\|[iu]1|[<>][iu][248]|[<>]f[248]|[<>]c(8|16)|{_NAMED}")
_ZARR3_DTYPE = re.compile(rf"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)|{_NAMED}")


class StoreError(Refusal):
    """A checkpoint that cannot be read, with what was seen and where."""


def read(path: Path) -> bytes:
    """The content of an array's metadata file, or `StoreError`."""
    try:
        return read_bytes(path, METADATA_LIMIT)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path} cannot be read: {reason(error)}") from None


def read_all(paths: Sequence[Path]) -> list[bytes]:
    """The contents of many metadata files, or `StoreError`."""
    if any(isinstance(path, ObjectPath) for path in paths):
        from concurrent.futures import ThreadPoolExecutor

        # One after another, 96 arrays in a bucket take 3.0 s, and 0.25 s so.
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(read, paths))
    return [read(path) for path in paths]


def open_data(path: Path) -> FileIO:
    """Opens a data file, or raises `StoreError` or `OSError`."""
    try:
        return open_file(path)
    except ValueError as error:
        raise StoreError(f"{path} cannot be read: {error}") from None


def data_size(path: Path) -> int:
    """The bytes of a data file that can be read, or `StoreError` or `OSError`."""
    try:
        return size_of(path)
    except ValueError as error:
        raise StoreError(f"{path} cannot be read: {error}") from None


def reason(error: OSError | ValueError) -> str:
    """An error's text without the file's name, which the message has already."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def shown(value: Any) -> str:
    """A value as a message shows it: short, whatever it is.

    Example:
      >>> shown([1, 2]), shown(10**5000), shown("kernel")
      ('a list of 2', 'a huge integer', "'kernel'")
    """
    # Not the `repr` of a container, which for a long or shared value may take hours.
    if isinstance(value, dict):
        return f"a mapping of {len(value)}"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    # Python refuses to print an integer of 4,301 digits.
    if isinstance(value, int) and abs(value) >= _BYTES:
        return "a huge integer"
    whole = repr(value)
    return whole if len(whole) <= _SHOWN else f"{whole[:_SHOWN]}..."


def mapping(value: Any) -> dict[str, Any]:
    """A mapping, whose keys JSON has made texts."""
    if not isinstance(value, dict):
        raise ValueError(f"expected a mapping, got {shown(value)}")
    return value


def sequence(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"expected a list, got {shown(value)}")
    return value


def field(value: Any, key: str) -> Any:
    """The value of a key that a mapping must have."""
    if key not in mapping(value):
        raise ValueError(f"`{key}` is missing")
    return value[key]


def text(value: Any) -> str:
    """A text that UTF-8 can hold: JSON can also spell halves of characters, such as `\\ud800`."""
    if not isinstance(value, str):
        raise ValueError(f"expected a text, got {shown(value)}")
    # The `UnicodeEncodeError` of half a character is a `ValueError`, too.
    if not value.isascii():
        value.encode()
    return value


def integer(value: Any, least: int, most: int) -> int:
    """An integer between two others."""
    # `isinstance` would take `true` for 1.
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"expected an integer from {least} to {most}, got {shown(value)}")
    return value


def name(value: Any) -> str:
    """A name of a leaf or of a file that is one element of a path, in a store as on disk."""
    if not text(value):
        raise ValueError("a name is empty")
    if value in (".", ".."):
        raise ValueError(f"the name {value!r} stands for a directory, and can name nothing in one")
    for character, called in (("/", "a `/`"), ("\0", "a NUL")):
        if character in value:
            raise ValueError(f"the name {shown(value)} holds {called}, and is no element of a path")
    return value


def shape(value: Any, least: int = 0) -> list[int]:
    """The lengths of an array's axes, none below `least`."""
    sizes = [integer(size, least, _BYTES) for size in sequence(value)]
    if len(sizes) > _RANK:
        raise ValueError(f"expected at most {_RANK} axes, got {len(sizes)}")
    # Each may be possible by itself: 2**40 by 2**40 is not.
    if math.prod(sizes) > _BYTES:
        raise ValueError(f"an array of shape {sizes} is larger than any disk")
    return sizes


def plain(value: Any) -> Any:
    """A value that is handed on as it is, which may not nest deeper than writing it again allows.

    The levels are taken one by one from the outside, as recursion would end in a `RecursionError`:

        {"a": [1, [2]]}   ->   [1, [2]]   ->   1, [2]   ->   2          three levels
    """
    level = [value]
    for _ in range(_LEVELS):
        inner: list[Any] = []
        for node in level:
            if isinstance(node, dict):
                inner += node.values()
            elif isinstance(node, list):
                inner += node
        if not inner:
            return value
        level = inner
    raise ValueError(f"it nests more than {_LEVELS} levels deep")


def dtype_name(value: Any) -> str:
    """The name of a dtype of numbers, such as `float32` or `bfloat16`."""
    if not isinstance(value, str) or not _ZARR3_DTYPE.fullmatch(value):
        raise ValueError(f"the dtype {shown(value)} is not known")
    return value


def array_metadata(content: str | bytes, zarr3: bool) -> dict[str, Any]:
    """The zarr metadata of one array, in which everything that this library uses is checked.

    Args:
      content: the JSON.
      zarr3: whether it has to be of zarr3, else of zarr2.
    """
    metadata = mapping(plain(parse_json(content)))
    version = 3 if zarr3 else 2
    if field(metadata, "zarr_format") != version:
        found = shown(metadata["zarr_format"])
        raise ValueError(f"`zarr_format` is {found}, expected {version}")
    rank = len(shape(field(metadata, "shape")))
    # A chunk of length 0 would make infinitely many.
    for sizes in _chunks(metadata, zarr3):
        if len(shape(sizes, least=1)) != rank:
            raise ValueError(f"its chunks have {len(sizes)} axes, expected {rank} as its shape has")
    key, known = ("data_type", _ZARR3_DTYPE) if zarr3 else ("dtype", _ZARR2_DTYPE)
    dtype = field(metadata, key)
    if not isinstance(dtype, str) or not known.fullmatch(dtype):
        raise ValueError(f"its dtype {shown(dtype)} is not known")
    return metadata


def _chunks(metadata: dict[str, Any], zarr3: bool) -> list[Any]:
    """The shapes of an array's chunks, and of the chunks in a shard, not yet checked."""
    if not zarr3:
        _zarr2_encoding(metadata)
        return [field(metadata, "chunks")]
    grid = field(metadata, "chunk_grid")
    # Zarr3 allows other grids, such as rectangles of several sizes; Orbax writes none.
    if field(grid, "name") != "regular":
        raise ValueError(f"its chunk grid {shown(grid['name'])} is not known, `regular` is")
    mapping(field(metadata, "chunk_key_encoding"))
    parts = [field(grid, "configuration")]
    for codec in sequence(field(metadata, "codecs")):
        if text(field(codec, "name")) == "sharding_indexed":
            parts.append(field(codec, "configuration"))
    return [field(part, "chunk_shape") for part in parts]


def _zarr2_encoding(metadata: dict[str, Any]) -> None:
    """Checks the fields of zarr2 metadata that say how a chunk is encoded and named."""
    if field(metadata, "order") not in ("C", "F"):
        raise ValueError(f"its order is {shown(metadata['order'])}, expected `C` or `F`")
    if field(metadata, "filters") is not None:
        sequence(metadata["filters"])
    if metadata.get("dimension_separator", ".") not in (".", "/"):
        found = shown(metadata["dimension_separator"])
        raise ValueError(f"its dimension separator is {found}, expected `.` or `/`")
    if (compressor := field(metadata, "compressor")) is not None:
        text(field(compressor, "id"))
