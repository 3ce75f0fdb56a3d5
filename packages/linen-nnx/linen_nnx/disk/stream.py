"""Engine 2: leaves whose bytes change are read, transformed and written, a few at a time.

    kernel (8, 4) float32 --read--> array --transpose--> array (4, 8) --write--> batch
    a batch of 8 MB --commit--> the store on disk, while the next batch is being made

Memory holds the arrays of one move, and of the batch being committed meanwhile, whatever the size
of the checkpoint.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the names bfloat16, float8_*, int4)
import numpy as np
import tensorstore as ts
from backports import zstd

from linen_nnx.book.moves import Move
from linen_nnx.book.reading import ObjectPath, read_bytes
from linen_nnx.disk import ocdbt
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.chunks import Grid
from linen_nnx.disk.item import Item
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.sources import Reader
from linen_nnx.errors import Refusal

# As Orbax configures its stores: values up to 1 KB lie in the tree, which is one node.
_CONFIG = {
    "compression": {"id": "zstd"},
    "max_inline_value_bytes": 1024,
    "max_decoded_node_bytes": 100_000_000,
}
_BATCH = 8 << 20  # bytes in one commit: enough to make the commit's own cost small
_SMALL = 1 << 16  # bytes: decoding more takes longer than tensorstore's 0.5 ms for each array
_AS_THEY_LIE = re.compile(r"<[iufc]\d+|\|[iu]1|bfloat16")  # dtypes that numpy has the same bytes of
_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes, of this machine

Array = np.ndarray[Any, Any]


class ItemReader:
    """Reads from Orbax items."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = items
        self._context = ts.Context()
        # All in a bucket, or none: what makes up one state lies in one folder.
        self._remote = any(isinstance(item.path, ObjectPath) for item in items)
        self._stores: list[ts.KvStore] = []
        if not self._remote:
            self._stores = [_open_kv(item.path, self._context, item.ocdbt) for item in items]

    def read(self, leaves: Sequence[Leaf]) -> list[Array]:
        """All leaves at once. Raises `StoreError` for bytes that cannot be decoded."""
        # Where the memory for an array cannot be had, tensorstore ends the process, and a damaged
        # shape may ask for any amount.
        needed = sum(leaf.nbytes for leaf in leaves)
        if needed > _MEMORY:
            raise StoreError(
                f"{_first_of(leaves)}: {needed / 1e9:.1f} GB, but {_MEMORY / 1e9:.1f} GB of memory"
            )
        if self._remote:
            return self._read_large(leaves)
        # Verifying 50,000 small leaves took 69 s through tensorstore alone, and takes 10 s so.
        small = [_read_small(self._items[leaf.item], leaf) for leaf in leaves]
        rest = [leaf for leaf, array in zip(leaves, small, strict=True) if array is None]
        large = iter(self._read_large(rest))
        return [next(large) if array is None else array for array in small]

    def _read_large(self, leaves: Sequence[Leaf]) -> list[Array]:
        """All leaves by tensorstore, which reads and decodes in several threads."""
        with refusing(f"{_first_of(leaves)} cannot be read"):
            if self._remote:
                from linen_nnx.disk.fetched import fetched, place

                # Of its own: what it holds is let go with the arrays.
                context = ts.Context()
                store = fetched(self._items, leaves, context)
                places = [(store, place(leaf)) for leaf in leaves]
            else:
                context = self._context
                places = [(self._stores[leaf.item], leaf.stored) for leaf in leaves]
            opened = []
            for (store, name), leaf in zip(places, leaves, strict=True):
                opened.append(open_array(store, name, leaf.zarr, context))
            # Every read is begun before the first one is waited for.
            pending = [array.result().read() for array in opened]
            return [np.asarray(future.result()) for future in pending]


def _first_of(leaves: Sequence[Leaf]) -> str:
    return ", ".join([leaf.path for leaf in leaves[:3]])


def _read_small(item: Item, leaf: Leaf) -> Array | None:
    """The array of a leaf that is one small chunk, in the encoding that Orbax gives arrays.

    Tensorstore takes half a millisecond for each array, of whatever size. None for every other
    leaf, and where anything is odd: tensorstore then says what it is.
    """
    metadata = leaf.zarr
    if metadata is None or metadata["zarr_format"] != 2:
        return None
    nbytes = leaf.nbytes
    if not 0 < nbytes <= _SMALL:
        return None
    whole = metadata["chunks"] == metadata["shape"]
    if not whole or metadata["filters"] or metadata["order"] != "C":
        return None
    if not _AS_THEY_LIE.fullmatch(metadata["dtype"]):
        return None
    data = _only_chunk(item, leaf, nbytes)
    if data is None or len(data) != nbytes:
        return None
    return np.frombuffer(data, np.dtype(metadata["dtype"])).reshape(metadata["shape"])


