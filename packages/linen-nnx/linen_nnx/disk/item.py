"""One Orbax item on disk: its tree and its key-value store. Reads no array; imports no jax.

An item directory holds `_METADATA` (the tree), a store of zarr arrays named by their dotted key
path (one OCDBT database, or one directory per array), and side files keyed by those names:

    state/
      _METADATA               the tree: keys and type of each leaf
      manifest.ocdbt  d/      the arrays, in a database; or a directory `params.kernel/` for each
      _sharding               how each array lay on the devices
      array_metadatas/        shapes as written, and the kind of typed PRNG keys
      _strings.json           the leaves that are strings

Everything that a person may have damaged is named in one `StoreError`: the file, the entry, and the
fault of each entry. `side_files.py` writes what is read here.
"""

import base64
import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from linen_nnx.book.reading import read_json, read_range
from linen_nnx.disk import checked, ocdbt
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.leaves import (
    DICT,
    EMPTY_TYPES,
    SEQUENCE,
    Key,
    Keys,
    Leaf,
    make_key,
    name_of,
    repeated,
)
from linen_nnx.disk.zarr_metadata import metadata_name
from linen_nnx.errors import quoted

INDEX = "checkpoint"
"""The tree of an item that Orbax up to 0.4, or T5X, has written: see `legacy.py`."""
OF_THE_TREE = ("_METADATA", INDEX, "_sharding", "_strings.json")
"""The files that describe an item's tree: beside another tree they mislead Orbax."""
_Read = TypeVar("_Read")
_LONGEST_LIST = 1 << 31  # elements, which is more than any tree has
_PROBLEMS = 10  # entries of one file whose faults a message shows


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
        files = set()
        for name in names:
            for value in tree.get(name, {}).values():
                # A short value stands in the tree itself, and lies in no data file.
                if isinstance(value, ocdbt.Ref):
                    files.add(value.file)
        return [self.path / file for file in sorted(files)]


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
    try:
        first, _ = read_range(path, 0, 2)
    except ValueError:  # it is shorter
        return False
    # A pickle begins with 0x80 and its protocol; in msgpack that is an empty map, which ends there.
    # A map of 1 to 15 entries begins with 0x81 to 0x8f, a longer one with 0xde or 0xdf.
    return 0x81 <= first <= 0x8F or first in (0xDE, 0xDF)


class _Entry(NamedTuple):
    """A leaf as `_METADATA` has it."""

    name: str
    keys: Keys
    value_type: str
    write_shape: tuple[int, ...] | None

    @property
    def is_stored(self) -> bool:
        """Whether the store has an array of this name."""
        return self.value_type not in EMPTY_TYPES and self.value_type != "string"


