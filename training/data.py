"""Batches: in which order examples come, who reads which rows, and where reading stopped.

Of examples that can be read in any order, the order is a function of the seed and the step alone:
Grain counts the steps, reads ahead and keeps the position; which examples a step reads is `Order`.
A stream is read as it comes, and its own state is the position. Process p of P reads the p-th part
of the rows of each global batch, so that any number of processes sees the batches that one sees.
What the examples are is `training/datasets/`.
"""

import base64
import copy
import dataclasses
import itertools
import json
import pickle
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Protocol

import grain
import jax
import numpy as np

from training import datasets
from training.datasets import Batch, Dataset, Source
from training.runtime.errors import Refused

# One thread, a few batches ahead: a batch takes far less time than a step, and more threads would
# only contend for the interpreter with the loop.
READ = grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)
# Examples that are read one at a time may be slow to make, as decoded images are.
READ_EACH = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)


class Order:
    """Which examples each step reads: every epoch a new permutation of all of them.

    numpy shuffles, not Grain: its shuffle computes one index at a time in Python, up to 50 us each
    for a small set, so that a batch of 32 would take longer than a training step on it.
    """

    def __init__(self, examples: int, batch: int, seed: int):
        """Lays out epochs of `examples`, read `batch` at a time; `batch` is at most `examples`."""
        self.examples, self.batch = examples, batch

        def shuffled(epoch: int) -> np.ndarray:
            return np.random.default_rng([seed, epoch]).permutation(examples)

        self._shuffled = lru_cache(maxsize=2)(shuffled)  # two: a batch may span two epochs

    def __call__(self, step: int) -> np.ndarray:
        """The examples of a step, (batch,) int64; steps count from 0."""
        epoch, first = divmod(step * self.batch, self.examples)
        indices = self._shuffled(epoch)[first : first + self.batch]
        # The end of an epoch: its rest and the beginning of the next are one batch, for a smaller
        # one would be compiled anew, and leaving it out would lose the same number of examples each
        # time.
        missing = self.batch - len(indices)
        return (
            np.concatenate([indices, self._shuffled(epoch + 1)[:missing]]) if missing else indices
        )


class Position(Protocol):
    """Batches, and where in them one is, as plain JSON values."""

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]: ...

    def set_state(self, state: dict[str, Any]) -> None: ...

    def skip(self, count: int) -> None: ...

    def close(self) -> None: ...


