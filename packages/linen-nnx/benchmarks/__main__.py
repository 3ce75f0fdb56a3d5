"""Runs the library's benchmarks, each in a process of its own: `python -m benchmarks convert`.

    convert   the converter against copying files, and against Orbax          5 minutes
    buckets   a conversion inside a bucket against download, convert, upload  2 minutes
    growth    how a conversion's cost grows with bytes and leaves             2 minutes
    proofs    CPU seconds of suggest and verify, memory of suggest            3 minutes

Figures go to runs/benchmarks/NAME.json, plots to NAME.png beside it.
"""

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = ("convert", "buckets", "growth", "proofs")
PLOTTED = ("growth",)
FOLDER = Path("runs/benchmarks")


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=__doc__, formatter_class=form
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="which; default: all")
    names = parser.parse_args().names or NAMES
    if unknown := sorted(set(names) - set(NAMES)):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(NAMES)}")
    FOLDER.mkdir(parents=True, exist_ok=True)
    codes = []
    for name in names:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", f"{FOLDER}/{name}.json"]
        command += ["--png", f"{FOLDER}/{name}.png"] if name in PLOTTED else []
        codes.append(subprocess.run(command, check=False).returncode)
    return max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
