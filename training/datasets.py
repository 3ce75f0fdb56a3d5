"""The three datasets: real, bundled, split once by seed, with baselines to beat.

What there is to learn from, held in memory as numpy arrays: `load` is the way in. How examples
are ordered, batched and sharded is `training/data.py`. Nothing here imports jax or Grain, and
scikit-learn is imported only for the sets that it brings.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from training.errors import Refused
from training.text import Windows, bigram_nats, read_text, split_text

if TYPE_CHECKING:
    from configs.schema import Data

Batch = dict[str, np.ndarray]

# Training windows over each byte of a text: of one alone, each byte would always be at one place.
POSITIONS = 8


class Source(Protocol):
    """Examples that can be read in any order."""

    def __len__(self) -> int: ...

    def take(self, indices: np.ndarray) -> Batch:
        """Read the examples at `indices` (rows,) as `{"inputs", "targets"}`, rows first."""
        ...


@dataclass(frozen=True)
class Rows:
    """Examples that are the rows of two arrays.

    Attributes:
        inputs: (examples, ...).
        targets: (examples, ...).
    """

    inputs: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, indices: np.ndarray) -> Batch:
        return {"inputs": self.inputs[indices], "targets": self.targets[indices]}


@dataclass(frozen=True)
class Dataset:
    """A training and a validation source, and what a report needs to know of them.

    Attributes:
        train: the examples to learn from.
        validation: the examples that training never sees.
        description: one line for people: where the data is from, how much, how split.
        baselines: scores of models that need no training, on the whole validation split.
        classes: how many values a target can have (256 of a byte, 10 of a digit); None where it is
            a number.
        digest: names the exact data, whatever its path; saved with a position in it.
    """

    train: Source
    validation: Source
    description: str
    baselines: dict[str, float]
    digest: str
    classes: int | None = None

    def example_batch(self, n: int) -> Batch:
        """Return the first `n` training examples (from the start again if fewer), for shapes."""
        return self.train.take(np.arange(n) % len(self.train))


def load(cfg: Data) -> Dataset:
    """Read the dataset that the config names, split it and compute its baselines.

    The split is a function of the data, `length`, `val_fraction` and `seed` alone.

    Args:
        cfg: the `data` group of the config, whose types and ranges its schema has checked.

    Returns:
        The dataset:

        - `text`: inputs and targets (length,) int32, the bytes of a text and those that follow.
          The stream is cut into about 200 equal blocks, at least four windows long, and a seeded
          choice of them is validation (at least one block), so that no validation window shares
          a byte with a training window. Training windows begin every `length // 8` bytes, so that
          an epoch shows each byte at eight positions; validation windows every `length` bytes, so
          that each target is scored once. Baselines, in nats per byte: `uniform`, `bigram`.
        - `digits`: inputs (8, 8, 1) float32 from 0 to 1, targets () int32; the split keeps the
          share of each class. Baseline, as accuracy: `majority`.
        - `diabetes`: inputs (10,) and targets (1,) float32, standardised with the statistics of
          the training split. Baseline, as mean squared error: `mean`.

    Raises:
        Refused: the config does not fit the dataset, or the files cannot be used; the message
            names every reason.
    """
    dataset = LOADERS[cfg.name](cfg)
    if cfg.batch > len(dataset.train):
        raise Refused(
            f"data.batch is {cfg.batch}, more than the {len(dataset.train)} training examples of "
            f"{cfg.name}: a batch would hold an example twice. Choose a smaller data.batch."
        )
    return dataset


def _load_text(cfg: Data) -> Dataset:
    if cfg.length is None:
        raise Refused("data.length is null; text needs the number of bytes in a window.")
    text, origin = read_text(cfg.path)
    data = np.frombuffer(text, np.uint8)
    train_runs, validation_runs = split_text(len(data), cfg.length, cfg.val_fraction, cfg.seed)
    train = Windows(data, train_runs, cfg.length, stride=max(cfg.length // POSITIONS, 1))
    validation = Windows(data, validation_runs, cfg.length, stride=cfg.length)
    train_bytes, validation_bytes = (int(np.diff(r).sum()) for r in (train_runs, validation_runs))
    return Dataset(
        train=train,
        validation=validation,
        description=(
            f"{origin}: {len(data)} bytes; {train_bytes} to train on ({len(train)} windows "
            f"of {cfg.length}, one every {train.stride}), {validation_bytes} to validate with "
            f"({len(validation)} windows, no overlap)"
        ),
        baselines={"uniform": math.log(256), "bigram": bigram_nats(train, validation)},
        classes=256,
        digest=_digest(data),
    )


def _load_digits(cfg: Data) -> Dataset:
    from sklearn.datasets import load_digits

    pixels, labels = map(np.asarray, load_digits(return_X_y=True))
    inputs = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    targets = labels.astype(np.int32)
    order = np.random.default_rng(cfg.seed).permutation(len(targets))
    in_validation = np.zeros(len(targets), bool)
    for label in range(10):
        members = order[targets[order] == label]
        count = round(cfg.val_fraction * len(members))
        if count in (0, len(members)):
            raise Refused(
                f"data.val_fraction is {cfg.val_fraction}: of the {len(members)} images of digit "
                f"{label}, {count} would be validation, and both sides need every digit. Choose a "
                "value nearer to 0.1."
            )
        in_validation[members[:count]] = True
    train, validation = np.flatnonzero(~in_validation), np.flatnonzero(in_validation)
    majority = np.bincount(targets[train]).argmax()
    return Dataset(
        train=Rows(inputs[train], targets[train]),
        validation=Rows(inputs[validation], targets[validation]),
        description=_bundled("handwritten digits of 8 x 8 pixels", train, validation),
        baselines={"majority": float(np.mean(targets[validation] == majority))},
        classes=10,
        digest=_digest(inputs, targets),
    )


def _load_diabetes(cfg: Data) -> Dataset:
    from sklearn.datasets import load_diabetes

    features, progression = map(np.asarray, load_diabetes(return_X_y=True, scaled=False))
    progression = progression[:, None]
    order = np.random.default_rng(cfg.seed).permutation(len(features))
    count = min(max(round(cfg.val_fraction * len(order)), 1), len(order) - 1)
    validation, train = order[:count], order[count:]
    if len(train) < 2:
        raise Refused(
            f"data.val_fraction is {cfg.val_fraction}: {len(train)} training example of diabetes "
            "has no spread to standardise by. Choose a value nearer to 0.1."
        )

    def standardised(values: np.ndarray) -> np.ndarray:
        return ((values - values[train].mean(0)) / values[train].std(0)).astype(np.float32)

    inputs, targets = standardised(features), standardised(progression)
    return Dataset(
        train=Rows(inputs[train], targets[train]),
        validation=Rows(inputs[validation], targets[validation]),
        description=_bundled("diabetes records, 10 features each", train, validation),
        # Standardised targets have a training mean of 0: predicting it leaves the target itself.
        baselines={"mean": float(np.mean(targets[validation].astype(np.float64) ** 2))},
        digest=_digest(features, progression),
    )


def _bundled(what: str, train: np.ndarray, validation: np.ndarray) -> str:
    return (
        f"scikit-learn's bundled {what}: {len(train)} to train on, {len(validation)} to validate "
        "with"
    )


def _digest(*arrays: np.ndarray) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


LOADERS: dict[str, Callable[[Data], Dataset]] = {
    "text": _load_text,
    "digits": _load_digits,
    "diabetes": _load_diabetes,
}
