"""The results of several runs, one a line: `python -m training.table runs/sweep`.

A line has the settings in which the runs differ, their lowest validation loss and, of the last
evaluation, the step and all metrics.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import yaml
from flax.traverse_util import flatten_dict
from rich.table import Table

from training.metrics import read
from training.start import FREE
from training.terminal import CONSOLE


def table(paths: list[Path]) -> Table:
    """The runs at or below the paths, the lowest validation loss first.

    Raises:
        SystemExit: when there is none.
    """
    runs = sorted({file.parent for path in paths for file in path.rglob("config.yaml")})
    if not runs:
        raise SystemExit(f"There is no run (config.yaml) below {', '.join(map(str, paths))}.")
    files = [yaml.safe_load((run / "config.yaml").read_text()) for run in runs]
    configs = [flatten_dict(file, sep=".") for file in files]
    keys = [key for key in configs[0] if key.split(".")[0] not in FREE]
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m training.table", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or folders of them")
    CONSOLE.print(table(parser.parse_args().runs))
