"""A leaf of a checkpoint's tree: its keys, its type, its metadata, and where its bytes are named.

The tree `{"params": {"kernel": x, "scales": [y]}}` has two leaves:

    keys (params DICT) (kernel DICT)                   path params/kernel     name params.kernel
    keys (params DICT) (scales DICT) (0 SEQUENCE)      path params/scales/0   name params.scales.0

The path is how this library and its rule books write a leaf. The name is how a store does. Both
lose which keys were list indices, so the keys are kept as well.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from linen_nnx.book.reading import parse_json
from linen_nnx.book.specs import Spec
from linen_nnx.disk import checked, zarr_metadata
from linen_nnx.disk.checked import StoreError

SEQUENCE, DICT = 1, 2
"""The kinds of keys, by the numbers that Orbax writes for them in `_METADATA`."""
EMPTY_TYPES = ("None", "Dict", "List", "Tuple", "NamedTuple")
"""The types that Orbax has for a node without leaves."""
_REPLICATED = {"partition_spec": []}


class Key(NamedTuple):
    """One element of a key path; `kind` is `DICT` or `SEQUENCE`."""

    name: str
    kind: int


Keys = tuple[Key, ...]
"""A key path: the keys from the root of a tree to a leaf."""

# Most keys of a tree recur in every layer, so each is made once.
make_key = cache(Key)


def dict_keys(*names: str) -> Keys:
    """The keys of nested dicts.

    Example:
      >>> dict_keys("params", "kernel")
      (Key(name='params', kind=2), Key(name='kernel', kind=2))
    """
    return tuple([make_key(name, DICT) for name in names])


# In these two, `join` of a list takes half the time of `join` of a generator. A plan asks for them
# several times for each leaf.
def path_of(keys: Sequence[Key]) -> str:
    """A key path as this library and its rule books write it: `params/kernel`."""
    return "/".join([key[0] for key in keys])


def name_of(keys: Sequence[Key]) -> str:
    """A key path as a store writes it: `params.kernel`."""
    return ".".join([key[0] for key in keys])


class ChunkRef(NamedTuple):
    """One stored chunk: the item and the array that it lies in, and its key there."""

    item: int
    array: str
    key: str


class Leaf(NamedTuple):
    """One entry of the tree: an array, a string, or an empty node.

    Example:
      >>> leaf = Leaf((Key("params", DICT), Key("kernel", DICT)), "jax.Array")
      >>> leaf.path, leaf.name
      ('params/kernel', 'params.kernel')
      >>> leaf.at((Key("weights", DICT),)).path
      'weights'
    """

    keys: Keys
    value_type: str
    """As Orbax names it: `jax.Array`, `np.ndarray`, `scalar`, `string`, `None`, `Dict`, `List`."""
    zarr: dict[str, Any] | None = None
    """The array's zarr metadata; None for strings and empty nodes."""
    extension: dict[str, Any] | None = None
    """The entry in `array_metadatas` beyond shapes: the kind of a typed PRNG key."""
    sharding: str | None = None
    write_shape: tuple[int, ...] | None = None
    string: str | None = None
    item: int = 0
    """Which of a step's items it lies in, where several make up one state."""
    stored: str = ""
    """Its name in that item's store. A target leaf still has the name of the leaf it came from."""
    loose: bool = False
    """Whether it lies in a file or an index: in no store whose entries could be named anew."""
    chunks: Mapping[tuple[int, ...], ChunkRef] | None = None
    """Of a target that is made of stored chunks as they are: these, by their place in its grid."""

    @property
    def path(self) -> str:
        return path_of(self.keys)

    @property
    def name(self) -> str:
        """Its name in the store."""
        return name_of(self.keys)

    @property
    def entry(self) -> tuple[str, tuple[int, ...], str]:
        """The part of a tree's metadata that describes this leaf: path, kinds of the keys, type."""
        names, kinds = zip(*self.keys, strict=True)
        return "/".join(names), kinds, self.value_type

    @property
    def empty(self) -> bool:
        return self.value_type in EMPTY_TYPES

    def at(self, keys: Keys) -> "Leaf":
        """The same leaf under another key path."""
        return self._replace(keys=keys)

    @property
    def spec(self) -> Spec:
        """The array's shape and dtype.

        A typed PRNG key is stored as raw words, `uint32[2]` for threefry, along a last axis. Its
        spec is that of the key: without this axis, and with a dtype such as `key<fry>`.
        """
        assert self.zarr is not None
        shape, dtype = tuple(self.zarr["shape"]), zarr_metadata.dtype_of(self.zarr)
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
        return zarr_metadata.itemsize(zarr_metadata.dtype_of(self.zarr))


def repeated(names: Sequence[str]) -> list[tuple[str, int]]:
    """The names that occur more than once, and how often.

    Example:
      >>> repeated(["a.b", "c", "a.b"])
      [('a.b', 2)]
    """
    return [(name, count) for name, count in Counter(names).items() if count > 1]


def common_sharding(leaves: Sequence[Leaf]) -> str | None:
    """The sharding of an array that is made of others.

    The first leaf's sharding is kept if it names no axis, as that of a single device. One that
    names axes fits the old shape only, so the new array is replicated over the same mesh.
    """
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
