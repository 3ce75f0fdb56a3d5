"""Engine 2: leaves whose bytes change are read, transformed and written, a few at a time.

Memory holds the arrays of one change, and of the batch being committed meanwhile, whatever the
size of the checkpoint.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the names bfloat16, float8_*, int4)
import numpy as np
import tensorstore as ts

from linen_nnx.book.ops import Action
from linen_nnx.disk.sources import Reader
from linen_nnx.disk.store import Item, Leaf

# As Orbax configures its stores: values up to 1 KB lie in the tree, which is one node.
_CONFIG = {
    "compression": {"id": "zstd"},
    "max_inline_value_bytes": 1024,
    "max_decoded_node_bytes": 100_000_000,
}
_BATCH = 8 << 20  # bytes in one commit: enough to make the commit's own cost small

Array = np.ndarray[Any, Any]


class ItemReader:
    """Reads from Orbax items."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._context = ts.Context()
        self._stores = [_open_kv(item.path, self._context, item.ocdbt) for item in items]

    def read(self, leaves: Sequence[Leaf]) -> list[Array]:
        """All leaves at once. Raises `ValueError` for bytes that cannot be decoded."""
        arrays = [
            open_array(self._stores[leaf.item], leaf.stored, leaf.zarr, self._context)
            for leaf in leaves
        ]
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
    context = ts.Context()
    store = _open_kv(out, context, ocdbt, config=_CONFIG)
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
