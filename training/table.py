"""The results of several runs, one a line: `python -m training.table runs/sweep`.

A line has the settings in which the runs differ, their lowest validation loss and, of the last
evaluation, the step and all metrics.
"""

import argparse
import math
from pathlib import Path
from typing import Any

from rich.table import Table

from training.runtime import reading, vouching
from training.runtime.errors import Refused
from training.runtime.metrics import read
from training.runtime.terminal import CONSOLE


def table(paths: list[Path]) -> Table:
    """The runs at or below the paths, the lowest validation loss first.

    Raises:
        Refused: when there is none, or a file of one cannot be read.
    """
    runs = sorted({file.parent for path in paths for file in path.rglob(vouching.CONFIG)})
    if not runs:
        raise Refused(f"There is no run (config.yaml) below {', '.join(map(str, paths))}.")
    files = [_config(run / vouching.CONFIG) for run in runs]
    configs = [vouching.flat(file) for file in files]
    keys = [key for key in configs[0] if not vouching.is_free(key)]
    differing = [key for key in keys if len({str(config.get(key)) for config in configs}) > 1]
    lines: list[tuple[float, list[Any]]] = []
    names: dict[str, None] = {}  # of the validation metrics, in order
    for run, config in zip(runs, configs, strict=True):
        rows = [row for row in read(run) if row["split"] == "eval"]
        last = {k: v for k, v in rows[-1].items() if k not in ("step", "split")} if rows else {}
        names |= dict.fromkeys(last)
        lowest = min((row["loss"] for row in rows), default=math.inf)
        step = rows[-1]["step"] if rows else 0
        lines.append((lowest, [run.name, *map(config.get, differing), step, lowest, last]))
    result = Table("run", *differing, "step", "lowest loss", *names, box=None)
    for _, (*cells, last) in sorted(lines, key=lambda line: line[0]):
        cells += [last.get(name, "") for name in names]
        result.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in cells))
    return result


def _config(path: Path) -> dict[str, Any]:
    with reading.named(path):
        return reading.yaml_mapping(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m training.table", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or folders of them")
    try:
        CONSOLE.print(table(parser.parse_args().runs))
    except Refused as error:
        raise SystemExit(str(error)) from None
