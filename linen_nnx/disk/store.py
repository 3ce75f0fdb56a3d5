"""One Orbax item on disk: its tree and its key-value store. Reads no array; imports no jax.

An item directory holds `_METADATA` (the tree), a store of zarr arrays named by their dotted key
path (one OCDBT database, or one directory per array), and side files keyed by those names.
"""

import base64
import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from linen_nnx.book.ops import Spec
from linen_nnx.book.reading import parse_json, read_json
from linen_nnx.disk import checked, ocdbt
from linen_nnx.disk.checked import StoreError

SEQUENCE, DICT = 1, 2
INDEX = "checkpoint"
"""The tree of an item that Orbax up to 0.4, or T5X, has written: see `legacy.py`."""
OF_THE_TREE = ("_METADATA", INDEX, "_sharding", "_strings.json")
"""The files that describe an item's tree: beside another tree they mislead Orbax."""
EMPTY_TYPES = ("None", "Dict", "List", "Tuple", "NamedTuple")
_REPLICATED = {"partition_spec": []}
_Read = TypeVar("_Read")
_INDEX = 1 << 31  # of a list: more elements than any tree has
_PROBLEMS = 10  # entries of one file whose faults a message shows
_CODES = {"bool": "|b1", "int8": "|i1", "uint8": "|u1"}  # what zarr2 calls numpy's own dtypes
_SIZES = {"int": (2, 4, 8), "uint": (2, 4, 8), "float": (2, 4, 8), "complex": (8, 16)}
_CODES |= {f"{k}{8 * n}": f"<{k[0]}{n}" for k, sizes in _SIZES.items() for n in sizes}
_NAMES = {code: name for name, code in _CODES.items()}


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
    loose: bool = False
    """Whether it lies in a file or an index: in no store whose entries could be named anew."""

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
        return 0 if self.zarr is None else math.prod(self.zarr["shape"]) * self.itemsize

    @property
    def itemsize(self) -> int:
        """Bytes of one element in memory."""
        assert self.zarr is not None
        return _itemsize(_dtype(self.zarr))


