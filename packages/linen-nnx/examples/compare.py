"""Compares the losses of two runs at the steps that both have: `compare.py ONE.json TWO.json`."""

import json
import sys
from pathlib import Path


def main() -> None:
    one, two = (_losses(Path(file)) for file in sys.argv[1:])
    both = sorted(one.keys() & two.keys())
    if not both:
        raise SystemExit("the two runs have no step in common")
    same = sum(one[step] == two[step] for step in both)
    worst = max(abs(one[step] - two[step]) / abs(one[step]) for step in both)
    print(
        f"steps {both[0]} to {both[-1]}: {same} of {len(both)} losses equal in every bit,", end=" "
    )
    print(f"largest relative difference {worst:.0e}")


def _losses(file: Path) -> dict[int, float]:
    return {int(step): float.fromhex(loss) for step, loss in json.loads(file.read_text()).items()}


if __name__ == "__main__":
    main()
