"""Shows how the cost of a conversion grows with the bytes and with the leaves.

    python -m benchmarks.growth [--json FILE] [--png FILE] [--folder DIR]

Each figure is of a whole process, the median of three: its seconds and its peak memory.
"""

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from benchmarks.convert import RENAME, conversion, make, run
from benchmarks.rounds import Curves, report

BYTES = [(n, (1024, 1024)) for n in (16, 64, 256, 1024)]  # of 4 MB each
LEAVES = [(n, (256,)) for n in (100, 500, 2000, 10000)]


def converted(folder: Path, count: int, shape: tuple[int, ...], *how: str) -> dict[str, float]:
    """Makes a checkpoint, and times the conversion of it."""
    source, out = folder / "source", folder / "out"
    shutil.rmtree(source, ignore_errors=True)
    make(source, count, shape)
    command = conversion(source, out, RENAME, *how)
    results = [run(command, out) for _ in range(3)]
    shutil.rmtree(out)
    return {
        "seconds": statistics.median(seconds for seconds, _ in results),
        "memory_mb": max(memory for _, memory in results),
    }


def measure(folder: Path) -> Curves:
    """`{curve: {x: figures}}`."""
    curves: Curves = {"copy, by MB": {}, "--link, by leaves": {}}
    for count, shape in BYTES:
        curves["copy, by MB"][str(count * 4)] = converted(folder, count, shape)
    for count, shape in LEAVES:
        curves["--link, by leaves"][str(count)] = converted(folder, count, shape, "--link")
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--png", type=Path, help="where to draw them")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made (about 9 GB)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        curves = measure(Path(folder))
    report(curves, options.json, options.png)


if __name__ == "__main__":
    main()