def read_item(path: Path, number: int = 0) -> Item:
    """Reads an item's tree.

    Args:
      path: the item's directory.
      number: which item of its step it is, where several make up one state.

    Raises:
      StoreError: for what is missing, damaged or ambiguous.

    Example:
      >>> import json, tempfile
      >>> from linen_nnx.book.specs import Spec
      >>> from linen_nnx.disk import ocdbt_writing, side_files
      >>> from linen_nnx.disk.leaves import dict_keys
      >>> from linen_nnx.disk.zarr_metadata import fresh_metadata
      >>> folder = Path(tempfile.mkdtemp())
      >>> zarr = fresh_metadata(Spec((3,), "float32"), zarr3=False)
      >>> bias = Leaf(dict_keys("params", "bias"), "jax.Array", zarr)
      >>> side_files.write_side_files(folder, [bias], {"use_ocdbt": True})
      >>> entries = {".zarray": json.dumps(zarr).encode()}
      >>> ocdbt_writing.write(folder, {"params.bias": entries})
      >>> (leaf,) = read_item(folder).leaves
      >>> print(leaf.path, leaf.spec)
      params/bias float32[3]
    """
    header, entries = _read_header(path / "_METADATA")
    names = [entry.name for entry in entries]
    shardings = read_shardings(path, names)
    strings = dict(_read_entries(path / "_strings.json", _string))
    array_notes = _read_array_metadatas(path)
    has_manifest = (path / ocdbt.MANIFEST).is_file()
    # Orbax 0.4 does not say in `_METADATA` which kind of store it wrote.
    if header.setdefault("use_ocdbt", has_manifest) and not has_manifest:
        raise StoreError(f"{path} has no manifest.ocdbt: the save was cut off, or files were lost")
    refuse_collisions(path, names)
    stored = [entry.name for entry in entries if entry.is_stored]
    tree = read_tree(path) if header["use_ocdbt"] else None
    zarr = read_zarr(path, bool(header.get("use_zarr3")), stored, tree)
    # Orbax 0.4 (which writes an index, too) had no shardings of arrays on one device. That of
    # today restores no `jax.Array` without one.
    unplaced = "np.ndarray" if has_index(path) else "jax.Array"
    leaves = []
    for entry in entries:
        name, note = entry.name, array_notes.get(entry.name)
        sharding = shardings.get(name)
        is_unplaced = entry.value_type == "jax.Array" and sharding is None
        leaf = Leaf(
            keys=entry.keys,
            value_type=unplaced if is_unplaced else entry.value_type,
            zarr=zarr.get(name),
            extension=note.extension if note else None,
            sharding=sharding,
            write_shape=note.write_shape if note else entry.write_shape,
            string=strings.get(name),
            item=number,
            stored=name,
        )
        leaves.append(leaf)
    return Item(path, tuple(leaves), header, tree)


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
        # The rest is handed on to the result as it is.
        checked.plain(header)
    except (OSError, ValueError) as error:
        raise _refused(path, [str(error)]) from None
    return header, _each(path, tree, _leaf)


def _leaf(_: str, entry: Any) -> _Entry:
    """One entry of `tree_metadata`, whose name is passed over: the keys say the same, and more."""
    keys = tuple(map(_key, checked.sequence(checked.field(entry, "key_metadata"))))
    if not keys:
        raise ValueError("it has no key: the checkpoint is a bare array, not a tree of them")
    value = checked.field(entry, "value_metadata")
    value_type = checked.text(checked.field(value, "value_type"))
    return _Entry(name_of(keys), keys, value_type, _write_shape(value))


def _key(entry: Any) -> Key:
    key, kind = checked.field(entry, "key"), checked.field(entry, "key_type")
    if type(key) is int:
        key = str(checked.integer(key, 0, _LONGEST_LIST))
    return _named_key(checked.text(key), checked.integer(kind, SEQUENCE, DICT))


@cache  # most keys of a tree recur, and each is checked once
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
        for name in _spellings(written):
            if name in known:
                # Orbax 0.4 has an empty text where there is no sharding.
                if text:
                    found[name] = text
                break
    return found


def _spellings(written: str) -> Iterator[str]:
    """The names that an entry of `_sharding` may stand for.

    Base64 comes first: `bias` is itself valid base64, of three bytes that are no UTF-8.
    """
    for altchars in (b"-_", b"+/"):
        # A `ValueError` says that it is not base64, or not of UTF-8.
        with contextlib.suppress(ValueError):
            yield base64.b64decode(written.encode(), altchars, validate=True).decode()
    yield written


def _string(name: str, text: Any) -> tuple[str, str]:
    return name, checked.text(text)


def _read_entries(path: Path, read: Callable[[str, Any], _Read]) -> list[_Read]:
    """Every entry of a side file, read by `read`; no entry if the file is not there."""
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
    what = _first_of(problems)
    return StoreError(f"{path.parent} cannot be read as an Orbax item: {path.name}: {what}")


def _first_of(problems: Sequence[str]) -> str:
    """The first problems of a file in one text, and how many more there are."""
    text = "; ".join(problems[:_PROBLEMS])
    left = len(problems) - _PROBLEMS
    return f"{text}; and {left} more" if left > 0 else text


