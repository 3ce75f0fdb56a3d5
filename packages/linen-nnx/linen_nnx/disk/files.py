"""Checkpoints that are files: Flax's msgpack, safetensors, npz; whole, or in shards with an index.

A msgpack file holds a whole tree, be it parameters alone or a training state. The other formats
hold arrays under flat names. Nothing is read but headers before an array is asked for; then one
at a time.

A checkpoint in shards, as Hugging Face writes it, is one index and the files that it lists:

    m.safetensors.index.json          {"weight_map": {"fc.kernel": "m-00001-of-00002.safetensors",
    m-00001-of-00002.safetensors                      "fc.bias": "m-00002-of-00002.safetensors"}}
    m-00002-of-00002.safetensors

`flat_files.py` and `msgpack_tree.py` know the formats; `loose.py` makes leaves of what they read.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from linen_nnx.book.reading import read_json
from linen_nnx.disk import flat_files, msgpack_tree
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.flat_files import NpzArray
from linen_nnx.disk.item import refuse_collisions
from linen_nnx.disk.leaves import Keys, Leaf, dict_keys, name_of, path_of
from linen_nnx.disk.loose import kind, listed, make_leaf, read_value, refuse_unknown, walk
from linen_nnx.disk.ranges import Array

Entries = dict[Keys, Any]
"""The content of a file by key path: arrays in files, numbers, strings, None, `{}`, `[]`."""

INDEX_SUFFIX = ".index.json"
_SHARD = re.compile(r".*-\d+-of-(\d+)\.\w+")  # `model-00001-of-00002.msgpack`


class FileReader:
    """The leaves of one file or of several, as `parts` by the files' names, and their arrays."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._values: dict[str, Any] = {}
        self.parts: dict[str, list[Leaf]] = {}
        self.notes: list[str] = []
        for name, path in files.items():
            self.parts[name] = []
            for keys, value in _entries(path).items():
                leaf = make_leaf(keys, value)
                # Several files may each have a `params/fc/kernel`.
                leaf = leaf._replace(stored=f"{name}/{leaf.stored}")
                self._values[leaf.stored] = value
                self.parts[name].append(leaf)
        if any(isinstance(value, NpzArray) and value.unnamed for value in self._values.values()):
            self.notes.append("numpy has no bfloat16: what it calls `|V2` is read as that")

    def read(self, leaves: Sequence[Leaf]) -> list[Array]:
        """The arrays of some leaves. Raises `ValueError` where a file has changed meanwhile."""
        return [read_value(self._values[leaf.stored]) for leaf in leaves]


def files_of(path: Path) -> list[Path]:
    """All files that hold a checkpoint's bytes: the file itself, and the shards that it lists."""
    return [path, *_weights(path)[1]] if path.name.endswith(INDEX_SUFFIX) else [path]


def _entries(path: Path) -> Entries:
    """The entries of a file. Raises `StoreError` for what cannot be read or expressed."""
    if path.name.endswith(INDEX_SUFFIX):
        entries = _sharded(path)
    else:
        if (match := _SHARD.fullmatch(path.name)) is not None:
            raise StoreError(
                f"{path} is one of {int(match[1])} shards and no whole checkpoint: name its "
                f"folder, or its index `*{INDEX_SUFFIX}`"
            )
        entries = _whole(path)
    # The result is an Orbax item, which joins keys by dots.
    refuse_collisions(path, list(map(name_of, entries)))
    refuse_unknown(path, entries)
    return entries


def _whole(path: Path) -> Entries:
    """The entries of a file that is no index."""
    if path.suffix == ".safetensors":
        return _flat(flat_files.read_safetensors(path))
    if path.suffix == ".npz":
        return _flat(flat_files.read_npz(path))
    tree = msgpack_tree.read(path)
    if not isinstance(tree, (dict, list)) or not tree:
        raise StoreError(f"{path} holds {kind(tree)}, expected a tree of arrays")
    return dict(walk(tree))


def _flat(arrays: Mapping[str, Any], separator: str | None = None) -> Entries:
    """Arrays under flat names as a tree of dicts."""
    entries = {}
    for names, value in flat_files.split(arrays, separator).items():
        entries[dict_keys(*names)] = value
    return entries


