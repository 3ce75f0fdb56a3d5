"""Runs the benchmarks, each in a process of its own: `make bench ARGS="steps loop"`.

    steps     a step of every stage against a floor and the usual idioms      8 minutes
    loop      the training loop against the bare step; start-up               5 minutes
    growth    how the cost of a step and of suggest grows                     8 minutes

Figures go to runs/benchmarks/NAME.json, plots to NAME.png beside it. The library has benchmarks of
its own: packages/linen-nnx/benchmarks.
"""

import argparse
import subprocess
import sys
from pathlib import Path

NAMES = ("steps", "loop", "growth")
PLOTTED = ("steps", "growth")
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
