"""Arrays of items in buckets: their chunks are fetched, and decoded out of memory.

The tree of an OCDBT store says in which file each chunk lies, from which byte to which. So one
array of a file of gigabytes is a request for its own bytes:

    params.kernel/0.0   ->   d/5e0f..., bytes 4,096 to 16,781,312   ->   memory://params.kernel/0.0

tensorstore could read buckets itself, but takes other credentials, and from other places, than the
rest of this library does; its key-value stores give no ranges of a file.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import tensorstore as ts

from linen_nnx.book.reading import read_bytes
from linen_nnx.disk import ocdbt
from linen_nnx.disk.complete import files_below
from linen_nnx.disk.item import Item
from linen_nnx.disk.leaves import Leaf

_AT_ONCE = 16  # requests: most of a small one is waiting
_CHUNK = 1 << 40  # bytes: how much one reading may take is settled by the arrays' own sizes


def fetched(items: Sequence[Item], leaves: Sequence[Leaf], context: ts.Context) -> ts.KvStore:
    """A store in memory that holds the chunks of some leaves, below `item/name/`.

    Raises:
      OSError, ValueError: for bytes that are not there.
    """
    store = ts.KvStore.open({"driver": "memory"}, context=context).result()
    wanted: list[tuple[str, Item, ocdbt.Value | str]] = []
    for leaf in leaves:
        wanted += _chunks(items[leaf.item], leaf)
    # Of all leaves together: most arrays are one chunk, and would be one request after another.
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        contents = pool.map(lambda entry: _fetch(*entry[1:]), wanted)
        for (key, _, _), content in zip(wanted, contents, strict=True):
            store.write(key, content).result()
    return store


def place(leaf: Leaf) -> str:
    """Where `fetched` puts a leaf: several items may hold arrays of one name."""
    return f"{leaf.item}/{leaf.stored}"


def _chunks(item: Item, leaf: Leaf) -> Iterator[tuple[str, Item, ocdbt.Value | str]]:
    """The key of each chunk in the store in memory, and where its bytes are: a value of the tree,
    or the name of a file."""
    if item.tree is not None:
        for key, value in item.tree[leaf.stored].items():
            yield f"{place(leaf)}/{key}", item, value
        return
    # A folder for each array: its metadata is a file among the chunks, and is fetched with them.
    folder = item.path / leaf.stored
    for file in files_below(folder):
        key = str(file.relative_to(folder))
        yield f"{place(leaf)}/{key}", item, f"{leaf.stored}/{key}"


def _fetch(item: Item, value: ocdbt.Value | str) -> bytes:
    if isinstance(value, str):
        return read_bytes(item.path / value, _CHUNK)
    return ocdbt.fetch(item.path, value, _CHUNK)
