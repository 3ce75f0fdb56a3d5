"""One Orbax item on disk: its tree and its key-value store. Reads no array; imports no jax.

An item directory holds `_METADATA` (the tree), a store of zarr arrays named by their dotted key
path (one OCDBT database, or one directory per array), and side files keyed by those names.
"""

import base64
import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  (teaches numpy the names bfloat16, float8_*, int4)
import numpy as np
import tensorstore as ts

from linen_nnx.ops import Spec

SEQUENCE, DICT = 1, 2
EMPTY_TYPES = ("None", "Dict", "List", "Tuple", "NamedTuple")
_REPLICATED = {"partition_spec": []}


class StoreError(ValueError):
    """A directory that is no readable Orbax item, with what was seen."""


class Key(NamedTuple):
    """One step of a key path; `kind` is `DICT` or `SEQUENCE`."""

    name: str
    kind: int


@dataclass(frozen=True)
class Leaf:
    """One entry of the tree: an array, a string, or an empty node."""

    keys: tuple[Key, ...]
    value_type: str
    """As Orbax names it: `jax.Array`, `np.ndarray`, `scalar`, `string`, `None`, `Dict`, `List`."""
    zarr: dict[str, Any] | None = None
    """The array's zarr metadata; None for strings and empty nodes."""
    extension: dict[str, Any] | None = None
    """What `array_metadatas` says beyond shapes: the kind of a typed PRNG key."""
    sharding: str | None = None
    write_shape: tuple[int, ...] | None = None
    string: str | None = None
    item: int = 0
    """Which of a step's items it lies in, where several make up one state."""
    stored: str = ""
    """Its name in that item's store; a target leaf still has the one that it came from."""

    @property
    def path(self) -> str:
        return "/".join([key[0] for key in self.keys])

    @property
    def name(self) -> str:
        """Its name in the store."""
        return ".".join([key[0] for key in self.keys])

    @property
    def empty(self) -> bool:
        return self.value_type in EMPTY_TYPES

    def at(self, keys: tuple[Key, ...]) -> "Leaf":
        """The same leaf under another key path."""
        leaf = Leaf(keys, self.value_type, self.zarr, self.extension, self.sharding)
        rest = {n: getattr(self, n) for n in ("write_shape", "string", "item", "stored")}
        leaf.__dict__.update(rest)  # `dataclasses.replace` takes three times as long
        return leaf

    @property
    def spec(self) -> Spec:
        """Shape and dtype; those of a typed PRNG key are its own, not its raw words'."""
        assert self.zarr is not None
        shape, dtype = tuple(self.zarr["shape"]), zarr_dtype(self.zarr)
        if self.extension:
            return Spec(shape[:-1], f"key<{self.extension['random_key_impl']}>")
        return Spec(shape, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        if self.zarr is None:
            return 0
        return math.prod(self.zarr["shape"]) * zarr_dtype(self.zarr).itemsize


def zarr_dtype(metadata: dict[str, Any]) -> np.dtype[Any]:
    """The numpy dtype that zarr2 or zarr3 metadata states."""
    return np.dtype(metadata["dtype" if metadata["zarr_format"] == 2 else "data_type"])


@dataclass(frozen=True)
class Tree:
    """What the tree of an OCDBT store says: where the bytes are."""

    values: dict[str, bytes]
    """The small values that lie in the tree itself, by key."""
    files: dict[str, set[str]]
    """The data files of each array, by its name; paths are relative to the item."""
    own: set[str]
    """The files of the tree's own nodes."""


@dataclass(frozen=True)
class Item:
    """An open item: `leaves` in the order of `_METADATA`, whose other fields are `header`."""

    path: Path
    leaves: tuple[Leaf, ...]
    header: dict[str, Any]
    tree: "Tree | None"
    """Of an OCDBT store, its tree."""

    @property
    def ocdbt(self) -> bool:
        return bool(self.header["use_ocdbt"])

    @property
    def zarr3(self) -> bool:
        return bool(self.header.get("use_zarr3"))

    def data_files(self, names: Collection[str]) -> list[Path]:
        """The files of an OCDBT store that hold its tree, then those of the named arrays' bytes."""
        if self.tree is None:
            return []
        found = {place for name in names for place in self.tree.files.get(name, ())}
        places = sorted(self.tree.own) + sorted(found - self.tree.own)
        return [self.path / place for place in places]


def is_item(path: Path) -> bool:
    """Whether a directory is a pytree item of Orbax."""
    return (path / "_METADATA").is_file()


def open_kv(
    base: Path,
    context: ts.Context,
    ocdbt: bool,
    manifest: Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> ts.KvStore:
    """The key-value store of an item.

    Of an OCDBT store, `manifest` is where the manifest lies, if not beside the data, and `config`
    is given to a new one.
    """
    files = {"driver": "file", "path": f"{base.absolute()}/"}
    if not ocdbt:
        return ts.KvStore.open(files, context=context).result()
    spec: dict[str, Any] = {"driver": "ocdbt", "base": files}
    if manifest is not None:
        spec["manifest"] = {"driver": "file", "path": f"{manifest.absolute()}/"}
    if config is not None:
        spec["config"] = config
    return ts.KvStore.open(spec, context=context).result()


def read_item(path: Path, number: int = 0) -> Item:
    """Reads an item's tree. Raises `StoreError` for what is missing, damaged or ambiguous."""
    try:
        header = json.loads((path / "_METADATA").read_text())
        tree = header.pop("tree_metadata")
        entries = [
            (tuple(Key(str(k["key"]), k["key_type"]) for k in entry["key_metadata"]), value)
            for entry in tree.values()
            for value in [entry["value_metadata"]]
        ]
        sharding = _read_sharding(path)
        arrays = _read_array_metadatas(path)
        strings = _read_json(path / "_strings.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{path} cannot be read as an Orbax item: {error!r}") from None
    if "use_ocdbt" not in header:
        header["use_ocdbt"] = (path / "manifest.ocdbt").is_file()
    if header["use_ocdbt"] and not (path / "manifest.ocdbt").is_file():
        raise StoreError(f"{path} has no manifest.ocdbt: the save was cut off, or files were lost")
    names = [".".join(key.name for key in keys) for keys, _ in entries]
    _refuse_collisions(path, names, entries)
    held = [
        name
        for name, (_, value) in zip(names, entries, strict=True)
        if value["value_type"] not in (*EMPTY_TYPES, "string")
    ]
    stored = _read_tree(path) if header["use_ocdbt"] else None
    zarr = _read_zarr(path, header, held, stored)
    leaves = tuple(
        Leaf(
            keys=keys,
            value_type=value["value_type"],
            zarr=zarr.get(name),
            extension=arrays.get(name, {}).get("ext_metadata"),
            sharding=sharding.get(name),
            write_shape=_tuple(arrays.get(name, value).get("write_shape")),
            string=strings.get(name),
            item=number,
            stored=name,
        )
        for name, (keys, value) in zip(names, entries, strict=True)
    )
    return Item(path, leaves, header, stored)


def _tuple(shape: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if shape is None else tuple(shape)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _read_sharding(path: Path) -> dict[str, str]:
    entries = _read_json(path / "_sharding")
    return {base64.b64decode(name).decode(): text for name, text in entries.items()}


def _read_array_metadatas(path: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for file in sorted((path / "array_metadatas").glob("process_*")):
        for entry in json.loads(file.read_text())["array_metadatas"]:
            array = entry["array_metadata"]
            found[array["param_name"]] = array
    return found


def _refuse_collisions(
    path: Path, names: Sequence[str], entries: Sequence[tuple[tuple[Key, ...], Any]]
) -> None:
    """Orbax saves `{"a.b": x, "a": {"b": y}}` without error, and keeps one of the two."""
    counts = Counter(names)
    problems = [f"`{name}` names {n} leaves in the store" for name, n in counts.items() if n > 1]
    keys = {key.name for entry, _ in entries for key in entry}
    problems += [f"key `{key}` holds a `/`" for key in sorted(keys) if "/" in key]
    if problems:
        raise StoreError(f"{path} is ambiguous: {'; '.join(problems)}")


def _read_zarr(
    path: Path, header: dict[str, Any], names: list[str], tree: Tree | None
) -> dict[str, dict[str, Any]]:
    """The zarr metadata of every array: from the tree, where a look-up of each takes 40 us."""
    suffix = "/zarr.json" if header.get("use_zarr3") else "/.zarray"
    kv = open_kv(path, ts.Context(), header["use_ocdbt"])
    raw = tree.values if tree else {}
    try:
        pending = {n: kv.read(n + suffix) for n in names if n + suffix not in raw}
        found = {n: f.result() for n, f in pending.items()}
    except ValueError as error:
        raise StoreError(f"{path}: the store cannot be read: {error}") from None
    missing = [n for n, result in found.items() if result.state != "value"]
    if missing:
        shown = ", ".join(f"`{n}`" for n in missing[:10])
        raise StoreError(f"{path} lacks {len(missing)} of its arrays in the store: {shown}")
    values = {n: raw[n + suffix] if n + suffix in raw else found[n].value for n in names}
    parsed = {value: json.loads(value) for value in set(values.values())}  # most are equal
    return {n: parsed[value] for n, value in values.items()}


def _read_tree(path: Path) -> Tree:
    """Reads all nodes of an OCDBT store's newest version."""
    files = ts.KvStore.open({"driver": "file", "path": f"{path.absolute()}/"}).result()
    tree = Tree({}, {}, set())

    def visit(location: str, prefix: bytes) -> None:
        tree.own.add(_file(location))
        for entry in ts.ocdbt.dump(files, node=location).result()["entries"]:
            key = prefix + entry["key"]
            if "location" in entry:
                visit(entry["location"], prefix + entry["subtree_common_prefix"])
            elif "inline_value" in entry:
                tree.values[key.decode()] = entry["inline_value"]
            else:
                name = key.decode().partition("/")[0]
                tree.files.setdefault(name, set()).add(_file(entry["indirect_value"]))

    try:
        root = ts.ocdbt.dump(files).result()["versions"][-1]["root"]
        if "location" in root:
            visit(root["location"], b"")
    except (ValueError, KeyError, IndexError) as error:
        raise StoreError(f"{path}: its OCDBT tree cannot be read: {error}") from None
    return tree


def _file(location: str) -> str:
    """The file in `value:<folder>:<path>:<offset>:<length>`."""
    _, folder, path, _, _ = location.split(":")
    return folder + path


def write_side_files(path: Path, leaves: Sequence[Leaf], header: dict[str, Any]) -> None:
    """Writes `_METADATA` and the other files keyed by name, for leaves whose data is in place."""
    # Pieces of JSON that recur are made once: trees of thousands of leaves have few keys.
    keys: dict[Key, str] = {}
    values: dict[tuple[str, Any], str] = {}
    tree = []
    for leaf in leaves:
        for key in leaf.keys:
            if key not in keys:
                keys[key] = json.dumps({"key": key.name, "key_type": key.kind})
        kind = leaf.value_type, leaf.write_shape
        if kind not in values:
            shape = {} if leaf.write_shape is None else {"write_shape": leaf.write_shape}
            base = {"value_type": leaf.value_type, "skip_deserialize": leaf.empty}
            values[kind] = json.dumps(base | shape)
        names = json.dumps(str(tuple([key[0] for key in leaf.keys])))
        entry = f'"key_metadata": [{", ".join([keys[key] for key in leaf.keys])}]'
        tree.append(f'{names}: {{{entry}, "value_metadata": {values[kind]}}}')
    rest = json.dumps(header)[1:]
    (path / "_METADATA").write_text(f'{{"tree_metadata": {{{", ".join(tree)}}}, {rest}')
    shardings = {
        base64.b64encode(leaf.name.encode()).decode(): leaf.sharding
        for leaf in leaves
        if leaf.sharding is not None
    }
    if shardings:
        _write_json(path / "_sharding", shardings)
    arrays = [
        {
            "array_metadata": {
                "param_name": leaf.name,
                "write_shape": leaf.write_shape,
                "chunk_shape": chunk_shape(leaf.zarr),
                "ext_metadata": leaf.extension,
            }
        }
        for leaf in leaves
        if leaf.zarr is not None and leaf.write_shape is not None
    ]
    if arrays:
        (path / "array_metadatas").mkdir()
        _write_json(path / "array_metadatas" / "process_0", {"array_metadatas": arrays})
    strings = {leaf.name: leaf.string for leaf in leaves if leaf.string is not None}
    if strings:
        _write_json(path / "_strings.json", strings)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def chunk_shape(metadata: dict[str, Any]) -> list[int]:
    """The shape of the stored chunks (of a zarr3 shard, its inner chunks)."""
    if metadata["zarr_format"] == 2:
        return list(metadata["chunks"])
    for codec in metadata["codecs"]:
        if codec["name"] == "sharding_indexed":
            return list(codec["configuration"]["chunk_shape"])
    return list(metadata["chunk_grid"]["configuration"]["chunk_shape"])


def common_sharding(leaves: Sequence[Leaf]) -> str | None:
    """The sharding of an array made of others: theirs if it names no axis, else replicated."""
    text = leaves[0].sharding if leaves else None
    if text is None:
        return None
    return json.dumps({**json.loads(text), **_REPLICATED}) if "partition_spec" in text else text
