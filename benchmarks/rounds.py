"""Interleaved rounds: every method runs once a round, and ratios are taken within a round.

A machine that slows down for a second slows a round, not a method. What counts is the median over
rounds; the spread is the distance between the quartiles.
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")


def interleave(methods: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """What each method returned in each round: the time that it took, say."""
    names = list(methods)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            results[name].append(methods[name]())
    return results


def summarise(times: dict[str, list[float]], floor: str) -> dict[str, dict[str, float]]:
    """Median seconds of each method, and median and quartiles of its ratio to `floor`."""
    result = {}
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times[floor], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        result[name] = {
            "seconds": statistics.median(values),
            "ratio": middle,
            "ratio_low": low,
            "ratio_high": high,
        }
    return result


def table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Prints rows in columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for row in rows:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        print("  " + "  ".join(cells))


def ratios(title: str, summary: Mapping[str, Mapping[str, float]]) -> None:
    """Prints what `summarise` returns."""
    rows = [["", "median", "ratio", "quartiles"]]
    for name, found in summary.items():
        spread = f"{found['ratio_low']:.3f} - {found['ratio_high']:.3f}"
        rows.append([name, f"{found['seconds'] * 1e3:.3f} ms", f"{found['ratio']:.3f}", spread])
    table(title, rows)


def save(path: Path | None, content: Any) -> None:
    """Writes figures as JSON, if a path is given."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")
