"""`metrics.jsonl`: the record of a run, one JSON object a line, floats in full precision.

    {"step": k, "split": "train", "loss": ..., "lr": ..., "grad_norm_encoder": ..., ...}
    {"step": k, "split": "eval", "loss": ..., ...}

It holds what is a function of the configuration alone, so that two runs can be compared by bytes;
speeds and dates are elsewhere. A train row with step k has the loss of the k-th batch, taken before
update k; an eval row is taken after it.
"""

import json
import os
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Metrics:
    """The open file of one run, cut back to the step that the run goes on from."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Keeps the rows up to and including `step`, drops later ones and a torn last line."""
        self._path = run_dir / "metrics.jsonl"
        self.rows = [row for row in read(run_dir) if row["step"] <= step]
        part = self._path.with_suffix(".part")
        with open(part, "w") as file:
            file.writelines(_line(row) for row in self.rows)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self._path)
        self._file = open(self._path, "a")  # noqa: SIM115 (open as long as the run)

    def write(self, row: Row) -> None:
        """Appends one row."""
        self.rows.append(row)
        self._file.write(_line(row))

    def sync(self) -> None:
        """Puts all rows on the disk; before a checkpoint is, so that no row is ever missing."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def read(run_dir: Path) -> list[Row]:
    """The rows of a run; without a last line that was not written to its end."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False) + "\n"