class _ArrayNote(NamedTuple):
    """The entry of an array in `array_metadatas`."""

    write_shape: tuple[int, ...] | None
    extension: dict[str, Any] | None


def _read_array_metadatas(path: Path) -> dict[str, _ArrayNote]:
    found = {}
    # Each process wrote a file, and a later one overrides an earlier one.
    for file in sorted((path / "array_metadatas").glob("process_*")):
        try:
            entries = checked.sequence(checked.field(read_json(file), "array_metadatas"))
        except ValueError as error:
            raise _refused(file, [str(error)]) from None
        # Entries of a list have no names, so messages call them by number.
        numbered = {f"entry {number}": entry for number, entry in enumerate(entries)}
        found |= dict(_each(file, numbered, _array_note))
    return found


def _array_note(_: str, entry: Any) -> tuple[str, _ArrayNote]:
    array = checked.field(entry, "array_metadata")
    name = checked.text(checked.field(array, "param_name"))
    extension = array.get("ext_metadata")
    if extension is not None:
        # Of a typed PRNG key: nothing else is known to stand here.
        checked.text(checked.field(checked.plain(extension), "random_key_impl"))
    return name, _ArrayNote(_write_shape(array), extension)


def refuse_collisions(path: Path, names: Sequence[str]) -> None:
    """Raises `StoreError` where two leaves of a tree have one name in its store.

    Orbax saves `{"a.b": x, "a": {"b": y}}` without error, and keeps one of the two.
    """
    if twice := repeated(names):
        problems = [f"`{name}` names {count} leaves in the store" for name, count in twice]
        raise StoreError(f"{path} is ambiguous: {'; '.join(problems)}")


def read_tree(path: Path) -> ocdbt.Tree:
    """The tree of an OCDBT store. Raises `StoreError` where it cannot be read."""
    try:
        return ocdbt.read(path)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: its OCDBT tree cannot be read: {error}") from None


def read_zarr(
    path: Path, zarr3: bool, names: list[str], tree: ocdbt.Tree | None
) -> dict[str, dict[str, Any]]:
    """The zarr metadata of every named array.

    Args:
      path: the item's directory.
      zarr3: whether the store is in zarr3, else in zarr2.
      names: the arrays' names in the store.
      tree: the tree of an OCDBT store; None where each array has a directory.

    Raises:
      StoreError: if the store lacks some of them, or some cannot be read.
    """
    key = metadata_name(zarr3)
    contents = _zarr_contents(path, key, names, tree)
    if missing := [name for name in names if name not in contents]:
        shown = quoted(missing[:10])
        raise StoreError(f"{path} lacks {len(missing)} of its arrays in the store: {shown}")
    # Arrays of one shape have equal metadata, so each text is parsed once. A message names the
    # last array that has it.
    examples = {content: name for name, content in contents.items()}
    problems, parsed = [], {}
    for content, name in examples.items():
        try:
            parsed[content] = checked.array_metadata(content, zarr3)
        except ValueError as error:
            problems.append(f"`{name}`: {error}")
    if problems:
        raise StoreError(f"{path}: the arrays' {key} cannot be read: {_first_of(problems)}")
    return {name: parsed[content] for name, content in contents.items()}


def _zarr_contents(
    path: Path, key: str, names: Iterable[str], tree: ocdbt.Tree | None
) -> dict[str, bytes]:
    """The bytes of the metadata of each named array that the store has."""
    if tree is None:
        there = {}
        for name in names:
            file = path / name / key
            if file.is_file():
                there[name] = file
        return dict(zip(there, checked.read_all(list(there.values())), strict=True))
    contents = {}
    for name in names:
        if key in tree.get(name, ()):
            contents[name] = _fetch(path, tree[name][key])
    return contents


def _fetch(path: Path, value: ocdbt.Value) -> bytes:
    try:
        return ocdbt.fetch(path, value, checked.METADATA_LIMIT)
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: the metadata of an array cannot be read: {error}") from None
