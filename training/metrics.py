"""`metrics.jsonl`: the record of a run, one JSON object a line, floats in full precision.

    {"step": k, "split": "train", "loss": ..., "lr": ..., "grad_norm_encoder": ..., ...}
    {"step": k, "split": "eval", "loss": ..., ...}

It holds what is a function of the configuration alone, so that two runs can be compared by bytes;
speeds and dates are elsewhere. A train row with step k has the loss of the k-th batch, taken before
update k; an eval row is taken after it.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Metrics:
    """The open file of one run, cut back to the step that the run goes on from.

    Attributes:
        last: the newest row of each split.
        eval_losses: the loss of every eval row, in order.
    """

    def __init__(self, run_dir: Path, step: int, *, write: bool = True) -> None:
        """Keeps the rows up to and including `step`, drops later ones and a torn last line.

        Args:
            run_dir: where the file is.
            step: what the run goes on from.
            write: False leaves the file to another process, and reads it alone.
        """
        self.last: dict[str, Row] = {}
        self.eval_losses: list[float] = []
        path = run_dir / "metrics.jsonl"
        part = path.with_suffix(".part")
        with open(part if write else os.devnull, "w") as file:
            for row in read(run_dir):
                if row["step"] <= step:
                    self._note(row)
                    file.write(_line(row))
            file.flush()
            if write:
                os.fsync(file.fileno())
                part.replace(path)
        self._file = open(path, "a") if write else None  # noqa: SIM115 (open as long as the run)

    def write(self, row: Row) -> None:
        """Appends one row."""
        self._note(row)
        if self._file is not None:
            self._file.write(_line(row))

    def sync(self) -> None:
        """Puts all rows on the disk; before a checkpoint is, so that no row is ever missing."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        if self._file is not None:
            self._file.close()

    def _note(self, row: Row) -> None:
        self.last[row["split"]] = row
        if row["split"] == "eval":
            self.eval_losses.append(row["loss"])


def read(run_dir: Path) -> Iterator[Row]:
    """The rows of a run; without a last line that was not written to its end."""
    path = run_dir / "metrics.jsonl"
    if path.exists():
        with open(path) as file:
            yield from (json.loads(line) for line in file if line.endswith("\n"))


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
