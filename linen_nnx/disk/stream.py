"""Engine 2: leaves whose bytes change are read, transformed and written, a few at a time.

Memory holds the arrays of one change, and of the batch being committed meanwhile, whatever the
size of the checkpoint.
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

from linen_nnx.book.ops import Action
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.sources import Reader
from linen_nnx.disk.store import Item, Leaf
from linen_nnx.errors import Refusal

# As Orbax configures its stores: values up to 1 KB lie in the tree, which is one node.
_CONFIG = {
    "compression": {"id": "zstd"},
    "max_inline_value_bytes": 1024,
    "max_decoded_node_bytes": 100_000_000,
}
_BATCH = 8 << 20  # bytes in one commit: enough to make the commit's own cost small
_MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes, of this machine

Array = np.ndarray[Any, Any]


class ItemReader:
    """Reads from Orbax items."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._context = ts.Context()
        self._stores = [_open_kv(item.path, self._context, item.ocdbt) for item in items]

    def read(self, leaves: Sequence[Leaf]) -> list[Array]:
        """All leaves at once. Raises `StoreError` for bytes that cannot be decoded."""
        needed = sum(leaf.nbytes for leaf in leaves)
        if needed > _MEMORY:  # where allocating it fails, tensorstore ends the process
            names = ", ".join(leaf.path for leaf in leaves[:3])
            raise StoreError(
                f"{names}: {needed / 1e9:.1f} GB, but {_MEMORY / 1e9:.1f} GB of memory"
            )
        arrays = [
            open_array(self._stores[leaf.item], leaf.stored, leaf.zarr, self._context)
            for leaf in leaves
        ]
        with refusing(f"{', '.join(leaf.path for leaf in leaves[:3])} cannot be read"):
            pending = [array.result().read() for array in arrays]
            return [np.asarray(future.result()) for future in pending]


def _open_kv(
    base: Path, context: ts.Context, ocdbt: bool, config: dict[str, Any] | None = None
) -> ts.KvStore:
    """The key-value store of an item; `config` is for a new OCDBT store."""
    files = {"driver": "file", "path": f"{base.absolute()}/"}
    spec: dict[str, Any] = {"driver": "ocdbt", "base": files, "config": config or {}}
    return ts.KvStore.open(spec if ocdbt else files, context=context).result()


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
    jobs: Iterable[tuple[Sequence[Leaf], Sequence[Action], Sequence[Leaf]]],
    reader: Reader,
    out: Path,
    ocdbt: bool,
    progress: Callable[[str], None],
) -> None:
    """Writes the targets of each `(sources, actions, targets)` to the store of the item `out`."""
    with refusing(f"the arrays of {out} cannot be written"):
        writer = _Writer(out, ocdbt)
        try:
            for sources, actions, targets in jobs:
                arrays = reader.read(sources)
                for action in actions:
                    arrays = action.run(arrays)
                writer.add(arrays, targets)
                progress(f"rewriting leaves: {writer.done / 1e6:.0f} MB")
            writer.commit()
        finally:
            writer.wait()


class _Writer:
    """Writes arrays in batches, each of which is committed while the next is being made."""

    def __init__(self, out: Path, ocdbt: bool) -> None:
        self._context = ts.Context()
        self._store = _open_kv(out, self._context, ocdbt, config=_CONFIG)
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
        text = str(error).partition(" [tensorstore_spec=")[0].partition(" [source locations=")[0]
        if (number := re.search(r"\[os_error_code='(\d+)'\]", text)) is not None:
            raise OSError(int(number[1]), os.strerror(int(number[1])), what) from None
        raise StoreError(f"{what}: {text}") from None