@cache  # a plan asks of each leaf several times, and there are few dtypes
def _itemsize(dtype: str) -> int:
    """Bytes in memory of one element of a dtype that `_dtype` names."""
    code = _CODES.get(dtype, dtype)
    # Such as `<f4`, or `bfloat16`; of int4 each takes a whole byte in memory.
    return int(code[2:]) if code[0] in "<>|" else -(-int(re.findall(r"\d+", dtype)[0]) // 8)


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
    inside: Mapping[str, Any] = field(default_factory=dict)
    """The loose leaves of an index, by the names that they would have in a store."""

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
    """Whether a directory is a pytree item of Orbax, of whatever age."""
    return (path / "_METADATA").is_file() or has_index(path)


def has_index(path: Path) -> bool:
    """Whether a directory has a tree in msgpack, as items had before `_METADATA`.

    TensorFlow calls a file of its own `checkpoint`, too: that one is text.
    """
    return begins_as_map(path / INDEX)


def begins_as_map(path: Path) -> bool:
    """Whether a file begins as a map in msgpack does, which no text and no pickle does."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        first = file.read(2)
    # A pickle begins with 0x80 and its protocol; in msgpack that is an empty map, which ends there.
    return len(first) == 2 and (0x81 <= first[0] <= 0x8F or first[0] in (0xDE, 0xDF))


class _Entry(NamedTuple):
    """A leaf as `_METADATA` has it."""

    name: str
    keys: tuple[Key, ...]
    value_type: str
    write_shape: tuple[int, ...] | None

    def is_unplaced(self, shardings: Mapping[str, str]) -> bool:
        """Whether it is an array of jax of which nothing says where it lay."""
        return self.value_type == "jax.Array" and self.name not in shardings


def read_item(path: Path, number: int = 0) -> Item:
    """Reads an item's tree. Raises `StoreError` for what is missing, damaged or ambiguous."""
    header, entries = _read_header(path / "_METADATA")
    sharding = read_shardings(path, [entry.name for entry in entries])
    strings = dict(_read_entries(path / "_strings.json", _string))
    arrays = _read_array_metadatas(path)
    manifest = (path / ocdbt.MANIFEST).is_file()
    if header.setdefault("use_ocdbt", manifest) and not manifest:
        raise StoreError(f"{path} has no manifest.ocdbt: the save was cut off, or files were lost")
    refuse_collisions(path, [entry.name for entry in entries])
    bare = (*EMPTY_TYPES, "string")
    held = [entry.name for entry in entries if entry.value_type not in bare]
    stored = read_tree(path) if header["use_ocdbt"] else None
    zarr = read_zarr(path, bool(header.get("use_zarr3")), held, stored)
    nothing = _Array(None, None)
    # Orbax 0.4 had no shardings of arrays on one device; that of today restores none without.
    unplaced = "np.ndarray" if has_index(path) else "jax.Array"
    leaves = tuple(
        Leaf(
            keys=entry.keys,
            value_type=unplaced if entry.is_unplaced(sharding) else entry.value_type,
            zarr=zarr.get(entry.name),
            extension=arrays.get(entry.name, nothing).extension,
            sharding=sharding.get(entry.name),
            write_shape=arrays.get(entry.name, entry).write_shape,
            string=strings.get(entry.name),
            item=number,
            stored=entry.name,
        )
        for entry in entries
    )
    return Item(path, leaves, header, stored)


def _read_header(path: Path) -> tuple[dict[str, Any], list[_Entry]]:
    """All of `_METADATA` but its tree, and the leaves of the tree."""
    try:
        header = checked.mapping(read_json(path))
        tree = checked.mapping(checked.field(header, "tree_metadata"))
        del header["tree_metadata"]
        for flag in ("use_ocdbt", "use_zarr3"):
            if not isinstance(header.get(flag), bool | None):
                found = checked.shown(header[flag])
                raise ValueError(f"`{flag}` is {found}, expected true or false")
        checked.plain(header)
    except (OSError, ValueError) as error:
        raise _refused(path, [str(error)]) from None
    return header, _each(path, tree, _leaf)


def _leaf(_: str, entry: Any) -> _Entry:
    keys = tuple([_key(key) for key in checked.sequence(checked.field(entry, "key_metadata"))])
    if not keys:
        raise ValueError("it has no key: the checkpoint is a bare array, not a tree of them")
    value = checked.field(entry, "value_metadata")
    kind = checked.text(checked.field(value, "value_type"))
    return _Entry(".".join([key[0] for key in keys]), keys, kind, _write_shape(value))


def _key(entry: Any) -> Key:
    key, kind = checked.field(entry, "key"), checked.field(entry, "key_type")
    if type(key) is int:
        key = str(checked.integer(key, 0, _INDEX))
    return _named_key(checked.text(key), checked.integer(kind, SEQUENCE, DICT))


@cache  # most keys of a tree recur
def _named_key(text: str, kind: int) -> Key:
    return make_key(checked.name(text), kind)


def _write_shape(entry: dict[str, Any]) -> tuple[int, ...] | None:
    sizes = entry.get("write_shape")
    return None if sizes is None else tuple(checked.shape(sizes))


def read_shardings(path: Path, names: Iterable[str]) -> dict[str, str]:
    """The sharding of each of the named leaves that has one, as text.

    Orbax writes the names in URL-safe base64, Orbax 0.4 as they are, and this library once wrote
    them in plain base64 (`+` and `/` for `-` and `_`). A name that is none of the item's leaves
    describes nothing.
    """
    known = set(names)
    found = {}
    for written, text in _read_entries(path / "_sharding", _string):
        name = next((name for name in _spellings(written) if name in known), None)
        if name is not None and text:  # 0.4 has an empty text where there is no sharding
            found[name] = text
    return found


def _spellings(written: str) -> Iterator[str]:
    """The names that an entry of `_sharding` may stand for."""
    for altchars in (b"-_", b"+/"):
        with contextlib.suppress(ValueError):  # not base64, or not of UTF-8
            yield base64.b64decode(written.encode(), altchars, validate=True).decode()
    yield written


def _string(name: str, text: Any) -> tuple[str, str]:
    return name, checked.text(text)


def _read_entries(path: Path, read: Callable[[str, Any], _Read]) -> list[_Read]:
    """What a side file says of each name; nothing if it is not there."""
    if not path.is_file():
        return []
    try:
        content = checked.mapping(read_json(path))
    except ValueError as error:
        raise _refused(path, [str(error)]) from None
    return _each(path, content, read)


def _each(path: Path, content: dict[str, Any], read: Callable[[str, Any], _Read]) -> list[_Read]:
    """Every entry of a mapping, read; raises `StoreError` that names each one with a fault."""
    found, problems = [], []
    for name, value in content.items():
        try:
            found.append(read(name, value))
        except ValueError as error:
            problems.append(f"{checked.shown(name)}: {error}")
    if problems:
        raise _refused(path, problems)
    return found


def _refused(path: Path, problems: Sequence[str]) -> StoreError:
    more = f"; and {len(problems) - _PROBLEMS} more" * (len(problems) > _PROBLEMS)
    what = "; ".join(problems[:_PROBLEMS]) + more
    return StoreError(f"{path.parent} cannot be read as an Orbax item: {path.name}: {what}")


class _Array(NamedTuple):
    """What `array_metadatas` says of an array."""

    write_shape: tuple[int, ...] | None
    extension: dict[str, Any] | None


def _read_array_metadatas(path: Path) -> dict[str, _Array]:
    found = {}
    for file in sorted((path / "array_metadatas").glob("process_*")):
        try:
            entries = checked.sequence(checked.field(read_json(file), "array_metadatas"))
        except ValueError as error:
            raise _refused(file, [str(error)]) from None
        numbered = {f"entry {number}": entry for number, entry in enumerate(entries)}
        found |= dict(_each(file, numbered, _array))
    return found


def _array(_: str, entry: Any) -> tuple[str, _Array]:
    array = checked.field(entry, "array_metadata")
    name = checked.text(checked.field(array, "param_name"))
    extension = array.get("ext_metadata")
    if extension is not None:
        # Of a typed PRNG key: nothing else is known to stand here.
        checked.text(checked.field(checked.plain(extension), "random_key_impl"))
    return name, _Array(_write_shape(array), extension)


def refuse_collisions(path: Path, names: Sequence[str]) -> None:
    """Orbax saves `{"a.b": x, "a": {"b": y}}` without error, and keeps one of the two."""
    twice = repeated(names)
    if twice:
        problems = (f"`{name}` names {n} leaves in the store" for name, n in twice)
        raise StoreError(f"{path} is ambiguous: {'; '.join(problems)}")


def repeated(names: Sequence[str]) -> list[tuple[str, int]]:
    """The names that occur more than once, and how often."""
    return [(name, n) for name, n in Counter(names).items() if n > 1]


def read_tree(path: Path) -> ocdbt.Tree:
    """The tree of an OCDBT store. Raises `StoreError` where it cannot be read."""
    try:
        return ocdbt.read(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: its OCDBT tree cannot be read: {error}") from None


def read_zarr(
    path: Path, zarr3: bool, names: list[str], tree: ocdbt.Tree | None
) -> dict[str, dict[str, Any]]:
    """The zarr metadata of every named array. Raises `StoreError` if the store lacks some."""
    key = metadata_name(zarr3)
    if tree is None:
        files = {name: path / name / key for name in names}
        found = {name: checked.read(file) for name, file in files.items() if file.is_file()}
    else:
        values = {name: tree[name][key] for name in names if key in tree.get(name, ())}
        found = {name: _fetch(path, value) for name, value in values.items()}
    if missing := [name for name in names if name not in found]:
        shown = ", ".join(f"`{name}`" for name in missing[:10])
        raise StoreError(f"{path} lacks {len(missing)} of its arrays in the store: {shown}")
    # Most are equal, and each is parsed once.
    examples = {value: name for name, value in found.items()}
    problems, parsed = [], {}
    for value, name in examples.items():
        try:
            parsed[value] = checked.array_metadata(value, zarr3)
        except ValueError as error:
            problems.append(f"`{name}`: {error}")
    if problems:
        more = f"; and {len(problems) - _PROBLEMS} more" * (len(problems) > _PROBLEMS)
        what = "; ".join(problems[:_PROBLEMS]) + more
        raise StoreError(f"{path}: the arrays' {key} cannot be read: {what}")
    return {name: parsed[value] for name, value in found.items()}


def _fetch(path: Path, value: ocdbt.Value) -> bytes:
    try:
        return ocdbt.fetch(path, value, checked.METADATA_LIMIT)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: the metadata of an array cannot be read: {error}") from None


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
        base64.urlsafe_b64encode(leaf.name.encode()).decode(): leaf.sharding
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
    if "partition_spec" not in text:
        return text
    try:
        content = checked.mapping(checked.plain(parse_json(text)))
    except ValueError as error:
        what = f"the sharding of `{leaves[0].path}` cannot be read"
        raise StoreError(f"{what}: {error}") from None
    return json.dumps({**content, **_REPLICATED})
