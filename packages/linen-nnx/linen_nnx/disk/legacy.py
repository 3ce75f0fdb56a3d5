"""Items without `_METADATA`: those of Orbax up to 0.4, and of T5X.

Their tree is a msgpack file `checkpoint`, the index, which says of each array where it lies:

    {"params": {"kernel": "PLACEHOLDER://params.kernel"}, "step": 7}      Orbax
    {"version": 3, "optimizer": {"target": {"kernel": {"driver": "zarr", "kvstore":
      {"driver": "file", "path": "target.kernel"}, ...}}, "state": {...}}}    T5X

An array is a zarr directory of that name, or lies in an OCDBT database under it. Small leaves may
stand in the index itself. Nothing but the index differs from later items: the arrays are read, and
named anew, like theirs.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from linen_nnx.disk import msgpack_tree, ocdbt
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.item import (
    INDEX,
    Item,
    read_shardings,
    read_tree,
    read_zarr,
    refuse_collisions,
)
from linen_nnx.disk.leaves import DICT, SEQUENCE, Keys, Leaf, make_key, name_of
from linen_nnx.disk.loose import make_leaf, read_value, refuse_unknown

_PLACEHOLDER = "PLACEHOLDER://"
_T5X_TARGET = "target"


class Reference(NamedTuple):
    """The name under which the store has an array."""

    name: str


class Index(NamedTuple):
    """The tree of an index: each leaf, and who wrote it."""

    leaves: dict[Keys, Any]
    """By key path: a `Reference`, or the value itself, as `msgpack_tree.read` gives it."""
    writer: str
    left_out: tuple[str, ...] = ()
    """The branches that only its writer can use."""

    @property
    def arrays_inside(self) -> bool:
        """Whether every array stands in the index itself, as in an aggregate file of Orbax."""
        return not any(isinstance(value, Reference) for value in self.leaves.values())


def read_index(folder: Path) -> Index:
    """The index of a folder. Raises `StoreError` where it is damaged."""
    tree = msgpack_tree.read(folder / INDEX)
    if not isinstance(tree, (dict, list)) or not tree:
        raise StoreError(f"{folder / INDEX} holds no tree")
    # Both, as a model of one's own may have a submodule `optimizer`.
    if isinstance(tree, dict) and isinstance(tree.get("optimizer"), dict) and "version" in tree:
        return _t5x(folder, tree)
    return Index(dict(_walk(tree, ())), "Orbax 0.2 to 0.4")


def _t5x(folder: Path, tree: dict[str, Any]) -> Index:
    """The parameters of a T5X checkpoint: its optimizer's states have a form of their own."""
    optimizer = tree["optimizer"]
    if not isinstance(optimizer.get(_T5X_TARGET), dict):
        raise StoreError(f"{folder / INDEX} is of T5X, but has no `optimizer/{_T5X_TARGET}`")
    # T5X has the parameters without the level `params`, and the other collections with theirs.
    leaves = dict(_walk(optimizer[_T5X_TARGET], (make_key("params", DICT),)))
    left = [f"optimizer/{name}" for name in optimizer if name != _T5X_TARGET]
    for name, branch in tree.items():
        if name == "flax_mutables" and isinstance(branch, dict):
            leaves |= dict(_walk(branch, ()))  # collections such as `batch_stats`
        elif name not in ("version", "optimizer"):
            left.append(name)
    return Index(leaves, "T5X", tuple(left))


