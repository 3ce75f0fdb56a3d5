"""Batches: in which order examples come, who reads which rows, and where reading stopped.

The order is a function of the seed and the step alone: Grain counts the steps, reads ahead and
keeps the position; which examples a step reads is `Order`. Process p of P reads its P-th part of
the rows of each global batch, so that any number of processes sees the batches that one process
sees. What the examples are is `training/datasets.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import grain
import numpy as np

from training.datasets import Batch, Dataset
from training.errors import Refused

if TYPE_CHECKING:
    from configs.schema import Data

# One thread, a few batches ahead: a batch takes far less time than a step, and more threads would
# only contend for the interpreter with the loop.
READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)


class Order:
    """Which examples each step reads: every epoch a new permutation of all of them.

    numpy shuffles, not Grain: its shuffle computes one index at a time in Python, up to 50 us each
    for a small set, so that a batch of 32 would take longer than a training step on it.
    """

    def __init__(self, examples: int, batch: int, seed: int):
        """Lay out epochs of `examples`, read `batch` at a time; `batch` is at most `examples`."""
        self.examples, self.batch = examples, batch

        def shuffled(epoch: int) -> np.ndarray:
            return np.random.default_rng([seed, epoch]).permutation(examples)

        self._shuffled = lru_cache(maxsize=2)(shuffled)  # two: a batch may span two epochs

    def __call__(self, step: int) -> np.ndarray:
        """Return the examples of a step, (batch,) int64; steps count from 0."""
        epoch, first = divmod(step * self.batch, self.examples)
        indices = self._shuffled(epoch)[first : first + self.batch]
        missing = self.batch - len(indices)
        return (
            np.concatenate([indices, self._shuffled(epoch + 1)[:missing]]) if missing else indices
        )


class TrainIterator:
    """An endless iterator over training batches, whose position can be saved and restored.

    A batch is `{"inputs", "targets"}`, numpy arrays with this process's rows first. Restoring a
    position after k batches makes the next batch the one that an uninterrupted run reads as its
    k+1st, bit for bit, whatever the number of processes now.
    """

    def __init__(self, batches: grain.DatasetIterator[Batch], identity: dict[str, Any]):
        self._batches = batches
        self._identity = identity

    def __iter__(self) -> TrainIterator:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """Return the position as plain JSON values: batches handed out, and of which data."""
        return {"batches": self._batches.get_state()["next_index"], **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a position that `get_state` returned.

        Raises:
            Refused: the position counts batches of other data, or of data ordered otherwise,
                so that continuing would repeat and skip examples; every difference is named.
        """
        here = {"batches": None, **self._identity}
        if state.keys() != here.keys():
            raise Refused(
                f"A data position has the keys {', '.join(sorted(here))}; this one has "
                f"{', '.join(sorted(state)) or 'none'}."
            )
        changed = [
            f"  {key}: was {state[key]!r}, is {value!r}"
            for key, value in self._identity.items()
            if state[key] != value
        ]
        if changed:
            raise Refused(
                "The saved data position counts batches of other data:\n"
                + "\n".join(changed)
                + "\nGoing on would repeat and skip examples. Set these back (the digest stands "
                "for the content of the data), or begin another run, without init_from."
            )
        count = state["batches"]
        if type(count) is not int or count < 0:
            raise Refused(f"A data position counts batches; this one has {count!r}.")
        self._batches.set_state({"next_index": count})

    def close(self) -> None:
        """Stop reading ahead."""
        self._batches.close()


def train_iterator(
    dataset: Dataset, cfg: Data, process_index: int = 0, process_count: int = 1
) -> TrainIterator:
    """Read the training split for ever, each epoch in a new order, a few batches ahead.

    Every epoch is a permutation of all training examples. A batch may span the end of one and
    the start of the next: no example is left out.

    Args:
        dataset: what `load` returned for this config.
        cfg: the `data` group of the config; `batch` counts the rows of all processes together.
        process_index: this process.
        process_count: how many share each batch.

    Returns:
        Batches of `batch / process_count` rows.

    Raises:
        Refused: the rows of a batch cannot be shared out evenly.
    """
    rows = _rows_of_process(cfg.batch, process_index, process_count)
    order = Order(len(dataset.train), cfg.batch, cfg.seed)
    batches = (
        grain.MapDataset.range(sys.maxsize)
        .map(lambda step: dataset.train.take(order(step)[rows]))
        .to_iter_dataset(READ)
    )
    identity = {
        "digest": dataset.digest,
        "examples": len(dataset.train),
        "batch": cfg.batch,
        "length": cfg.length,
        "val_fraction": cfg.val_fraction,
        "seed": cfg.seed,
    }
    return TrainIterator(iter(batches), identity)


def eval_batches(
    dataset: Dataset,
    cfg: Data,
    limit: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
) -> Iterator[Batch]:
    """Read the validation split once, in an order that never changes.

    The order is shuffled once by the seed, so that the first few batches are a fair sample.

    Args:
        dataset: what `load` returned for this config.
        cfg: the `data` group of the config.
        limit: read only so many batches; null reads all. The baselines are scored on all.
        process_index: this process.
        process_count: how many share each batch.

    Returns:
        Batches with one more entry, `weight` (rows,) float32: 1, or 0 for a row that only fills
        up the last batch (a copy of an example, so that its values are ordinary ones).

    Raises:
        Refused: the rows of a batch cannot be shared out evenly.
    """
    rows = _rows_of_process(cfg.batch, process_index, process_count)
    count = len(dataset.validation)
    filled = count + -count % cfg.batch
    order = np.resize(np.random.default_rng(cfg.seed).permutation(count), filled)
    weight = (np.arange(filled) < count).astype(np.float32)

    def read(start: int) -> Batch:
        mine = slice(start + rows.start, start + rows.stop)
        return {**dataset.validation.take(order[mine]), "weight": weight[mine]}

    return (read(start) for start in range(0, filled, cfg.batch)[:limit])


def _rows_of_process(batch: int, index: int, count: int) -> slice:
    if batch % count:
        raise Refused(
            f"data.batch is {batch}, which {count} processes cannot share evenly: choose a "
            f"multiple of {count}."
        )
    share = batch // count
    return slice(index * share, (index + 1) * share)
