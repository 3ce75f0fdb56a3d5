"""`metrics.jsonl`: the record of a run, one JSON object a line, floats in full precision.

    {"step": k, "split": "train", "loss": ..., "lr": ..., "grad_norm_encoder": ..., ...}
    {"step": k, "split": "eval", "loss": ..., ...}

It holds what is a function of the configuration alone, so that two runs can be compared by bytes;
speeds and dates are elsewhere. A train row with step k has the loss of the k-th batch, taken before
update k; an eval row is taken after it.
"""

import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linen_nnx.book.reading import parse_json

from training.runtime import reading
from training.runtime.tally import Tally

Row = dict[str, Any]

FILE = "metrics.jsonl"
SPLITS = ("train", "eval")
STEP = re.compile(rb'\{"step": (\d{1,18}),')


class Metrics:
    """The open file of one run, cut back to the step that the run goes on from.

    Attributes:
        last: the newest row of each split.
        eval_losses: the loss of every eval row, in order.
        tally: the digests of the rows, for a checkpoint to note.
    """

    def __init__(self, run_dir: Path, step: int, *, write: bool = True) -> None:
        """Keeps the rows up to and including `step`, drops later ones and a torn last line.

        Args:
            run_dir: where the file is.
            step: what the run goes on from.
            write: False leaves the file to another process, and reads it alone.

        Raises:
            Refused: for a row that cannot be read.
        """
        self.last: dict[str, Row] = {}
        self.eval_losses: list[float] = []
        self.tally = Tally()
        path = run_dir / FILE
        # Written beside it and renamed, so that a kill in between leaves the old file whole.
        part = path.with_suffix(".part")
        with open(part if write else os.devnull, "wb") as file:
            for line, row in numbered(run_dir):
                if row["step"] <= step:
                    self._note(line, row)
                    file.write(line)
            file.flush()
            if write:
                os.fsync(file.fileno())
                part.replace(path)
        self._file = open(path, "ab") if write else None  # noqa: SIM115 (open as long as the run)

    def write(self, row: Row) -> None:
        """Appends one row."""
        # Python writes a float with as many digits as lead back to it: equal bytes are equal
        # floats.
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        self._note(line, row)
        if self._file is not None:
            self._file.write(line)

    def sync(self) -> None:
        """Puts all rows on the disk; before a checkpoint is, so that no row is ever missing."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()

    def _note(self, line: bytes, row: Row) -> None:
        self.tally.add(line, row["step"])
        self.last[row["split"]] = row
        if row["split"] == "eval":
            self.eval_losses.append(row["loss"])


def read(run_dir: Path) -> Iterator[Row]:
    """The rows of a run; without a last line that was not written to its end.

    Raises:
        Refused: for a row that cannot be read, by its number.
    """
    return (row for _, row in numbered(run_dir))


def numbered(run_dir: Path) -> Iterator[tuple[bytes, Row]]:
    """The same, each with the bytes of its line."""
    path, number = run_dir / FILE, 0
    # A run that has not come to its first row has no file, which is no fault.
    if not path.exists():
        return
    hint = (
        "Put the file back from a copy; or take that line out, and go on without it by "
        "checkpoint.verify=false."
    )
    with reading.named(path, hint):
        for number, line in enumerate(reading.whole_lines(path), 1):
            try:
                yield line, _row(line)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from None


def step_of(line: bytes) -> int | None:
    """The step of a row by the beginning of its line, which takes less time than reading all of it;
    None where it does not begin as a row."""
    match = STEP.match(line)
    return int(match[1]) if match else None


def _row(line: bytes) -> Row:
    """A line as a row. Raises `ValueError` for what no run has written."""
    row = parse_json(line)
    if not isinstance(row, dict):
        raise ValueError(f"it is a {type(row).__name__}, expected a mapping")
    if type(row.get("step")) is not int or row.get("split") not in SPLITS:
        raise ValueError("it has no step, or no split that is train or eval")
    for name, value in row.items():
        # `type() in`, for True is an int to isinstance, and JSON of Python reads NaN.
        is_number = type(value) in (int, float) and math.isfinite(value)
        if name != "split" and not is_number:
            raise ValueError(f"its {name} is no finite number")
    if "loss" not in row:
        raise ValueError("it has no loss")
    return row
