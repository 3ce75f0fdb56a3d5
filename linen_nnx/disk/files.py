"""Flax msgpack and safetensors files: parameters and collections, without a training state.

A msgpack file holds the tree as `flax.serialization` does. A safetensors file is flat: its names
are the paths joined by dots (or by slashes, as some writers do).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the names bfloat16, float8_*)
import numpy as np

from linen_nnx.book.ops import Spec
from linen_nnx.book.tree import unflatten
from linen_nnx.disk.store import DICT, Key, Leaf, StoreError, fresh_metadata

Array = np.ndarray[Any, Any]
_NAMES = {"BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_NAMES |= {"BOOL": "bool", "C64": "complex64"}
_KINDS = {"F": "float", "I": "int", "U": "uint"}


class FileReader:
    """A file, read whole: its `leaves`, and their arrays."""

    def __init__(self, path: Path) -> None:
        try:
            arrays = _msgpack(path) if path.suffix == ".msgpack" else _safetensors(path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path} cannot be read: {error!r}") from None
        self._arrays = {"/".join(names): array for names, array in arrays.items()}
        self.leaves = [
            Leaf(
                tuple(Key(name, DICT) for name in names),
                "np.ndarray",
                zarr=fresh_metadata(Spec.of(array), zarr3=False),
                stored="/".join(names),
            )
            for names, array in arrays.items()
        ]

    def read(self, leaves: Sequence[Leaf]) -> list[Array]:
        return [self._arrays[leaf.stored] for leaf in leaves]


def _msgpack(path: Path) -> dict[tuple[str, ...], Array]:
    from flax.serialization import msgpack_restore  # imports jax

    arrays = {}

    def walk(node: Any, names: tuple[str, ...]) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, (*names, str(key)))
        elif node is not None:
            arrays[names] = np.asarray(node)

    walk(msgpack_restore(path.read_bytes()), ())
    return arrays


def _safetensors(path: Path) -> dict[tuple[str, ...], Array]:
    from safetensors import SafetensorError, deserialize

    try:
        entries = deserialize(path.read_bytes())
    except SafetensorError as error:
        raise StoreError(f"{path} cannot be read: {error}") from None
    separator = "/" if any("/" in name for name, _ in entries) else "."
    arrays = {}
    for name, entry in entries:
        kind = entry["dtype"]
        dtype = np.dtype(_NAMES.get(kind) or f"{_KINDS[kind[0]]}{kind[1:]}")
        array = np.frombuffer(entry["data"], dtype).reshape(entry["shape"])
        arrays[tuple(name.split(separator))] = array
    return arrays


def write_file(path: Path, arrays: Mapping[tuple[str, ...], Array]) -> None:
    """Writes arrays by their key names. Raises `ValueError` for what the format cannot hold."""
    if path.suffix == ".msgpack":
        from flax.serialization import msgpack_serialize  # imports jax

        tree = unflatten({"/".join(names): array for names, array in arrays.items()})
        path.write_bytes(msgpack_serialize(tree))
        return
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    flat = {".".join(names): np.require(array, requirements="C") for names, array in arrays.items()}
    try:
        save_file(flat, path)
    except SafetensorError as error:
        raise StoreError(f"{path} cannot be written: {error}") from None
