"""Engine 2: leaves whose bytes change are read, transformed and written, a few at a time.

Memory holds the arrays of one change, and of the batch being committed meanwhile, whatever the
size of the checkpoint.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorstore as ts

from linen_nnx.ops import Action, Spec
from linen_nnx.store import Item, Leaf, open_kv

_BATCH = 8 << 20  # bytes in one commit: enough to make the commit's own cost small

Array = np.ndarray[Any, Any]


class Reader(Protocol):
    """Reads leaves of a source as numpy arrays, typed PRNG keys as their raw words."""

    def read(self, leaves: Sequence[Leaf]) -> list[Array]: ...


class ItemReader:
    """Reads from Orbax items."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._context = ts.Context()
        self._stores = [open_kv(item.path, self._context, item.ocdbt) for item in items]

    def read(self, leaves: Sequence[Leaf]) -> list[Array]:
        """All leaves at once. Raises `ValueError` for bytes that cannot be decoded."""
        arrays = [
            open_array(self._stores[leaf.item], leaf.stored, leaf.zarr, self._context)
            for leaf in leaves
        ]
        pending = [array.result().read() for array in arrays]
        return [np.asarray(future.result()) for future in pending]


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


def fresh_metadata(spec: Spec, zarr3: bool) -> dict[str, Any]:
    """The zarr metadata that Orbax gives a new array of one chunk."""
    shape, dtype = list(spec.shape), np.dtype(spec.dtype)
    if not zarr3:
        return {
            "chunks": shape,
            "compressor": {"id": "zstd", "level": 1},
            "dimension_separator": ".",
            "dtype": dtype.str if dtype.isbuiltin == 1 else dtype.name,
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
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": shard}],
    }


def stream(
    jobs: Iterable[tuple[Sequence[Leaf], Sequence[Action], Sequence[Leaf]]],
    reader: Reader,
    store: ts.KvStore,
    context: ts.Context,
    progress: Callable[[str], None],
) -> None:
    """Writes the targets of each `(sources, actions, targets)` to an open store."""
    transaction, size, done = ts.Transaction(), 0, 0
    committing: Any = None
    for sources, actions, targets in jobs:
        arrays = reader.read(sources)
        for action in actions:
            arrays = action.run(arrays)
        opened = [
            open_array(store.with_transaction(transaction), t.name, t.zarr, context, create=True)
            for t in targets
        ]
        for array, target in zip(arrays, opened, strict=True):
            target.result().write(array).result()
            size += array.nbytes
        if size > _BATCH:
            if committing is not None:
                committing.result()
            committing = transaction.commit_async()
            done += size
            progress(f"rewriting leaves: {done / 1e6:.0f} MB")
            transaction, size = ts.Transaction(), 0
    if committing is not None:
        committing.result()
    transaction.commit_sync()
