"""One Orbax item on disk: its tree and its key-value store. Reads no array; imports no jax.

An item directory holds `_METADATA` (the tree), a store of zarr arrays named by their dotted key
path (one OCDBT database, or one directory per array), and side files keyed by those names.
"""

import base64
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from linen_nnx.book.ops import Spec
from linen_nnx.disk import ocdbt
from linen_nnx.errors import Refusal

SEQUENCE, DICT = 1, 2
EMPTY_TYPES = ("None", "Dict", "List", "Tuple", "NamedTuple")
_REPLICATED = {"partition_spec": []}
_CODES = {"bool": "|b1", "int8": "|i1", "uint8": "|u1"}  # what zarr2 calls numpy's own dtypes
_SIZES = {"int": (2, 4, 8), "uint": (2, 4, 8), "float": (2, 4, 8), "complex": (8, 16)}
_CODES |= {f"{k}{8 * n}": f"<{k[0]}{n}" for k, sizes in _SIZES.items() for n in sizes}
_NAMES = {code: name for name, code in _CODES.items()}


class StoreError(Refusal):
    """A directory that is no readable Orbax item, with what was seen."""


class Key(NamedTuple):
    """One step of a key path; `kind` is `DICT` or `SEQUENCE`."""

    name: str
    kind: int


make_key = cache(Key)  # most keys of a tree recur


