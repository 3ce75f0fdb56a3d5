"""Regenerates the table of layer twins on the installed versions: `make parity`.

    python -m benchmarks.parity [--only WORD ...] [--json FILE]

Each pair of layers gets the same weights and is compared in every bit, in float32 and bfloat16,
eager and jitted, forward and backward (`compare.py`). The exit code is 1 if anything is not as
`pairs.py` and `gaps.py` expect, in either direction: a pair that is no longer exact, or a known
difference that has gone. The expectations are those of a CPU.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from benchmarks.compare import DTYPES, MODES, QUANTITIES, Cell, Pair, compare
from benchmarks.gaps import GAPS, Gap
from benchmarks.pairs import PAIRS
from benchmarks.private import PRIVATE

_NAME, _COLUMN, _WIDTH = 30, 9, 100  # characters


@dataclass(frozen=True)
class Row:
    """A pair, measured: its cells, and a sentence on each thing that was not expected."""

    pair: Pair
    cells: Sequence[Cell]
    unexpected: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        told = {key: getattr(self.pair, key) for key in ("name", "differs", "varies")}
        told |= {key: getattr(self.pair, key) for key in ("why", "fix", "note")}
        cells = [dataclasses.asdict(cell) for cell in self.cells]
        return {**told, "cells": cells, "unexpected": self.unexpected}


@dataclass(frozen=True)
class Probe:
    """A gap, measured: what shows it, nothing if it is closed; and what was not expected."""

    gap: Gap
    evidence: str
    unexpected: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        told = {key: getattr(self.gap, key) for key in ("name", "issue", "meaning", "then")}
        return {**told, "evidence": self.evidence, "unexpected": self.unexpected}


def measure(pair: Pair) -> Row:
    """Compares a pair in each dtype and judges it by what it declares.

    Whatever an installed version raises is a finding on that pair, not the end of the table.
    """
    cells: list[Cell] = []
    unexpected: list[str] = []
    for dtype in DTYPES:
        try:
            found = compare(pair, dtype)
        except Exception as error:
            unexpected.append(f"{pair.name} cannot be compared in {dtype}: {_reason(error)}")
            continue
        cells += found
        for quantity in QUANTITIES:
            group = [cell for cell in found if cell.quantity == quantity]
            unexpected += _judge(pair, f"{dtype} {quantity}", group)
    return Row(pair, cells, unexpected)


def _judge(pair: Pair, label: str, group: Sequence[Cell]) -> list[str]:
    """What was not expected of one quantity in one dtype, eager and jitted together."""
    wrong = [cell for cell in group if not cell.exact]
    if label in pair.varies:
        return []
    if wrong and label not in pair.differs:
        found = "; ".join(f"{cell.mode} {_size(cell)}" for cell in wrong)
        return [f"{pair.name} is no longer exact in {label}: {found}."]
    if not wrong and label in pair.differs:
        return [
            f"{pair.name} is exact now in {label}: a known difference has gone. Take it out of "
            f"`differs` in benchmarks/pairs.py and review its fix: {pair.fix}."
        ]
    return []


def _numbers(release: str) -> list[int]:
    """A version, to be compared: '0.12.8' comes before '0.12.12'."""
    return [int(part) for part in release.split(".")]


def probe(gap: Gap) -> Probe:
    """Looks whether a gap is still there."""
    try:
        evidence = gap.probe()
    except Exception as error:
        return Probe(gap, "", [f"`{gap.name}` cannot be measured: {_reason(error)}"])
    if evidence:
        return Probe(gap, evidence, [])
    if gap.closed_in and _numbers(version("flax")) >= _numbers(gap.closed_in):
        return Probe(gap, f"closed in flax {gap.closed_in}, open in earlier versions", [])
    if gap.breaks:
        return Probe(gap, "", [f"`{gap.name}` no longer holds: {gap.breaks}."])
    if gap.issue is None:
        closed = f"`{gap.name}` no longer holds, so there is no need to {gap.meaning}."
    else:
        closed = (
            f"flax #{gap.issue} is closed upstream: `{gap.name}` no longer holds. Now {gap.then}. "
            f"Drop the refusals and work-arounds for it: `git grep -n {gap.issue}`."
        )
    return Probe(gap, "", [f"{closed} Take it out of benchmarks/gaps.py."])


def main(
    argv: Sequence[str] | None = None,
    pairs: Sequence[Pair] = PAIRS,
    gaps: Sequence[Gap] = (*GAPS, *PRIVATE),
) -> int:
    """Measures and prints. Returns the exit code: 0 all as expected, 1 not so (2 is for usage)."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.parity",
        description="Compares the layers of Linen and nnx on the installed versions.",
    )
    parser.add_argument("--only", nargs="+", metavar="WORD", help="only rows with a WORD in them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was measured")
    args = parser.parse_args(argv)
    words = [word.lower() for word in args.only or [""]]
    pairs = [pair for pair in pairs if any(word in pair.name.lower() for word in words)]
    gaps = [gap for gap in gaps if any(word in f"{gap.name} {gap.issue}".lower() for word in words)]
    if not pairs and not gaps:
        parser.error(f"no row is called anything like {' or '.join(words)}")
    jax.config.update("jax_platforms", "cpu")
    installed = {name: version(name) for name in ("flax", "jax", "jaxlib")}
    print("On a CPU, with " + ", ".join(f"{name} {number}" for name, number in installed.items()))
    rows = _print_pairs(pairs)
    probes = _print_gaps(gaps)
    unexpected = [line for result in (*rows, *probes) for line in result.unexpected]
    print(f"\n{len(pairs)} pairs and {len(gaps)} gaps: {len(unexpected)} unexpected findings")
    for line in unexpected:
        _print_wrapped(line, "! ")
    if args.json:
        content = {
            "versions": installed,
            "pairs": [row.to_dict() for row in rows],
            "gaps": [result.to_dict() for result in probes],
            "unexpected": unexpected,
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if unexpected else 0


def _print_pairs(pairs: Sequence[Pair]) -> list[Row]:
    """Prints the table, each line as it is measured, and the notes below it."""
    if not pairs:
        return []
    print("Pairs with the same weights: `=` equal in every bit, else the largest difference\n")
    for repeats, labels, span in ((1, DTYPES, 4), (2, MODES, 2), (4, QUANTITIES, 1)):
        print((" " * _NAME + "".join(f"{x:{span * _COLUMN}}" for x in labels * repeats)).rstrip())
    rows = []
    for pair in pairs:
        print(f"{pair.name:{_NAME}}", end="", flush=True)
        rows.append(row := measure(pair))
        cells = {(cell.dtype, cell.mode, cell.quantity): cell for cell in row.cells}
        found = [cells.get(key) for key in itertools.product(DTYPES, MODES, QUANTITIES)]
        line = "".join(f"{_short(cell):{_COLUMN}}" for cell in found)
        print(line + "!" if row.unexpected else line.rstrip(), flush=True)
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        reasons.setdefault((row.pair.why, row.pair.fix), []).append(row)
    reasons.pop(("", ""), None)
    for (why, fix), group in reasons.items():
        print()
        for row in group:
            print(row.pair.name)
            for dtype in DTYPES:
                wrong = [cell for cell in row.cells if cell.dtype == dtype and not cell.exact]
                if wrong:
                    print(f"  {dtype}: up to {_size(max(wrong, key=lambda cell: cell.largest))}")
        _print_wrapped(f"why: {why}")
        _print_wrapped(f"fix: {fix}")
    print("\nTo know when converting")
    for row in rows:
        if row.pair.note:
            _print_wrapped(f"{row.pair.name}: {row.pair.note}")
    return rows


def _print_gaps(gaps: Sequence[Gap]) -> list[Probe]:
    if not gaps:
        return []
    print("\nKnown gaps and defaults that differ\n")
    probes = [probe(gap) for gap in gaps]
    for result in probes:
        gap = result.gap
        issue = f" (flax #{gap.issue})" if gap.issue else ""
        print(f"{gap.name}{issue}: {'as known' if result.evidence else 'UNEXPECTED'}")
        if result.evidence:
            _print_wrapped(f"seen: {result.evidence}")
            _print_wrapped(f"so: {gap.meaning}")
    return probes


def _print_wrapped(text: str, start: str = "  ") -> None:
    print(
        textwrap.fill(text, _WIDTH, initial_indent=start, subsequent_indent=start.replace("!", " "))
    )


def _short(cell: Cell | None) -> str:
    if cell is None:
        return "?"
    if cell.exact:
        return "="
    return f"{cell.largest:.1e}" if cell.largest else "+0/-0"


def _size(cell: Cell) -> str:
    if not cell.largest:
        return "the sign of a zero"
    return f"{cell.largest:.1e}, {cell.ulps:,.1f} units in the last place, in `{cell.where}`"


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


if __name__ == "__main__":
    sys.exit(main())
