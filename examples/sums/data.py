"""Sums such as `27+8=35.`, read from text files in batches of like lengths.

The files are written when they are not there, and read line by line: no more is held than a batch
of each length. `Buckets` is an iterator of one's own that a run resumes exactly.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.build import Count
from training import datasets
from training.datasets import Dataset

SYMBOLS = " 0123456789+=."  # the first one fills up
FILES = 4  # the first is for validation


@dataclass(frozen=True)
class Options(datasets.Options):
    """See `configs/data/sums.yaml` for meanings."""

    path: str
    sums: Count
    digits: Count
    step: Count


class Buckets:
    """Batches of lines whose lengths, rounded up to a multiple of `step`, are the same.

    To train on, the files are read again and again; to validate with, once, and then the batches
    that are not full are given as they are.
    """

    def __init__(self, files: list[Path], options: Options, repeats: bool) -> None:
        self.files, self.options, self.repeats = files, options, repeats
        self.file, self.byte = 0, 0
        self.waiting: dict[str, list[str]] = {}

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return Buckets(self.files, self.options, self.repeats)

    def __next__(self) -> dict[str, np.ndarray]:
        while (line := self._line()) is not None:
            length = -(-len(line) // self.options.step) * self.options.step
            bucket = self.waiting.setdefault(str(length), [])
            bucket.append(line)
            if len(bucket) == self.options.batch:
                return batch(self.waiting.pop(str(length)), length)
        if not self.waiting:
            raise StopIteration
        length, lines = self.waiting.popitem()
        return batch(lines, int(length))

    def get_state(self) -> dict[str, Any]:
        """Where in which file, and the lines that wait for others of their length."""
        return {"file": self.file, "byte": self.byte, "waiting": self.waiting}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to what `get_state` returned."""
        self.file, self.byte = state["file"], state["byte"]
        self.waiting = {length: list(lines) for length, lines in state["waiting"].items()}

    def _line(self) -> str | None:
        """The next line; None after the last."""
        while self.repeats or self.file < len(self.files):
            with self.files[self.file % len(self.files)].open("rb") as file:
                file.seek(self.byte)
                line = file.readline()
                self.byte = file.tell()
            if line:
                return line.decode().strip()
            self.file, self.byte = self.file + 1, 0
        return None


def batch(lines: list[str], length: int) -> dict[str, np.ndarray]:
    """Lines as symbols (lines, length - 1): inputs, the symbols after them, and what counts.

    real: bool, whether an input is a symbol of a line. weights: float32, 1 for a symbol after `=`.
    """
    rows = [[SYMBOLS.index(symbol) for symbol in line.ljust(length)] for line in lines]
    symbols = np.array(rows, np.int32)
    after = np.cumsum(symbols == SYMBOLS.index("="), axis=1)[:, :-1] > 0
    targets = symbols[:, 1:]
    return {
        "inputs": symbols[:, :-1],
        "real": symbols[:, :-1] > 0,
        "targets": targets,
        "weights": (after & (targets > 0)).astype(np.float32),
    }


def load(options: Options) -> Dataset:
    """Writes the files if need be, and reads them in batches."""
    folder = Path(options.path)
    files = [folder / f"sums{number}.txt" for number in range(FILES)]
    for number, text in enumerate(_texts(options)):
        if not files[number].exists():
            folder.mkdir(parents=True, exist_ok=True)
            files[number].write_text(text)
    contents = b"".join(file.read_bytes() for file in files)
    return Dataset(
        options,
        train=Buckets(files[1:], options, repeats=True),
        validation=Buckets(files[:1], options, repeats=False),
        description=f"{options.sums} sums in {FILES} files of {folder}",
        digest=hashlib.sha256(contents).hexdigest()[:16],
        classes=len(SYMBOLS),
    )


def example(options: Options) -> dict[str, np.ndarray]:
    """A batch without the files."""
    lines = next(_texts(options)).splitlines()[: options.batch]
    return batch(lines, max(map(len, lines)))


def _texts(options: Options) -> Iterator[str]:
    """The text of each file."""
    random = np.random.default_rng(options.seed)
    for _ in range(FILES):
        digits = random.integers(1, options.digits + 1, (options.sums // FILES, 2))
        terms = random.integers(0, 10**digits)
        yield "".join(f"{a}+{b}={a + b}.\n" for a, b in terms)
