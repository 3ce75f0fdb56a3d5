"""Files that hold arrays under flat names: safetensors, and numpy's npz.

Their names are the paths of a tree, joined by slashes or by dots: `params/fc/kernel` as well as
`params.fc.kernel`. If any name of a file has a slash, slashes separate in all of it.

A safetensors file is a length, a header in JSON, and the arrays as plain bytes:

    <length> {"fc.bias": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, ...} <bytes>

Only headers are read here. An array is read when it is asked for. (`safetensors.deserialize` held
796 MB for 400 MB of arrays, `safe_open` mapped 428 MB of them.)
"""

import re
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from linen_nnx.book.reading import open_file, parse_json
from linen_nnx.disk import checked
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.ranges import Array, FileArray, Range, sized

_DTYPES = {
    "BOOL": "bool", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64",
    "F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
# A byte of deflate unpacks to 1,032 bytes at most: more is a damaged size, or a trap.
_MOST_DEFLATED = 1032
_LONGEST_NPY = 1 << 16  # bytes of an array's header, which takes 118
_NPY = re.compile(
    r"\s*\{'descr': '([^']{1,40})', 'fortran_order': (?:True|False), "
    r"'shape': \(([0-9, ]*)\),? ?\}\s*"
)
_LONGEST_HEADER = 100_000_000  # bytes, which is the limit of safetensors itself


@dataclass(frozen=True)
class NpzArray:
    """An array of an npz archive, which may be compressed."""

    shape: tuple[int, ...]
    dtype: "np.dtype[Any]"
    archive: Path
    name: str
    unnamed: bool
    """Whether numpy had no name for its dtype, which must be bfloat16 then."""

    def read(self) -> Array:
        """The array itself, `shape` of `dtype`."""
        with open_file(self.archive) as file, np.load(file, allow_pickle=False) as arrays:
            array = arrays[self.name]
        # For numpy a bfloat16 is two bytes without a meaning.
        return array.view(self.dtype)


def split(names: Mapping[str, Any], separator: str | None = None) -> dict[tuple[str, ...], Any]:
    """Flat names as paths, split at one separator.

    Args:
      names: the values by their flat names.
      separator: that of the whole file. If None, it is a slash where any name has one, else a dot.

    Example:
      >>> split({"params.fc.kernel": 1, "step": 2})
      {('params', 'fc', 'kernel'): 1, ('step',): 2}
      >>> split({"params/v1.5/kernel": 1})
      {('params', 'v1.5', 'kernel'): 1}
    """
    if separator is None:
        separator = "/" if any("/" in name for name in names) else "."
    return {tuple(name.split(separator)): value for name, value in names.items()}


def read_safetensors(path: Path) -> dict[str, FileArray]:
    """The arrays of a safetensors file by name. Raises `StoreError` for what is none."""
    try:
        with open_file(path) as file:
            size = file.seek(0, 2)
            file.seek(0)
            (length,) = struct.unpack("<Q", file.read(8))
            # Compared first: a damaged length would be allocated.
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError(f"a header of {length} bytes in a file of {size}")
            header = parse_json(file.read(length))
        # Texts of the writer's own, such as {"format": "pt"}.
        header.pop("__metadata__", None)
        return {name: _tensor(path, size, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise StoreError(f"{path} cannot be read as safetensors: {error!r}") from None


def _tensor(path: Path, size: int, start: int, entry: Any) -> FileArray:
    """An array by its entry in the header; `start` is the byte at which the header ends."""
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"the dtype {entry['dtype']} is none of {', '.join(_DTYPES)}")
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= size - start:
        raise ValueError(f"bytes {begin} to {end} lie outside of the file")
    place = Range(path, start + begin, end - begin)
    return FileArray(tuple(entry["shape"]), sized(_DTYPES[entry["dtype"]]), (place,))


def read_npz(path: Path) -> dict[str, NpzArray]:
    """The arrays of an npz archive by name. Raises `StoreError` for what is none.

    numpy has no name for bfloat16 and writes it as two bytes without a meaning (`|V2`); nothing
    else of jax has that form, so it is read back as bfloat16. Pickled objects are refused: reading
    one runs code from the file.
    """
    arrays, problems = {}, []
    try:
        with open_file(path) as file, zipfile.ZipFile(file) as archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(".npy")
                try:
                    arrays[name] = _npz_array(path, name, archive, info)
                except ValueError as error:
                    problems.append(f"`{name}`: {error}")
    except (OSError, ValueError, zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise StoreError(f"{path} cannot be read as npz: {error}") from None
    if problems:
        raise StoreError(f"{path} cannot be read: {'; '.join(problems)}")
    return arrays


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], "np.dtype[Any]"]:
    """Shape and dtype of an array, from the header in front of its bytes.

    The header is the text `{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }`. numpy
    reads it as Python, whose parser has errors of its own for each way in which the text may be
    damaged. Here a pattern reads it.
    """
    magic = file.read(8)
    if magic[:6] != b"\x93NUMPY" or magic[6] not in (1, 2, 3):
        raise ValueError(f"it begins with {magic.hex()}, which is no array of numpy")
    # Version 1 of the format has two bytes of length, those after it have four.
    length = int.from_bytes(file.read(2 if magic[6] == 1 else 4), "little")
    if length > _LONGEST_NPY:
        raise ValueError(f"it has a header of {length} bytes, expected at most {_LONGEST_NPY}")
    text = file.read(length).decode()
    match = _NPY.fullmatch(text)
    if match is None:
        raise ValueError(f"its header is {checked.shown(text)}")
    # `|O`, or a structure with such a field.
    if "O" in match[1]:
        raise ValueError("it holds pickled objects, which are refused: reading them runs code")
    shape = [int(size) for size in match[2].split(",") if size.strip()]
    return tuple(checked.shape(shape)), _described(match[1])


def _described(text: str) -> "np.dtype[Any]":
    try:
        return np.dtype(text)
    except (TypeError, ValueError):
        raise ValueError(f"the dtype {checked.shown(text)} is unknown") from None


def _npz_array(path: Path, name: str, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> NpzArray:
    if not info.filename.endswith(".npy"):
        raise ValueError("it is no array of numpy")
    if info.file_size > _MOST_DEFLATED * info.compress_size + 1024:
        raise ValueError(f"{info.compress_size} bytes cannot unpack to {info.file_size}")
    with archive.open(info) as file:
        shape, dtype = _npy_header(file)
        start = file.tell()
    unnamed = dtype == np.dtype("V2")
    if unnamed:
        dtype = sized("bfloat16")
    # Built for its checks alone: shape and dtype have to come to the bytes that there are. Where
    # they lie in the archive is no use, as they may be compressed.
    content = Range(path, start, info.file_size - start)
    unpacked = FileArray(shape, sized(dtype.name), (content,))
    return NpzArray(unpacked.shape, dtype, path, name, unnamed)
