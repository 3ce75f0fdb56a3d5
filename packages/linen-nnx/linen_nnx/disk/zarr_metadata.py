"""The zarr metadata of one array: its dtype, its chunks, and what Orbax writes for a new array.

zarr2 and zarr3 say the same in different words. A float32 array of 6 rows, stored in chunks of 2:

    zarr2   {"shape": [6], "chunks": [2], "dtype": "<f4", ...}
    zarr3   {"shape": [6], "chunk_grid": {"configuration": {"chunk_shape": [2]}},
             "data_type": "float32", ...}

The functions here answer for both. Whether metadata can be believed is checked before, when they
are read (`checked.array_metadata`).
"""

import re
from functools import cache
from typing import Any

from linen_nnx.book.specs import Spec


def _zarr2_codes() -> dict[str, str]:
    """The code that zarr2 has for each dtype of numpy's own, such as `<f4` for `float32`."""
    # A single byte has no order, and so no `<`.
    codes = {"bool": "|b1", "int8": "|i1", "uint8": "|u1"}
    sizes = {"int": (2, 4, 8), "uint": (2, 4, 8), "float": (2, 4, 8), "complex": (8, 16)}
    for kind, lengths in sizes.items():
        for length in lengths:
            codes[f"{kind}{8 * length}"] = f"<{kind[0]}{length}"
    return codes


_CODES = _zarr2_codes()
_NAMES = {code: name for name, code in _CODES.items()}


def dtype_of(metadata: dict[str, Any]) -> str:
    """The name of the dtype that zarr2 or zarr3 metadata states.

    Example:
      >>> dtype_of({"zarr_format": 2, "dtype": "<f4"})
      'float32'
      >>> dtype_of({"zarr_format": 3, "data_type": "bfloat16"})
      'bfloat16'
    """
    if metadata["zarr_format"] == 3:
        return metadata["data_type"]
    # zarr2 has no code for the dtypes of ml_dtypes, and writes them by name: `bfloat16`.
    return _NAMES.get(metadata["dtype"], metadata["dtype"])


@cache  # a plan asks of each leaf several times, and there are few dtypes
def itemsize(dtype: str) -> int:
    """Bytes in memory of one element of a dtype that `dtype_of` names.

    Example:
      >>> itemsize("float32"), itemsize("bfloat16"), itemsize("int4")
      (4, 2, 1)
    """
    code = _CODES.get(dtype, dtype)
    if code[0] in "<>|":
        return int(code[2:])
    # The name holds the bits: 16 of `bfloat16`. An int4 takes a whole byte in memory.
    bits = int(re.findall(r"\d+", dtype)[0])
    return -(-bits // 8)


def fresh_metadata(spec: Spec, zarr3: bool) -> dict[str, Any]:
    """The zarr metadata that Orbax gives a new array of one chunk.

    Example:
      >>> fresh_metadata(Spec((6,), "float32"), zarr3=False)["dtype"]
      '<f4'
    """
    shape, dtype = list(spec.shape), str(spec.dtype)
    if not zarr3:
        return {
            "chunks": shape,
            "compressor": {"id": "zstd", "level": 1},
            "dimension_separator": ".",
            "dtype": _CODES.get(dtype, dtype),
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": shape,
            "zarr_format": 2,
        }
    # Orbax writes zarr3 arrays as one shard, even where the shard holds one chunk.
    zstd = {"name": "zstd", "configuration": {"level": 3, "checksum": False}}
    shard = {"chunk_shape": shape, "codecs": [{"name": "bytes"}, zstd]}
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": shard}],
    }


def metadata_name(zarr3: bool) -> str:
    """The key of an array's metadata, below the array's name."""
    return "zarr.json" if zarr3 else ".zarray"


def chunk_shapes(metadata: dict[str, Any]) -> list[list[int]]:
    """The shape of the stored chunks and, of a zarr3 shard, of the chunks inside the shard.

    Example:
      >>> chunk_shapes(fresh_metadata(Spec((4, 8), "float32"), zarr3=False))
      [[4, 8]]
      >>> chunk_shapes(fresh_metadata(Spec((4, 8), "float32"), zarr3=True))
      [[4, 8], [4, 8]]
    """
    if metadata["zarr_format"] == 2:
        return [list(metadata["chunks"])]
    return [list(part["chunk_shape"]) for part in chunked_parts(metadata)]


def chunked_parts(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """The mappings inside zarr3 metadata that have a `chunk_shape`: the grid's, then the shards'.

    They are the mappings themselves and no copies, so that a caller may give them another shape.
    """
    parts = [metadata["chunk_grid"]["configuration"]]
    for codec in metadata["codecs"]:
        if codec["name"] == "sharding_indexed":
            parts.append(codec["configuration"])
    return parts
