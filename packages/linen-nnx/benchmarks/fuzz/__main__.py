"""Damages checkpoints, runs and rule books: `make fuzz ARGS="--count 50000 --seed 7"`.

Every input is a small checkpoint with one file damaged, given to a command of the converter. Right
are: done, or refused with a message (exit code 1). Found are: a traceback, more than 2 s of
processor time, more than 256 MB of memory, a process that dies. Each input follows from the seed
and its number alone: `--only NUMBER` runs one again, and shows the whole of it.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.fuzz.attack import Attack, Outcome, run_all


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--count", type=int, default=50_000, help="how many inputs")
    parser.add_argument("--seed", type=int, default=0, help="from which all inputs follow")
    parser.add_argument("--only", type=int, metavar="NUMBER", help="one input, in this process")
    parser.add_argument("--start", type=int, default=0, help="the first number, with --log")
    parser.add_argument("--log", type=Path, help="run in this process; outcomes go here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.only is not None:
            print(Attack(Path(folder), options.seed).run(options.only, say=True))
            return 0
        if options.log is not None:
            Attack(Path(folder), options.seed).run_from(options.start, options.count, options.log)
            return 0
        outcomes = run_all(Path(folder), options.seed, options.count)
    return _report(outcomes, options.count)


def _report(outcomes: list[Outcome], count: int) -> int:
    found = [outcome for outcome in outcomes if outcome.fault]
    for outcome in found[:50]:
        print(outcome)
    refused = sum(outcome.code == 1 for outcome in outcomes)
    slowest = max(outcomes, key=lambda outcome: outcome.seconds)
    largest = max(outcomes, key=lambda outcome: outcome.megabytes)
    print(f"{count} inputs: {refused} refused, {len(outcomes) - refused - len(found)} done")
    print(f"slowest {slowest.seconds:.2f} s (input {slowest.number})")
    print(f"largest {largest.megabytes:.0f} MB (input {largest.number})")
    print(f"faults  {len(found)}")
    return int(bool(found))


if __name__ == "__main__":
    raise SystemExit(main())
