"""Leaves that lie in files and not in a store, under the types that Orbax has for them.

A tree of msgpack holds arrays, numbers, strings, None, and empty dicts and lists. Orbax saves all
of these, and calls them `np.ndarray`, `scalar`, `string`, `None`, `Dict` and `List`. So a leaf of a
file gets the metadata that Orbax would give it, and the rest of the library sees no difference:

    >>> keys = (make_key("step", DICT),)
    >>> [make_leaf(keys, value).value_type for value in (7, "adam", None, {})]
    ['scalar', 'string', 'None', 'Dict']
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from linen_nnx.book.specs import Spec
from linen_nnx.disk import checked
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.flat_files import NpzArray
from linen_nnx.disk.leaves import DICT, SEQUENCE, Keys, Leaf, make_key, path_of
from linen_nnx.disk.ranges import Array, FileArray
from linen_nnx.disk.zarr_metadata import fresh_metadata

# Flax, before Orbax, wrote arrays of several processes beside the file, and this text in it.
_GDA_PLACEHOLDER = "//GDAPlaceholder:"
_SHOWN = 10  # problems in one message


def walk(tree: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """The leaves of a tree by key path; an empty dict or list is one, too.

    Example:
      >>> [(path_of(keys), value) for keys, value in walk({"a": [1, {}]})]
      [('a/0', 1), ('a/1', {})]
    """
    if isinstance(tree, dict) and tree:
        for name, value in tree.items():
            yield from walk(value, (*keys, make_key(name, DICT)))
    elif isinstance(tree, list) and tree:
        for number, value in enumerate(tree):
            yield from walk(value, (*keys, make_key(str(number), SEQUENCE)))
    else:
        yield keys, tree


def make_leaf(keys: Keys, value: Any) -> Leaf:
    """The leaf that a value is."""
    stored = path_of(keys)
    if isinstance(value, FileArray | NpzArray):
        metadata = fresh_metadata(Spec(value.shape, value.dtype.name), zarr3=False)
        return Leaf(keys, "np.ndarray", zarr=metadata, stored=stored, loose=True)
    if isinstance(value, str):
        return Leaf(keys, "string", string=value, stored=stored, loose=True)
    if value is None or isinstance(value, (dict, list)):
        return Leaf(keys, kind(value), stored=stored, loose=True)
    metadata = fresh_metadata(Spec((), _number_dtype(value)), zarr3=False)
    # Orbax calls int, float and bool a `scalar`.
    value_type = "np.ndarray" if isinstance(value, complex) else "scalar"
    return Leaf(keys, value_type, zarr=metadata, stored=stored, loose=True)


def read_value(value: Any) -> Array:
    """The array of a leaf, or its number as an array without axes."""
    if isinstance(value, FileArray | NpzArray):
        return value.read()
    return np.asarray(value, _number_dtype(value))


def kind(value: Any) -> str:
    """The type that Orbax has for an empty node; for other values, the name of Python's own."""
    names = {dict: "Dict", list: "List", type(None): "None"}
    return names.get(type(value), type(value).__name__)


def _number_dtype(value: Any) -> str:
    """The dtype that Orbax gives a number of Python."""
    # Before the others, as a bool of Python is an int, too.
    if isinstance(value, bool):
        return "bool"
    return {int: "int64", float: "float64", complex: "complex128"}[type(value)]


def refuse_unknown(path: Path, leaves: Mapping[Keys, Any]) -> None:
    """Raises `StoreError` for values that no leaf can be, all in one message."""
    problems = []
    for keys, value in leaves.items():
        shown = path_of(keys)
        problems += _odd_keys(shown, keys)
        if isinstance(value, str) and value.startswith(_GDA_PLACEHOLDER):
            problems.append(
                f"`{shown}` lies in the folder {path.name}_gda, as several processes wrote it: "
                "restore it with flax.training.checkpoints, and save it with Orbax"
            )
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            problems.append(f"`{shown}` is {value}, which no int64 holds")
    if problems:
        raise StoreError(f"{path} cannot be read: {listed(problems)}")


def _odd_keys(shown: str, keys: Keys) -> list[str]:
    """The keys that no path can express."""
    problems = []
    for key in keys:
        try:
            checked.name(key.name)
        except ValueError as error:
            problems.append(f"`{shown}`: {error}")
    return problems


def listed(problems: list[str]) -> str:
    """Problems in one text, the first of many."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return "; ".join(problems[:_SHOWN]) + more