class TrainIterator:
    """An iterator over training batches, whose position can be saved and restored.

    A batch is a pytree of numpy arrays with this process's rows first. Restoring a position after
    k batches makes the next batch the one that an uninterrupted run reads as its k+1st, bit for
    bit, whatever the number of processes now.
    """

    def __init__(self, batches: Position, identity: dict[str, Any]):
        self._batches = batches
        self._identity = identity

    def __iter__(self) -> "TrainIterator":
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        """The position as plain JSON values: where reading is, and in which data."""
        return {**self._batches.get_state(), **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `get_state` returned, here or in an earlier version.

        Raises:
            Refused: the position is one in other data, or in data ordered otherwise, so that
                continuing would repeat and skip examples; every difference is named.
        """
        # The keys of the position proper; all others say which data it is one in.
        kept = self._batches.get_state().keys()
        if not kept <= state.keys():
            raise Refused(
                f"A data position has {', '.join(sorted({*kept, *self._identity}))}; this one has "
                f"{', '.join(sorted(state)) or 'nothing'}."
            )
        changed = []
        for key in sorted({*state, *self._identity} - kept):
            # Earlier versions wrote null for an option that a data set does not have.
            was, now = state.get(key), self._identity.get(key)
            if was != now:
                changed.append(f"  {key}: was {was!r}, is {now!r}")
        if changed:
            raise Refused(
                "The saved data position is one in other data:\n"
                + "\n".join(changed)
                + "\nGoing on would repeat and skip examples. Set these back (the digest stands "
                "for the content of the data), or begin another run, without init_from."
            )
        # The file may come from anywhere: what is no count is refused here, in words, and not
        # somewhere in Grain.
        count = state["batches"]
        if type(count) is not int or count < 0:
            raise Refused(f"A data position counts batches; this one has {count!r}.")
        self._batches.set_state({key: state[key] for key in kept})

    def skip(self, count: int) -> None:
        """Goes past so many batches, from the beginning, as if they had been read."""
        self._batches.skip(count)

    def close(self) -> None:
        """Stops reading ahead."""
        self._batches.close()


def train_iterator(
    dataset: Dataset, process_index: int = 0, process_count: int = 1
) -> TrainIterator:
    """Reads the training data for ever: examples in a new order each epoch, a stream as it is.

    Every epoch is a permutation of all training examples. A batch may span the end of one and
    the start of the next: no example is left out.

    Args:
        dataset: its `options.batch` counts the rows of all processes together.
        process_index: this process.
        process_count: how many share each batch.

    Returns:
        Batches with this process's share of the rows.

    Raises:
        Refused: the rows of a batch cannot be shared out evenly, or a stream has no position.
    """
    options = dataset.options
    _rows_of_process(options.batch, process_index, process_count)
    # A position means nothing in other data: step 300 of another seed has read other examples.
    identity = {**vars(options), "digest": dataset.digest}
    identity.pop("name")
    identity.pop("path", None)  # where files lie does not matter: the digest says what is in them
    source = _source(dataset.train)
    if source is None:
        return TrainIterator(_Stream(dataset.train, process_index, process_count), identity)
    identity["examples"] = len(source)
    return TrainIterator(_Shuffled(source, dataset, process_index, process_count), identity)


def eval_batches(
    dataset: Dataset, limit: int | None = None, process_index: int = 0, process_count: int = 1
) -> Iterator[tuple[Batch, np.ndarray]]:
    """Reads the validation data once, in an order that never changes.

    The order of examples is shuffled once by the seed, so that the first few batches are a fair
    sample.

    Args:
        dataset: its `options.batch` counts the rows of all processes together.
        limit: read only so many batches; None reads all. The baselines are scored on all.
        process_index: this process.
        process_count: how many share each batch.

    Returns:
        Pairs of a batch and `weight` (rows,) float32: 1, or 0 for a row that only fills up a batch
        to a multiple of `options.batch` (a copy of an example, so that its values are ordinary).

    Raises:
        Refused: the rows of a batch cannot be shared out evenly.
    """
    batch = dataset.options.batch
    _rows_of_process(batch, process_index, process_count)
    source = _source(dataset.validation)
    filled = _as_they_come(dataset) if source is None else _in_order(source, dataset)
    # Cut after the order is made, so that the first few batches are the same whatever the limit.
    for read, weight in itertools.islice(filled, limit):
        mine = _rows_of_process(len(weight), process_index, process_count)
        yield _cut(read, mine), weight[mine]


def first_batch(dataset: Dataset) -> Batch:
    """The first examples as one batch of all processes' rows, for shapes; moves no position."""
    source, rows = _source(dataset.train), dataset.options.batch
    if source is not None:
        return source.take(np.arange(rows) % len(source))
    stream = iter(dataset.train)
    # A stream cannot be looked at without reading it: read one, and put it back.
    before = copy.deepcopy(stream.get_state())  # which may be what `next` changes
    batch = next(stream)
    stream.set_state(before)
    return batch


def example(group: Mapping[str, Any], rows: int) -> Batch:
    """A batch to prove something with: one that needs no files, where the data set has one.

    Args:
        group: the `data` group of a configuration.
        rows: of the batch, at most; fewer where `batch` is smaller.
    """
    options = datasets.create({**group, "batch": min(rows, group["batch"])})
    batch = datasets.example(options)
    if batch is None:
        batch = first_batch(datasets.load(options))
    return _cut(batch, slice(options.batch))


def rows_of(batch: Batch) -> int:
    """How many examples a batch has: the length of its first array."""
    return len(jax.tree.leaves(batch)[0])


class _Shuffled:
    """Examples in the order of `Order`, read ahead."""

    def __init__(self, source: Source, dataset: Dataset, index: int, count: int):
        options = dataset.options
        order = Order(len(source), options.batch, options.seed)
        mine = _rows_of_process(options.batch, index, count)
        read = READ_EACH if isinstance(source, _Each) else READ
        # Without an end: the loop knows when to stop. What is mapped is the number of the step
        # alone, so that the position is one number, however the examples are kept.
        steps = grain.MapDataset.range(sys.maxsize)
        batches = steps.map(lambda step: source.take(order(step)[mine]))
        self._batches = iter(batches.to_iter_dataset(read))

    def __next__(self) -> Batch:
        return next(self._batches)

    def get_state(self) -> dict[str, Any]:
        return {"batches": self._batches.get_state()["next_index"]}

    def set_state(self, state: dict[str, Any]) -> None:
        self.skip(state["batches"])

    def skip(self, count: int) -> None:
        self._batches.set_state({"next_index": count})

    def close(self) -> None:
        self._batches.close()


class _Stream:
    """A stream of whole batches as it comes, of which each process takes its rows.

    Every process reads all of each batch. That costs reading time, and in return the position is
    the same in each, and holds for any number of them.
    """

    def __init__(self, batches: Any, index: int, count: int):
        self._stream = iter(batches)
        self._process = index, count
        self._drawn = 0
        if not (hasattr(self._stream, "get_state") and hasattr(self._stream, "set_state")):
            raise Refused(
                f"The training data is a {type(batches).__name__}, whose iterator has no get_state "
                "and set_state: a run on it could not be resumed. Give it both, or a Grain dataset."
            )

    def __next__(self) -> Batch:
        try:
            batch = next(self._stream)
        except StopIteration:
            raise Refused(
                f"The training data has ended after {self._drawn} batches, before the run. Let the "
                "stream begin again at its end, or train for so many steps."
            ) from None
        self._drawn += 1
        return _cut(batch, _rows_of_process(rows_of(batch), *self._process))

    def get_state(self) -> dict[str, Any]:
        state, form = _copied(self._stream.get_state())
        return {"batches": self._drawn, "stream": state, "form": form}

    def set_state(self, state: dict[str, Any]) -> None:
        stream, form = state["stream"], state["form"]
        if form not in ("json", "pickle"):
            raise Refused(f"A data position is kept as json or pickle; this one as {form!r}.")
        # By now the checkpoint has been compared with its digests, unless somebody has asked for it
        # to be taken as it is.
        if form == "pickle":
            stream = pickle.loads(base64.b64decode(stream))
        self._stream.set_state(stream)
        self._drawn = state["batches"]

    def skip(self, count: int) -> None:
        for _ in range(count):
            next(self)

    def close(self) -> None:
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()


@dataclasses.dataclass(frozen=True)
class _Each:
    """Examples that are read one at a time, as a `Source`."""

    examples: Any

    def __len__(self) -> int:
        return len(self.examples)

    def take(self, indices: np.ndarray) -> Batch:
        read = [self.examples[int(index)] for index in indices]
        # To jax None is an empty tree, and its error would speak of structures that differ.
        if any(example is None for example in read):
            raise Refused(
                "The data has gaps, as a Grain MapDataset has after `filter`. Filter before it is "
                "indexed, or give a stream: dataset.to_iter_dataset().batch(...)."
            )
        return jax.tree.map(lambda *leaves: np.stack(leaves), *read)


def _source(examples: Any) -> Source | None:
    """Examples as what can be read in any order; None for a stream."""
    if hasattr(examples, "take"):
        return examples
    if not (hasattr(examples, "__len__") and hasattr(examples, "__getitem__")):
        return None
    # That is how long Grain says that an endless data set is; a permutation of it has no room.
    if len(examples) == sys.maxsize:
        raise Refused(
            "The data repeats for ever, and is to be shuffled anew in each epoch: leave `repeat` "
            "out, or give a stream: dataset.to_iter_dataset().batch(...)."
        )
    return _Each(examples)


def _in_order(source: Source, dataset: Dataset) -> Iterator[tuple[Batch, np.ndarray]]:
    """All examples once, in whole batches with their weights; the last is filled up."""
    batch, count = dataset.options.batch, len(source)
    # Up to a whole batch: a shorter one would be compiled anew, and devices could not share it.
    filled = count + -count % batch
    order = np.resize(np.random.default_rng(dataset.options.seed).permutation(count), filled)
    weight = (np.arange(filled) < count).astype(np.float32)
    for start in range(0, filled, batch):
        part = slice(start, start + batch)
        yield source.take(order[part]), weight[part]


def _as_they_come(dataset: Dataset) -> Iterator[tuple[Batch, np.ndarray]]:
    """The batches of a finite stream, each filled up to a multiple of `options.batch`."""
    for batch in dataset.validation:
        count = rows_of(batch)
        filled = count + -count % dataset.options.batch
        weight = (np.arange(filled) < count).astype(np.float32)
        yield _cut(batch, np.resize(np.arange(count), filled)), weight


def _cut(batch: Batch, rows: slice | np.ndarray) -> Batch:
    return jax.tree.map(lambda array: np.asarray(array)[rows], batch)


def _copied(state: Any) -> tuple[Any, str]:
    """A state as plain JSON values, and how: by "json" where that gives back the same, or "pickle".

    A copy, since a checkpoint is written while the stream, which may own the state, reads on.
    """
    try:
        copied = json.loads(json.dumps(state))
    except (TypeError, ValueError):
        copied = None
    # JSON makes a list of a tuple and text of a key 3 without complaint; then it is not the same.
    if copied == state:
        return copied, "json"
    return base64.b64encode(pickle.dumps(state)).decode(), "pickle"


def _rows_of_process(batch: int, index: int, count: int) -> slice:
    # A rest would have to go to some process, whose step would then be another program.
    if batch % count:
        raise Refused(
            f"A batch has {batch} rows (data.batch), which {count} processes cannot share evenly: "
            f"choose a multiple of {count}."
        )
    share = batch // count
    return slice(index * share, (index + 1) * share)
