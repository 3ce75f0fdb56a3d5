"""The results of several runs, one a line: `python -m training.table runs/sweep`.

A line has the settings in which the runs differ, their lowest validation loss and, of the last
evaluation, the step and all metrics. In a pipe, or with --csv or --json, each value is whole.
"""

from training.runtime import signals

if __name__ == "__main__":
    signals.end_on_signals("")  # before the imports, which take time

import argparse
import csv
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from training.runtime import reading, vouching
from training.runtime.errors import Refused
from training.runtime.metrics import read
from training.runtime.terminal import for_errors

Row = dict[str, Any]


def results(paths: list[Path]) -> list[Row]:
    """The runs at or below the paths, the lowest validation loss first; all with the same keys.

    Raises:
        Refused: when there is none, or a file of one cannot be read.
    """
    runs = vouching.runs_below(paths)
    configs = [_settings(run) for run in runs]
    # What one of them alone can set (the heads of a transformer) follows from the model's name.
    keys = [key for key in configs[0] if all(key in config for config in configs)]
    differing = [key for key in keys if len({str(config[key]) for config in configs}) > 1]
    found = []
    for run, config in zip(runs, configs, strict=True):
        row: Row = {"run": str(run), **{key: config[key] for key in differing}}
        evaluations = [row for row in read(run) if row["split"] == "eval"]
        row["step"] = evaluations[-1]["step"] if evaluations else 0
        row["lowest loss"] = min((one["loss"] for one in evaluations), default=None)
        for name, value in (evaluations or [{}])[-1].items():
            if name not in ("step", "split"):
                row[name] = value
        found.append(row)
    names = {name: None for row in found for name in row}
    # A run that has not been evaluated yet comes last; None itself cannot be compared.
    found.sort(key=lambda row: (row["lowest loss"] is None, row["lowest loss"]))
    return [{name: row.get(name) for name in names} for row in found]


def show(paths: list[Path]) -> None:
    """Prints the runs as a table that fits the terminal; in a pipe, one line for each run."""
    rows = results(paths)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    print("\n\n".join(_blocks(cells, width)))


def _blocks(cells: list[list[str]], width: int | None) -> Iterator[str]:
    """The table as text. One that is wider than the terminal comes in several blocks, each of which
    begins with the run; a line that the terminal breaks would be no table."""
    # By columns, for their widths decide where a block ends.
    columns = list(zip(*cells, strict=True))
    name = [cell.ljust(max(map(len, columns[0]))) for cell in columns[0]]
    lines = list(name)
    for column in columns[1:]:
        wide = max(map(len, column))
        if width is not None and lines != name and len(lines[0]) + 2 + wide > width:
            yield "\n".join(lines)
            lines = list(name)
        lines = [f"{line}  {cell:>{wide}}" for line, cell in zip(lines, column, strict=True)]
    yield "\n".join(lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _settings(run: Path) -> dict[str, Any]:
    path = run / vouching.CONFIG
    with reading.named(path):
        settings = vouching.flat(reading.yaml_mapping(path))
    return {key: value for key, value in settings.items() if not vouching.is_free(key)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.table", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or folders of them")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="a list of objects, full precision")
    form.add_argument("--csv", action="store_true", help="with a heading, full precision")
    options = parser.parse_args()
    if not options.json and not options.csv:
        show(options.runs)
        return
    rows = results(options.runs)
    if options.json:
        print(json.dumps(rows, indent=1))
    else:
        writer = csv.DictWriter(sys.stdout, rows[0])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    try:
        main()
    except Refused as error:
        raise SystemExit(for_errors(error)) from None