def _only_chunk(item: Item, leaf: Leaf, nbytes: int) -> bytes | None:
    """The decoded bytes of an array's one chunk; None if it is left out, or cannot be decoded."""
    assert leaf.zarr is not None
    key = Grid(leaf.zarr, {}).key((0,) * len(leaf.zarr["shape"]))
    # Numbers that do not compress take a little more room encoded than in memory.
    most = 2 * _SMALL
    try:
        if item.tree is None:
            data = read_bytes(item.path / leaf.stored / key, most)
        else:
            data = ocdbt.fetch(item.path, item.tree[leaf.stored][key], most)
    except (KeyError, OSError, ValueError):
        return None
    compressor = leaf.zarr["compressor"]
    if compressor is None:
        return data
    return _decoded(data, nbytes) if compressor["id"] == "zstd" else None


def _decoded(data: bytes, nbytes: int) -> bytes | None:
    """What one frame of zstd holds, of which at most one byte too many; None if it is damaged."""
    decoder = zstd.ZstdDecompressor()
    try:
        # One byte more than is due shows a frame that holds too much. A few damaged bytes may say
        # that terabytes follow: these are never made.
        content = decoder.decompress(data, max_length=nbytes + 1)
    except zstd.ZstdError:
        return None
    return content if decoder.eof and not decoder.unused_data else None


def _open_kv(
    base: Path, context: ts.Context, in_tree: bool, config: dict[str, Any] | None = None
) -> ts.KvStore:
    """The key-value store of an item; `config` is for a new OCDBT store."""
    files = {"driver": "file", "path": f"{base.absolute()}/"}
    spec: dict[str, Any] = {"driver": "ocdbt", "base": files, "config": config or {}}
    return ts.KvStore.open(spec if in_tree else files, context=context).result()


def open_array(
    store: ts.KvStore, name: str, metadata: Any, context: ts.Context, create: bool = False
) -> Any:
    """A future of an array in a store; `create` makes it with the given zarr metadata."""
    spec = {"driver": "zarr3" if metadata["zarr_format"] == 3 else "zarr"}
    if create:
        # Orbax refuses an array of zeros whose chunk was left out as equal to the fill value.
        spec |= {"metadata": metadata, "store_data_equal_to_fill_value": True}
    return ts.open(
        spec, kvstore=store / f"{name}/", context=context, create=create, open=not create
    )


def stream(
    moves: Iterable[Move[Leaf, Leaf]],
    reader: Reader,
    out: Path,
    in_tree: bool,
    progress: Callable[[str], None],
) -> None:
    """Writes the targets of each move to the store of the item `out`.

    Args:
      moves: settled, so that every target has its metadata.
      reader: of the source.
      in_tree: whether the store is one OCDBT database; else it is a directory per array.
      progress: is told how many bytes are on their way to disk.

    Raises:
      StoreError: for bytes that cannot be decoded.
      Mismatch: where an action finds values that it cannot take.
    """
    with refusing(f"the arrays of {out} cannot be written"):
        writer = _Writer(out, in_tree)
        try:
            for move in moves:
                arrays = move.run(reader.read(move.sources))
                writer.add(arrays, move.targets)
                progress(f"rewriting leaves: {writer.done / 1e6:.0f} MB")
            writer.commit()
        finally:
            # Also after an error: a commit that goes on would write into a directory that is being
            # removed.
            writer.wait()


class _Writer:
    """Writes arrays in batches, each of which is committed while the next is being made."""

    def __init__(self, out: Path, in_tree: bool) -> None:
        self._context = ts.Context()
        self._store = _open_kv(out, self._context, in_tree, config=_CONFIG)
        self._transaction = ts.Transaction()
        self._committing: Any = None
        self._size = 0  # bytes in the batch that is open
        self.done = 0
        """Bytes on their way to disk."""

    def add(self, arrays: Sequence[Array], targets: Sequence[Leaf]) -> None:
        """Writes each array as the leaf that it is to be."""
        store = self._store.with_transaction(self._transaction)
        opened = [open_array(store, t.name, t.zarr, self._context, create=True) for t in targets]
        for array, target in zip(arrays, opened, strict=True):
            target.result().write(array).result()
            self._size += array.nbytes
        if self._size > _BATCH:
            self.commit()

    def commit(self) -> None:
        """Begins to write the open batch to disk, when the one before it is there."""
        self.wait()
        self._committing = self._transaction.commit_async()
        self.done += self._size
        self._transaction, self._size = ts.Transaction(), 0

    def wait(self) -> None:
        """Waits for the batch that is being written: the directory may be removed then."""
        pending, self._committing = self._committing, None
        if pending is not None:
            pending.result()


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns what tensorstore raises into a refusal, or into the `OSError` that was behind it."""
    try:
        yield
    except (Refusal, OSError):
        raise
    except (ValueError, IndexError, NotImplementedError) as error:
        # Tensorstore ends its messages with pages of its own specs and source lines.
        text = str(error).partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]
        if (number := re.search(r"\[os_error_code='(\d+)'\]", text)) is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1])), what) from None
        raise StoreError(f"{what}: {text}") from None