def _walk(tree: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    """The leaves of an index; an empty dict or list is one, too.

    Example:
      >>> tree = {"kernel": "PLACEHOLDER://params.kernel", "step": 7}
      >>> [(keys[-1].name, value) for keys, value in _walk(tree, ())]
      [('kernel', Reference(name='params.kernel')), ('step', 7)]
    """
    # Before the dicts, as the spec of an array is one, too.
    name = _spec_name(tree)
    if name is not None:
        yield keys, Reference(name)
    elif isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _walk(value, (*keys, make_key(key, DICT)))
    elif isinstance(tree, list) and tree:
        for number, value in enumerate(tree):
            yield from _walk(value, (*keys, make_key(str(number), SEQUENCE)))
    elif isinstance(tree, str) and tree.startswith(_PLACEHOLDER):
        yield keys, Reference(tree.removeprefix(_PLACEHOLDER))
    else:
        yield keys, tree


def _spec_name(tree: Any) -> str | None:
    """The directory that a spec of tensorstore names, which T5X writes in place of an array."""
    # A spec that casts has the spec of the stored array in `base`.
    while isinstance(tree, dict) and isinstance(tree.get("base"), dict):
        tree = tree["base"]
    if not isinstance(tree, dict) or not isinstance(tree.get("kvstore"), dict):
        return None
    path = tree["kvstore"].get("path")
    # The path leads from the root of the writer's disk or bucket: the last element is the array's.
    return path.rstrip("/").rpartition("/")[2] if isinstance(path, str) else None


def read_index_item(folder: Path, number: int = 0) -> Item:
    """Reads the tree of an item that has an index. Raises `StoreError` for what is damaged."""
    index = read_index(folder)
    refuse_collisions(folder, list(map(name_of, index.leaves)))
    refuse_unknown(folder / INDEX, index.leaves)
    in_tree = (folder / ocdbt.MANIFEST).is_file()
    tree = read_tree(folder) if in_tree else None
    names = [value.name for value in index.leaves.values() if isinstance(value, Reference)]
    _refuse_outside(folder, names)
    zarr = read_zarr(folder, False, names, tree)
    shardings = read_shardings(folder, names)
    inside: dict[str, Any] = {}
    leaves = []
    for keys, value in index.leaves.items():
        if isinstance(value, Reference):
            leaf = _stored_leaf(keys, value.name, zarr[value.name], shardings.get(value.name))
        else:
            leaf = make_leaf(keys, value)
            inside[leaf.stored] = value
        leaves.append(leaf._replace(item=number))
    header = {
        "use_ocdbt": in_tree,
        "use_zarr3": False,
        # These writers left chunks of zeros out, which Orbax takes for damage unless it is told.
        "store_array_data_equal_to_fill_value": False,
        "custom_metadata": None,
    }
    return Item(folder, tuple(leaves), header, tree, inside)


def _refuse_outside(folder: Path, names: list[str]) -> None:
    """Raises `StoreError` for names that would lead out of the folder, or stand for it."""
    if odd := [name for name in names if "/" in name or name in ("", ".", "..")]:
        raise StoreError(f"{folder / INDEX} has names that are none of arrays in its folder: {odd}")


def _stored_leaf(keys: Keys, name: str, zarr: dict[str, Any], sharding: str | None) -> Leaf:
    """A leaf in the store, under the type that Orbax would give it today."""
    value_type = "np.ndarray" if sharding is None else "jax.Array"
    # A number of Python was saved as 64 bits; arrays of jax have them only if that was asked for.
    if zarr["shape"] == [] and zarr["dtype"] in ("<i8", "<f8"):
        value_type = "scalar"
    return Leaf(keys, value_type, zarr=zarr, sharding=sharding, stored=name)


class IndexReader:
    """Reads from items with an index: leaves of the store, and those in the index itself."""

    def __init__(self, items: Sequence[Item]) -> None:
        from linen_nnx.disk.stream import ItemReader  # needs tensorstore

        self._items = items
        self._store = ItemReader(items)

    def read(self, leaves: Sequence[Leaf]) -> list[Any]:
        """The arrays of some leaves. Raises `ValueError` for bytes that cannot be decoded."""
        # All of the store in one call, which reads them side by side.
        stored = iter(self._store.read([leaf for leaf in leaves if not leaf.loose]))
        arrays = []
        for leaf in leaves:
            if leaf.loose:
                arrays.append(read_value(self._items[leaf.item].inside[leaf.stored]))
            else:
                arrays.append(next(stored))
        return arrays