def _sharded(path: Path) -> Entries:
    """The entries of the shards that an index lists.

    Raises `StoreError` for each array that the index and the shards do not agree on.
    """
    places, shards = _weights(path)
    found = {shard.name: _shard_arrays(shard) for shard in shards}
    problems = []
    for name, shard in places.items():
        if name not in found[shard]:
            problems.append(f"`{name}` is not in {shard}, where the index has it")
    # An unlisted array may be an old version of one that is in another shard.
    for shard, arrays in found.items():
        for name in arrays:
            if places.get(name) != shard:
                problems.append(f"`{name}` in {shard} is not listed by the index")
    if problems:
        raise StoreError(f"{path} and its shards differ: {listed(problems)}")
    # Shards of msgpack hold trees, whose names were joined by slashes just now.
    separator = None if shards[0].suffix == ".safetensors" else "/"
    return _flat({name: found[shard][name] for name, shard in places.items()}, separator)


def _shard_arrays(shard: Path) -> Mapping[str, Any]:
    """The arrays of a shard by the names that an index uses."""
    if shard.suffix == ".safetensors":
        return flat_files.read_safetensors(shard)
    arrays = {}
    for keys, value in walk(msgpack_tree.read(shard)):
        arrays[path_of(keys)] = value
    return arrays


def _weights(path: Path) -> tuple[dict[str, str], list[Path]]:
    """The shard of each array, and all shards. Raises `StoreError` if some are missing."""
    try:
        places = read_json(path)["weight_map"]
        # A name with a slash would lead out of the folder.
        good = all(isinstance(name, str) and Path(name).name == name for name in places.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} cannot be read as an index of shards: {error!r}") from None
    if not (good and places):
        raise StoreError(f"{path} must give a file beside it for each array (`weight_map`)")
    shards = [path.parent / name for name in sorted(set(places.values()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise StoreError(f"{path} lists shards that are not there: {', '.join(missing)}")
    return places, shards


def write_file(path: Path, leaves: Iterable[tuple[Keys, Leaf, Array | None]]) -> None:
    """Writes leaves under the given keys; the array is None for strings and empty nodes.

    Raises `StoreError` for what the format cannot hold.
    """
    if path.suffix == ".msgpack":
        msgpack_tree.write(path, _nested(leaves))
    else:
        _write_safetensors(path, leaves)


def _nested(leaves: Iterable[tuple[Keys, Leaf, Array | None]]) -> dict[str, Any]:
    """The tree that `flax.serialization.from_bytes` expects: an index is a key of digits."""
    tree: dict[str, Any] = {}
    for keys, leaf, array in leaves:
        node: Any = tree
        for key in keys[:-1]:
            # A leaf where a branch is needed: none of the levels below it can be.
            node = node.setdefault(key.name, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or keys[-1].name in node:
            raise StoreError(f"msgpack cannot hold `{leaf.path}`, a leaf and a branch at once")
        node[keys[-1].name] = _value(keys, leaf, array)
    return tree


def _value(keys: Keys, leaf: Leaf, array: Array | None) -> Any:
    # A number of Python comes back as one, as it was before it was saved.
    if array is not None:
        return array.item() if leaf.value_type == "scalar" else array
    if leaf.value_type == "string":
        return leaf.string
    # Orbax writes an empty state of a chain (`optax.EmptyState`) as None; flax expects `{}` there.
    is_state = any(key.name == "opt_state" for key in keys)
    return None if leaf.value_type == "None" and not is_state else {}


def _write_safetensors(path: Path, leaves: Iterable[tuple[Keys, Leaf, Array | None]]) -> None:
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    flat = {}
    for keys, leaf, array in leaves:
        if array is None:
            raise StoreError(f"{path}: safetensors cannot hold `{leaf.path}`, a {leaf.value_type}")
        # `save_file` takes no array whose memory lies in another order, as a transposed one's does.
        flat[name_of(keys)] = np.require(array, requirements="C")
    try:
        save_file(flat, path)
    except SafetensorError as error:
        raise StoreError(f"{path} cannot be written: {error}") from None
