"""Writes the files that describe an item's tree: `_METADATA`, `_sharding`, and their like.

The arrays are in place by then. Each file has an entry for each leaf, keyed by the leaf's name or
path, so a conversion that only renames arrays still writes all of them anew. `item.py` reads them.
"""

import base64
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from linen_nnx.disk.leaves import Key, Leaf
from linen_nnx.disk.zarr_metadata import chunk_shapes


def write_side_files(path: Path, leaves: Sequence[Leaf], header: dict[str, Any]) -> None:
    """Writes `_METADATA` and the other files that are keyed by leaf, into an item's directory.

    Args:
      path: the item's directory, in which the data of all leaves is in place.
      leaves: the leaves in the order of the tree.
      header: the fields of `_METADATA` beside its tree, such as `use_ocdbt`.
    """
    (path / "_METADATA").write_text(_metadata(leaves, header))
    if shardings := _shardings(leaves):
        _write_json(path / "_sharding", shardings)
    if arrays := _array_metadatas(leaves):
        (path / "array_metadatas").mkdir()
        # One process writes what several may have written: Orbax reads every `process_*`.
        _write_json(path / "array_metadatas" / "process_0", {"array_metadatas": arrays})
    strings = {leaf.name: leaf.string for leaf in leaves if leaf.string is not None}
    if strings:
        _write_json(path / "_strings.json", strings)


def _metadata(leaves: Sequence[Leaf], header: dict[str, Any]) -> str:
    """The text of `_METADATA`.

    Pieces of JSON that recur are made once and joined as text: a tree of thousands of leaves has
    few different keys and types, and `json.dumps` would encode each of them anew.
    """
    quoted = json.encoder.encode_basestring_ascii  # what `json.dumps` comes to for a string

    @cache
    def key_json(key: Key) -> str:
        return f'{{"key": {quoted(key.name)}, "key_type": {key.kind}}}'

    value_jsons: dict[tuple[str, Any], str] = {}
    entries = []
    for leaf in leaves:
        kind = leaf.value_type, leaf.write_shape
        if kind not in value_jsons:
            value_jsons[kind] = _value_json(leaf)
        # Orbax writes a leaf's names as Python prints a tuple: `('params', 'kernel')`.
        names = quoted(str(tuple([key[0] for key in leaf.keys])))
        keys = ", ".join(map(key_json, leaf.keys))
        value = value_jsons[kind]
        entries.append(f'{names}: {{"key_metadata": [{keys}], "value_metadata": {value}}}')
    rest = json.dumps(header).removeprefix("{")
    return f'{{"tree_metadata": {{{", ".join(entries)}}}, {rest}'


def _value_json(leaf: Leaf) -> str:
    """The JSON of a leaf's type, which all leaves of this type and shape share."""
    content: dict[str, Any] = {"value_type": leaf.value_type, "skip_deserialize": leaf.empty}
    if leaf.write_shape is not None:
        content["write_shape"] = leaf.write_shape
    return json.dumps(content)


def _shardings(leaves: Sequence[Leaf]) -> dict[str, str]:
    """The content of `_sharding`, whose names are URL-safe base64."""
    shardings = {}
    for leaf in leaves:
        if leaf.sharding is not None:
            shardings[base64.urlsafe_b64encode(leaf.name.encode()).decode()] = leaf.sharding
    return shardings


def _array_metadatas(leaves: Sequence[Leaf]) -> list[dict[str, Any]]:
    """The entries of `array_metadatas`, one for each array whose shape at its writing is known."""
    arrays = []
    for leaf in leaves:
        if leaf.zarr is None or leaf.write_shape is None:
            continue
        array = {
            "param_name": leaf.name,
            "write_shape": leaf.write_shape,
            # The last is the innermost: of a shard, the chunks that one read takes.
            "chunk_shape": chunk_shapes(leaf.zarr)[-1],
            "ext_metadata": leaf.extension,
        }
        arrays.append({"array_metadata": array})
    return arrays


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))
