"""The three datasets: real, bundled, split once by seed, with baselines to beat.

What there is to learn from, held in memory as numpy arrays: `load` is the way in. How examples
are ordered, batched and sharded is `training/data.py`. Nothing here imports jax or Grain, and
scikit-learn is imported only for the sets that it brings.
"""

from __future__ import annotations

import glob
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from configs.schema import Data

Batch = dict[str, np.ndarray]

BLOCKS = 200  # of a text, each wholly training or wholly validation
WINDOWS_PER_BLOCK = 4  # at least, so that a short text still has whole windows on both sides
PHASES = 8  # training windows over each byte: one would show every byte at one position for ever
CHUNK = 1 << 22  # bytes of text counted at a time: bounds memory, not results
FILES_NAMED = 8  # in a description


class DataError(ValueError):
    """Data that cannot be used as asked; the message says what is wrong and what to do."""


def refuse(problems: list[str]) -> None:
    """Raise one `DataError` with every problem, if there is any."""
    if problems:
        raise DataError("\n".join(problems))


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


class Windows:
    """Windows over a byte stream: `length` inputs, and as targets the bytes that follow each."""

    def __init__(self, data: np.ndarray, runs: np.ndarray, length: int, stride: int):
        """Lay windows into each run, one every `stride` bytes; none crosses the end of a run.

        Args:
            data: (bytes,) uint8, the whole stream.
            runs: (runs, 2) int64, start and stop of each stretch that may be read.
            length: bytes of input in a window; a window reads one byte more.
            stride: bytes from the start of a window to the start of the next.
        """
        self.data, self.runs, self.length, self.stride = data, runs, length, stride
        room = runs[:, 1] - runs[:, 0] - (length + 1)
        self.ends = np.cumsum(np.maximum(room // stride + 1, 0))  # windows up to each run's end

    def __len__(self) -> int:
        return int(self.ends[-1])

    def take(self, indices: np.ndarray) -> Batch:
        """Read windows: inputs and targets (rows, length) int32, values 0 to 255."""
        run = np.searchsorted(self.ends, indices, side="right")
        first = np.where(run > 0, self.ends[run - 1], 0)
        start = self.runs[run, 0] + (indices - first) * self.stride
        rows = self.data[start[:, None] + np.arange(self.length + 1)].astype(np.int32)
        return {
            "inputs": np.ascontiguousarray(rows[:, :-1]),
            "targets": np.ascontiguousarray(rows[:, 1:]),
        }


@dataclass(frozen=True)
class Dataset:
    """A training and a validation source, and what a report needs to know of them.

    Attributes:
        name: 'text', 'digits' or 'diabetes'.
        train: the examples to learn from.
        validation: the examples that training never sees.
        description: one line for people: where the data is from, how much, how split.
        baselines: scores of models that need no training, on the whole validation split.
        digest: names the exact data, whatever its path; saved with a position in it.
        target_mean, target_std: `target * target_std + target_mean` is in original units, and a
            mean squared error times `target_std ** 2` too.
    """

    name: str
    train: Source
    validation: Source
    description: str
    baselines: dict[str, float]
    digest: str
    target_mean: float = 0.0
    target_std: float = 1.0

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
        DataError: the config does not fit the dataset, or the files cannot be used; the message
            names every reason.
    """
    dataset = LOADERS[cfg.name](cfg)
    if cfg.batch > len(dataset.train):
        raise DataError(
            f"data.batch is {cfg.batch}, more than the {len(dataset.train)} training examples of "
            f"{cfg.name}: a batch would hold an example twice. Choose a smaller data.batch."
        )
    return dataset


# --- text


def _load_text(cfg: Data) -> Dataset:
    if cfg.length is None:
        raise DataError("data.length is null; text needs the number of bytes in a window.")
    text, origin = _standard_text() if cfg.path is None else _read_files(cfg.path)
    data = np.frombuffer(text, np.uint8)
    train_runs, validation_runs = split_text(len(data), cfg.length, cfg.val_fraction, cfg.seed)
    train = Windows(data, train_runs, cfg.length, stride=max(cfg.length // PHASES, 1))
    validation = Windows(data, validation_runs, cfg.length, stride=cfg.length)
    train_bytes, validation_bytes = (int(np.diff(r).sum()) for r in (train_runs, validation_runs))
    return Dataset(
        name="text",
        train=train,
        validation=validation,
        description=(
            f"{origin}: {len(data)} bytes; {train_bytes} to train on ({len(train)} windows "
            f"of {cfg.length}, one every {train.stride}), {validation_bytes} to validate with "
            f"({len(validation)} windows, no overlap)"
        ),
        baselines={"uniform": math.log(256), "bigram": bigram_nats(train, validation)},
        digest=_digest(data),
    )


def split_text(
    size: int, length: int, val_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Divide a stream into stretches to train on and stretches to validate with.

    Args:
        size: bytes in the stream.
        length: bytes of input in a window.
        val_fraction: share of the blocks that becomes validation, at least one block.
        seed: chooses the blocks.

    Returns:
        Two (runs, 2) int64 arrays of start and stop, which together cover the stream once;
        neighbouring blocks of one kind are one run.

    Raises:
        DataError: the stream has no room for two blocks.
    """
    shortest = WINDOWS_PER_BLOCK * length + 1
    block = max(size // BLOCKS, shortest)
    blocks = size // block
    if blocks < 2:
        raise DataError(
            f"data.length is {length}, too long for a text of {size} bytes: a block to train on "
            f"and one to validate with need {2 * shortest} bytes. Choose a smaller data.length or "
            "give more text."
        )
    count = min(max(round(val_fraction * blocks), 1), blocks - 1)
    is_validation = np.zeros(blocks, bool)
    is_validation[np.random.default_rng(seed).permutation(blocks)[:count]] = True
    changes = np.flatnonzero(np.diff(is_validation)) + 1
    edges = np.concatenate([[0], changes * block, [size]])  # the last block takes the remainder
    runs = np.stack([edges[:-1], edges[1:]], axis=1)
    of_validation = is_validation[np.concatenate([[0], changes])]
    return runs[~of_validation], runs[of_validation]


def bigram_nats(train: Windows, validation: Windows) -> float:
    """Score a bigram model of the training bytes on exactly the targets that evaluation scores.

    Witten-Bell smoothing, which has nothing to tune: with `c(ab)` the count of byte b after a,
    and `k(a)` the number of different bytes seen after a,
    `p(b | a) = (c(ab) + k(a) p(b)) / (c(a) + k(a))`, where `p(b) = (c(b) + 1) / (n + 256)`.

    Returns:
        Mean negative log-likelihood in nats per byte.
    """
    pairs = np.zeros((256, 256), np.int64)
    for start, stop in train.runs:
        for left in range(start, stop - 1, CHUNK):
            piece = train.data[left : min(left + CHUNK + 1, stop)]
            pairs += _pair_counts(piece[:-1], piece[1:])
    single = pairs.sum(axis=0)
    unigram = (single + 1) / (single.sum() + 256)
    kinds = (pairs > 0).sum(axis=1, keepdims=True)
    seen = pairs.sum(axis=1, keepdims=True)
    kinds = np.where(seen == 0, 1, kinds)  # after an unseen byte the unigram alone speaks
    log_p = np.log((pairs + kinds * unigram) / (seen + kinds))

    scored = np.zeros((256, 256), np.int64)
    rows = max(CHUNK // validation.length, 1)
    for first in range(0, len(validation), rows):
        batch = validation.take(np.arange(first, min(first + rows, len(validation))))
        scored += _pair_counts(batch["inputs"], batch["targets"])
    return float(-(scored * log_p).sum() / scored.sum())


def _pair_counts(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    codes = left.astype(np.int64).ravel() * 256 + right.ravel()
    return np.bincount(codes, minlength=256 * 256).reshape(256, 256)


def _standard_text() -> tuple[bytes, str]:
    """The language reference inside Python's standard library, each paragraph once.

    Many topics quote one another: two bytes in five lie in a passage that occurs twice, and the
    validation blocks would mostly be known from training.
    """
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    text = "\n\n".join(dict.fromkeys(p.rstrip() for p in paragraphs if p.strip()))
    return text.encode(), "Python's language reference (pydoc_data.topics, repeats removed)"


def _read_files(path: str) -> tuple[bytes, str]:
    """Join the files that `path` names, in sorted order, with a newline between them."""
    root = Path(path).expanduser()
    skipped = 0
    if root.is_dir():
        found = sorted(p for p in root.rglob("*") if p.is_file())
        files = [p for p in found if not any(s.startswith(".") for s in p.relative_to(root).parts)]
        skipped = len(found) - len(files)
    elif root.is_file():
        files = [root]
    else:
        files = sorted(Path(p) for p in glob.glob(str(root), recursive=True) if Path(p).is_file())
    if not files:
        what = "a folder without files that are not hidden" if root.is_dir() else "nothing"
        raise DataError(
            f"data.path is {path!r}, which matches {what} (seen from {Path.cwd()}). Give a text "
            "file, a folder of text files, or a glob such as 'docs/**/*.md'."
        )
    contents: list[bytes] = []
    problems: list[str] = []
    for file in files:
        try:
            contents.append(file.read_bytes())
        except OSError as error:
            problems.append(f"data.path: {file} cannot be read: {error.strerror}.")
            continue
        if b"\0" in contents[-1]:
            problems.append(
                f"data.path: {file} looks binary (a zero byte at {contents[-1].index(0)}). Name "
                "only text files, by a glob such as 'docs/**/*.md'; re-encode UTF-16 as UTF-8."
            )
    refuse(problems)
    text = b"\n".join(contents)
    if not any(contents):
        raise DataError(f"data.path is {path!r}: its {len(files)} file(s) are empty.")
    if len(files) == 1:
        return text, str(files[0])
    names = ", ".join(str(f.relative_to(root) if root.is_dir() else f) for f in files[:FILES_NAMED])
    more = f" and {len(files) - FILES_NAMED} more" if len(files) > FILES_NAMED else ""
    hidden = f"; {skipped} hidden left out" if skipped else ""
    return text, f"{path} ({len(files)} files: {names}{more}{hidden})"


# --- the sets that scikit-learn bundles


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
            raise DataError(
                f"data.val_fraction is {cfg.val_fraction}: of the {len(members)} images of digit "
                f"{label}, {count} would be validation, and both sides need every digit. Choose a "
                "value nearer to 0.1."
            )
        in_validation[members[:count]] = True
    train, validation = np.flatnonzero(~in_validation), np.flatnonzero(in_validation)
    majority = np.bincount(targets[train]).argmax()
    return Dataset(
        name="digits",
        train=Rows(inputs[train], targets[train]),
        validation=Rows(inputs[validation], targets[validation]),
        description=_bundled("handwritten digits of 8 x 8 pixels", train, validation),
        baselines={"majority": float(np.mean(targets[validation] == majority))},
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
        raise DataError(
            f"data.val_fraction is {cfg.val_fraction}: {len(train)} training example of diabetes "
            "has no spread to standardise by. Choose a value nearer to 0.1."
        )

    def standardise(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mean, std = values[train].mean(axis=0), values[train].std(axis=0)
        return ((values - mean) / std).astype(np.float32), mean, std

    inputs, _, _ = standardise(features)
    targets, mean, std = standardise(progression)
    return Dataset(
        name="diabetes",
        train=Rows(inputs[train], targets[train]),
        validation=Rows(inputs[validation], targets[validation]),
        description=_bundled("diabetes records, 10 features each", train, validation),
        # Standardised targets have a training mean of 0: predicting it leaves the target itself.
        baselines={"mean": float(np.mean(targets[validation].astype(np.float64) ** 2))},
        digest=_digest(features, progression),
        target_mean=float(mean[0]),
        target_std=float(std[0]),
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