class Leaf(NamedTuple):
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
    def form(self) -> tuple[str, tuple[int, ...], str]:
        """What a tree's metadata say of it: path, the kinds of its keys, type."""
        names, kinds = zip(*self.keys, strict=True)
        return "/".join(names), kinds, self.value_type

    @property
    def empty(self) -> bool:
        return self.value_type in EMPTY_TYPES

    def at(self, keys: tuple[Key, ...]) -> "Leaf":
        """The same leaf under another key path."""
        return Leaf(keys, *self[1:])

    @property
    def spec(self) -> Spec:
        """Shape and dtype; those of a typed PRNG key are its own, not its raw words'."""
        assert self.zarr is not None
        shape, dtype = tuple(self.zarr["shape"]), _dtype(self.zarr)
        if self.extension:
            return Spec(shape[:-1], f"key<{self.extension['random_key_impl']}>")
        return Spec(shape, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        if self.zarr is None:
            return 0
        dtype = _dtype(self.zarr)
        code = _CODES.get(dtype, dtype)
        # Such as `<f4`, or `bfloat16`; of int4 each takes a whole byte in memory.
        size = int(code[2:]) if code[0] in "<>|" else -(-int(re.findall(r"\d+", dtype)[0]) // 8)
        return math.prod(self.zarr["shape"]) * size


def _dtype(metadata: dict[str, Any]) -> str:
    """The name of the dtype that zarr2 or zarr3 metadata states."""
    if metadata["zarr_format"] == 3:
        return metadata["data_type"]
    return _NAMES.get(metadata["dtype"], metadata["dtype"])


def fresh_metadata(spec: Spec, zarr3: bool) -> dict[str, Any]:
    """The zarr metadata that Orbax gives a new array of one chunk."""
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
    """The key of an array's metadata, below its name."""
    return "zarr.json" if zarr3 else ".zarray"


@dataclass(frozen=True)
class Item:
    """An open item: `leaves` in the order of `_METADATA`, whose other fields are `header`."""

    path: Path
    leaves: tuple[Leaf, ...]
    header: dict[str, Any]
    tree: ocdbt.Tree | None
    """Of an OCDBT store, its tree."""

    @property
    def ocdbt(self) -> bool:
        return bool(self.header["use_ocdbt"])

    @property
    def zarr3(self) -> bool:
        return bool(self.header.get("use_zarr3"))

    def data_files(self, names: Collection[str]) -> list[Path]:
        """The files of an OCDBT store that hold bytes of the named arrays."""
        tree = self.tree or {}
        values = (value for name in names for value in tree.get(name, {}).values())
        places = {value.file for value in values if isinstance(value, ocdbt.Ref)}
        return [self.path / place for place in sorted(places)]


def is_item(path: Path) -> bool:
    """Whether a directory is a pytree item of Orbax."""
    return (path / "_METADATA").is_file()


def read_item(path: Path, number: int = 0) -> Item:
    """Reads an item's tree. Raises `StoreError` for what is missing, damaged or ambiguous."""
    try:
        header = json.loads((path / "_METADATA").read_text())
        tree = header.pop("tree_metadata")
        entries = []
        for entry in tree.values():
            keys = tuple([make_key(str(k["key"]), k["key_type"]) for k in entry["key_metadata"]])
            entries.append((".".join([key[0] for key in keys]), keys, entry["value_metadata"]))
        shardings = _read_json(path / "_sharding").items()
        sharding = {base64.b64decode(name).decode(): text for name, text in shardings}
        arrays = _read_array_metadatas(path)
        strings = _read_json(path / "_strings.json")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        missing = isinstance(error, KeyError)  # whose text is the key alone
        what = f"its side files lack {error}: damaged, or not by Orbax" if missing else str(error)
        raise StoreError(f"{path} cannot be read as an Orbax item: {what}") from None
    manifest = (path / ocdbt.MANIFEST).is_file()
    if header.setdefault("use_ocdbt", manifest) and not manifest:
        raise StoreError(f"{path} has no manifest.ocdbt: the save was cut off, or files were lost")
    _refuse_collisions(path, entries)
    bare = (*EMPTY_TYPES, "string")
    held = [name for name, _, value in entries if value["value_type"] not in bare]
    stored = _read_tree(path) if header["use_ocdbt"] else None
    zarr = _read_zarr(path, bool(header.get("use_zarr3")), held, stored)
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
        for name, keys, value in entries
    )
    return Item(path, leaves, header, stored)


def _tuple(shape: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if shape is None else tuple(shape)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _read_array_metadatas(path: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for file in sorted((path / "array_metadatas").glob("process_*")):
        for entry in json.loads(file.read_text())["array_metadatas"]:
            array = entry["array_metadata"]
            found[array["param_name"]] = array
    return found


def _refuse_collisions(path: Path, entries: Sequence[tuple[str, tuple[Key, ...], Any]]) -> None:
    """Orbax saves `{"a.b": x, "a": {"b": y}}` without error, and keeps one of the two."""
    names = [name for name, _, _ in entries]
    problems = [f"`{name}` names {n} leaves in the store" for name, n in repeated(names)]
    keys = {key.name for _, keys, _ in entries for key in keys}
    problems += [f"key `{key}` holds a `/`" for key in sorted(keys) if "/" in key]
    if problems:
        raise StoreError(f"{path} is ambiguous: {'; '.join(problems)}")


def repeated(names: Sequence[str]) -> list[tuple[str, int]]:
    """The names that occur more than once, and how often."""
    return [(name, n) for name, n in Counter(names).items() if n > 1]


def _read_tree(path: Path) -> ocdbt.Tree:
    try:
        return ocdbt.read(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: its OCDBT tree cannot be read: {error}") from None


def _read_zarr(
    path: Path, zarr3: bool, names: list[str], tree: ocdbt.Tree | None
) -> dict[str, dict[str, Any]]:
    """The zarr metadata of every array."""
    key = metadata_name(zarr3)
    if tree is None:
        files = {name: path / name / key for name in names}
        found = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    else:
        values = {name: tree[name][key] for name in names if key in tree.get(name, ())}
        found = {name: ocdbt.fetch(path, value) for name, value in values.items()}
    if missing := [name for name in names if name not in found]:
        shown = ", ".join(f"`{name}`" for name in missing[:10])
        raise StoreError(f"{path} lacks {len(missing)} of its arrays in the store: {shown}")
    parsed = {value: json.loads(value) for value in set(found.values())}  # most are equal
    return {name: parsed[value] for name, value in found.items()}


def write_side_files(path: Path, leaves: Sequence[Leaf], header: dict[str, Any]) -> None:
    """Writes `_METADATA` and the other files keyed by name, for leaves whose data is in place."""
    # Pieces of JSON that recur are made once: trees of thousands of leaves have few keys.
    quoted = json.encoder.encode_basestring_ascii  # what `json.dumps` comes to for a string
    key_json = cache(lambda key: f'{{"key": {quoted(key.name)}, "key_type": {key.kind}}}')
    values: dict[tuple[str, Any], str] = {}
    tree = []
    for leaf in leaves:
        kind = leaf.value_type, leaf.write_shape
        if kind not in values:
            shape = {} if leaf.write_shape is None else {"write_shape": leaf.write_shape}
            base = {"value_type": leaf.value_type, "skip_deserialize": leaf.empty}
            values[kind] = json.dumps(base | shape)
        names = quoted(str(tuple([key[0] for key in leaf.keys])))
        entry = f'"key_metadata": [{", ".join(map(key_json, leaf.keys))}]'
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
                "chunk_shape": chunk_shapes(leaf.zarr)[-1],
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


def chunk_shapes(metadata: dict[str, Any]) -> list[list[int]]:
    """The shape of the stored chunks and, of a zarr3 shard, of the chunks in it."""
    if metadata["zarr_format"] == 2:
        return [list(metadata["chunks"])]
    return [list(part["chunk_shape"]) for part in chunked_parts(metadata)]


def chunked_parts(metadata: dict[str, Any]) -> list[dict[str, Any]]:
    """What in zarr3 metadata has a `chunk_shape`, the whole array first."""
    shards = [codec for codec in metadata["codecs"] if codec["name"] == "sharding_indexed"]
    return [part["configuration"] for part in (metadata["chunk_grid"], *shards)]


def common_sharding(leaves: Sequence[Leaf]) -> str | None:
    """The sharding of an array made of others: theirs if it names no axis, else replicated."""
    text = leaves[0].sharding if leaves else None
    if text is None:
        return None
    return json.dumps({**json.loads(text), **_REPLICATED}) if "partition_spec" in text else text
