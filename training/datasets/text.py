"""Windows of bytes out of any text: which files, which windows, which of them are held out, how
well the simplest model of them does.

No tokenizer: a token is a byte, 0 to 255.
"""

import dataclasses
import glob
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.build import Count, Fraction
from training import datasets
from training.datasets import Batch, Dataset, digest
from training.runtime.errors import Refused, refuse

# Training windows over each byte: of one alone, a byte would always be at the same position.
POSITIONS = 8

BLOCKS = 200  # of a text, each wholly training or wholly validation
WINDOWS_PER_BLOCK = 4  # at least, so that a short text still has whole windows on both sides
CHUNK = 1 << 22  # bytes of text counted at a time: bounds memory, not results
FILES_NAMED = 8  # in a description


@dataclass(frozen=True)
class Options(datasets.Options):
    """See `configs/data/text.yaml` for meanings and units."""

    path: str | None
    length: Count
    val_fraction: Fraction


def load(options: Options) -> Dataset:
    """Inputs and targets (length,) int32: the bytes of a text, and those that follow.

    The stream is cut into about 200 equal blocks, at least four windows long, and a seeded choice
    of them is validation (at least one block), so that no validation window shares a byte with a
    training window. Training windows begin every `length // 8` bytes, so that an epoch shows each
    byte at eight positions; validation windows every `length` bytes, so that each target is scored
    once. Baselines, in nats per byte: `uniform`, `bigram`.

    Raises:
        Refused: the files cannot be used, or the text is too short.
    """
    text, origin = read_text(options.path)
    data, length = np.frombuffer(text, np.uint8), options.length
    runs = split_text(len(data), length, options.val_fraction, options.seed)
    train = Windows(data, runs[0], length, stride=max(length // POSITIONS, 1))
    validation = Windows(data, runs[1], length, stride=length)
    train_bytes, validation_bytes = (int(np.diff(kind).sum()) for kind in runs)
    return Dataset(
        options=options,
        train=train,
        validation=validation,
        description=(
            f"{origin}: {len(data)} bytes; {train_bytes} to train on ({len(train)} windows "
            f"of {length}, one every {train.stride}), {validation_bytes} to validate with "
            f"({len(validation)} windows, no overlap)"
        ),
        digest=digest(data),
        baselines={"uniform": math.log(256), "bigram": bigram_nats(train, validation)},
        classes=256,
    )


def example(options: Options) -> Batch:
    """A batch of the text that Python brings along: a proof must not need files that may move."""
    train = load(dataclasses.replace(options, path=None)).train
    return train.take(np.arange(options.batch) % len(train))


def read_text(path: str | None) -> tuple[bytes, str]:
    """Read a text, and say where it is from.

    Args:
        path: a file; a folder, of which every file at any depth is taken that is not hidden; or a
            glob (`**` for any depth). None: the language reference in Python's standard library,
            which differs a little among Python versions. Several files are joined in the order of
            their sorted paths, with a newline between them.

    Returns:
        The bytes, and a phrase that names their origin.

    Raises:
        Refused: nothing is there, all is empty, or files cannot be read or look binary.
    """
    if path is None:
        return _standard_text(), "Python's language reference (pydoc_data.topics, repeats removed)"
    root = Path(path).expanduser()
    skipped = 0
    if root.is_dir():
        # Sorted, for each file system lists a folder in an order of its own, and the windows follow
        # it.
        found = sorted(p for p in root.rglob("*") if p.is_file())
        files = [p for p in found if not any(s.startswith(".") for s in p.relative_to(root).parts)]
        skipped = len(found) - len(files)
    elif root.is_file():
        files = [root]
    else:
        files = sorted(Path(p) for p in glob.glob(str(root), recursive=True) if Path(p).is_file())
    if not files:
        what = "a folder without files that are not hidden" if root.is_dir() else "nothing"
        raise Refused(
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
        # A model of bytes would train on anything: on an image or an index of git in the folder as
        # well.
        if b"\0" in contents[-1]:
            problems.append(
                f"data.path: {file} looks binary (a zero byte at {contents[-1].index(0)}). Name "
                "only text files, by a glob such as 'docs/**/*.md'; re-encode UTF-16 as UTF-8."
            )
    refuse(problems)
    text = b"\n".join(contents)
    if not any(contents):
        raise Refused(f"data.path is {path!r}: its {len(files)} file(s) are empty.")
    if len(files) == 1:
        return text, str(files[0])
    names = ", ".join(str(f.relative_to(root) if root.is_dir() else f) for f in files[:FILES_NAMED])
    more = f" and {len(files) - FILES_NAMED} more" if len(files) > FILES_NAMED else ""
    hidden = f"; {skipped} hidden left out" if skipped else ""
    return text, f"{path} ({len(files)} files: {names}{more}{hidden})"


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
        # One byte more than the inputs, for the last target.
        room = runs[:, 1] - runs[:, 0] - (length + 1)
        self.ends = np.cumsum(np.maximum(room // stride + 1, 0))  # windows up to each run's end

    def __len__(self) -> int:
        return int(self.ends[-1])

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Read windows: inputs and targets (rows, length) int32, values 0 to 255."""
        # All rows of a batch at once, without a loop in Python.
        run = np.searchsorted(self.ends, indices, side="right")
        first = np.where(run > 0, self.ends[run - 1], 0)
        start = self.runs[run, 0] + (indices - first) * self.stride
        rows = self.data[start[:, None] + np.arange(self.length + 1)].astype(np.int32)
        return {
            "inputs": np.ascontiguousarray(rows[:, :-1]),
            "targets": np.ascontiguousarray(rows[:, 1:]),
        }


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
        Refused: the stream has no room for two blocks.
    """
    shortest = WINDOWS_PER_BLOCK * length + 1
    block = max(size // BLOCKS, shortest)
    blocks = size // block
    if blocks < 2:
        raise Refused(
            f"data.length is {length}, too long for a text of {size} bytes: a block to train on "
            f"and one to validate with need {2 * shortest} bytes. Choose a smaller data.length or "
            "give more text."
        )
    # At least one block on either side, however small the text or the share.
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
    # One number for a pair, so that numpy can count pairs as it counts numbers.
    codes = left.astype(np.int64).ravel() * 256 + right.ravel()
    return np.bincount(codes, minlength=256 * 256).reshape(256, 256)


def _standard_text() -> bytes:
    """The language reference inside Python's standard library, each paragraph once.

    Many topics quote one another: two bytes in five lie in a passage that occurs twice, and the
    validation blocks would mostly be known from training.
    """
    from pydoc_data.topics import topics

    paragraphs = "\n\n".join(topics[name] for name in sorted(topics)).split("\n\n")
    text = "\n\n".join(dict.fromkeys(p.rstrip() for p in paragraphs if p.strip()))
    return text.encode()
