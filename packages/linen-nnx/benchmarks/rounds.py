"""Interleaved rounds: every method runs once a round, and ratios are taken within a round.

A machine that slows down for a second slows a round, not a method. What counts is the median over
rounds.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Result = TypeVar("Result")
Curves = dict[str, dict[str, dict[str, float]]]  # {curve: {x: figures}}


def interleave(methods: Mapping[str, Callable[[], Result]], rounds: int) -> dict[str, list[Result]]:
    """What each method returned in each round: the time that it took, say."""
    names = list(methods)
    results: dict[str, list[Result]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            results[name].append(methods[name]())
    return results


def table(title: str, rows: Sequence[Sequence[str]]) -> None:
    """Prints rows in columns; the first row is the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    print(f"\n{title}")
    for row in rows:
        cells = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        print("  " + "  ".join(cells))


def save(path: Path | None, content: Any) -> None:
    """Writes figures as JSON, if a path is given."""
    if path is not None:
        path.write_text(json.dumps(content, indent=1) + "\n")


def plot(path: Path, curves: Curves) -> None:
    """Draws seconds and memory of every curve, on logarithmic axes."""
    import matplotlib.pyplot as plt

    rows = -(-len(curves) // 2)
    figure, grid = plt.subplots(rows, 2, figsize=(8, 3.2 * rows), squeeze=False)
    axes = list(grid.flat)
    for spare in axes[len(curves) :]:
        spare.remove()
    for axis, (title, points) in zip(axes, curves.items(), strict=False):
        x = [float(key) for key in points]
        seconds = [p["seconds"] for p in points.values()]
        axis.loglog(x, seconds, "o-")
        decades = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))
        axis.set_ylim(10.0 ** decades[0], 10.0 ** decades[1])
        axis.set_ylabel("seconds")
        other = axis.twinx()
        memory = [p["memory_mb"] for p in points.values()]
        other.plot(x, memory, "s:", color="tab:gray")
        other.set_ylabel("peak memory, MB", color="tab:gray")
        other.set_ylim(0, 1.15 * max(memory))
        axis.set_title(title)
        axis.set_xticks(x, [f"{value:g}" for value in x])
        axis.minorticks_off()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def report(curves: Curves, json_path: Path | None, png: Path | None) -> None:
    """Prints a table for each curve; writes the figures and draws them, if paths are given."""
    for title, points in curves.items():
        names = list(next(iter(points.values())))
        rows = [["", *names]]
        rows += [[x, *(f"{found[name]:.4g}" for name in names)] for x, found in points.items()]
        table(title, rows)
    save(json_path, curves)
    if png:
        plot(png, curves)
