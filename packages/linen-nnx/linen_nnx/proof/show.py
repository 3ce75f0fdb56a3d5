"""Shows a bisection to a person: a table, a sentence on the first divergence, a plot.

        Linen               nnx             shape           error before  error after  verdict
        block_6/down        blocks/6/down   float32[2,5,8]  0             0            exact
    ->  block_7/LayerNorm   blocks/7/norm   float32[2,5,8]  0             8.1e-06 ...  DIVERGES
        block_7/up          blocks/7/up     float32[2,5,8]  8.1e-06 ...   9.4e-06 ...  DIVERGES
    ...                     (14 DIVERGES)

A model has hundreds of layers, and only those around a change of verdict are worth a line.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from linen_nnx.proof.bisect import Bisection, Layer
from linen_nnx.proof.compare import Error

_HEAD = ("", "Linen", "nnx", "shape", "error before", "error after", "verdict")
_NEAR = 3  # lines shown on either side of where the verdict changes
_COLORS = {
    "exact": "#4c78a8",
    "rounding": "#72b7b2",
    "absorbed": "#b79a20",
    "DIVERGES": "#e45756",
    "NaN": "#b3128a",
}


def table(found: Bisection) -> list[tuple[str, ...]]:
    """The rows of the table. Layers far from any change of verdict are counted, not shown."""
    lines = found.layers
    shown = _shown(found)
    rows: list[tuple[str, ...]] = [_HEAD]
    last = -1
    for number in [*shown, len(lines)]:
        if skipped := lines[last + 1 : number]:
            rows.append(("...", f"({_counted(skipped)})", "", "", "", "", ""))
        if number < len(lines):
            line = lines[number]
            mark = "->" if line is found.first else ""
            errors = _amount(line.before), _amount(line.after)
            rows.append((mark, line.linen, line.nnx, line.shape, *errors, line.verdict))
        last = number
    return rows


def _counted(lines: Sequence[Layer]) -> str:
    """How many lines have which verdict: `12 exact, 2 rounding`."""
    counts = Counter(line.verdict for line in lines)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items())


def _shown(found: Bisection) -> list[int]:
    """The numbers of the lines that the table has: around changes, the first, and all ends."""
    lines = found.layers
    shown, changes = {0}, 0
    for number, line in enumerate(lines):
        is_change = number > 0 and line.verdict != lines[number - 1].verdict
        changes += is_change
        # Three changes are enough: behind a fault rounding comes and goes from layer to layer.
        if (is_change and changes <= 3) or line is found.first:
            shown.update(range(number - _NEAR, number + _NEAR))
        # Outputs and updated leaves, which are few, and what a reader asks for.
        if not line.leaf:
            shown.add(number)
    return sorted(shown & set(range(len(lines))))


def conclusion(found: Bisection) -> Iterator[str]:
    """What was found, in sentences; then functions, findings and notes."""
    yield from _verdict(found)
    for text in found.functions:
        yield f"function {text}"
    for finding in found.findings:
        yield f"finding  {finding}"
    for note in found.notes:
        yield f"note     {note}"


def _verdict(found: Bisection) -> Iterator[str]:
    """Where the twins part, if they do, and where to look."""
    first = found.first
    if first is None:
        for line in found.layers:
            if line.verdict in ("rounding", "absorbed"):
                yield f"No divergence, but not every bit is equal: first at {_name(line)}."
                return
        yield "No divergence: every layer and output is exact, bit for bit."
        return
    if not first.leaf:
        yield f"First divergence: {_name(first)}, {_amount(first.after)}; the layers agree."
        return
    leaf = first.leaf.rpartition("/")[2]
    before = "nothing but inputs" if first.before is None else _amount(first.before)
    yield f"First divergence: {_name(first)}, where `{leaf}` is used."
    yield f"  error {_amount(first.after)}; of what feeds this layer: {before}"
    if first.inside:
        yield f"  What `{leaf}` is applied to agrees: look at `{leaf}` and how it is used."
    elif first.inside is False:
        yield (
            f"  What `{leaf}` is applied to differs already: look at what this layer does "
            "before it uses that, or what comes between it and the layers before."
        )


def content(found: Bisection) -> dict[str, Any]:
    """The bisection in plain JSON values; infinities and NaN as text."""
    layers = []
    for line in found.layers:
        errors = {"before": _numbers(line.before), "after": _numbers(line.after)}
        layers.append({**vars(line), **errors})
    return {
        "diverged": found.first is not None,
        "first": None if found.first is None else found.layers.index(found.first),
        "layers": layers,
        "functions": list(found.functions),
        "findings": list(found.findings),
        "notes": list(found.notes),
    }


def plot(found: Bisection, path: str | Path) -> None:
    """Writes a PNG: the error of each layer, relative, in the order of use."""
    from matplotlib.figure import Figure

    lines = [line for line in found.layers if line.after is not None]
    floor, top, heights = _heights(lines)
    figure = Figure(figsize=(min(max(8.0, 0.24 * len(lines)), 20.0), 5.6), layout="constrained")
    axes = figure.subplots()
    axes.plot(heights, color="#c8c8c8", linewidth=1, zorder=1)
    for verdict, color in _COLORS.items():
        if places := [k for k, line in enumerate(lines) if line.verdict == verdict]:
            given = [heights[k] for k in places]
            axes.scatter(places, given, 28, color, label=f"{verdict} ({len(places)})", zorder=2)
    if found.first is not None and found.first in lines:
        _mark(axes, found.first, lines.index(found.first), len(lines))
    axes.set_yscale("log")
    axes.set_ylim(floor / 2, top * 2)
    axes.minorticks_off()
    axes.margins(x=0.02)
    ticks = [tick for tick in axes.get_yticks() if floor < tick <= top]
    labels = [f"1e{round(math.log10(tick))}" for tick in ticks]
    # A logarithmic axis has no 0: the line below all others stands for it.
    axes.set_yticks([floor, *ticks], ["0", *labels])
    # More than 90 names would run into each other.
    every = math.ceil(len(lines) / 90)
    names = [_short(line.linen) for line in lines[::every]]
    axes.set_xticks(range(0, len(lines), every), names, rotation=90, fontsize=7)
    axes.set_ylabel("largest difference / largest value")
    axes.set_title("Linen against nnx, layer by layer, in the order of use", fontsize=11)
    axes.grid(axis="y", color="#ececec")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower right", ncols=5, frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def _heights(lines: Sequence[Layer]) -> tuple[float, float, list[float]]:
    """Where errors stand in the plot: its floor, which is 0, its top, which is NaN, and each."""
    errors = [line.after.relative if line.after else 0.0 for line in lines]
    finite = [error for error in errors if 0 < error < math.inf]
    # A decade of room at either end, so that no point lies on the frame.
    floor = 10.0 ** (math.floor(math.log10(min(finite, default=1e-7))) - 1)
    top = 10.0 ** (math.ceil(math.log10(max(finite, default=1e-6))) + 1)
    heights = []
    for error in errors:
        if not error < math.inf:
            heights.append(top)
        else:
            heights.append(max(error, floor))
    return floor, top, heights


def _mark(axes: Any, first: Layer, place: int, count: int) -> None:
    """Draws a line at the first divergence, with its name on the side that has more room."""
    axes.axvline(place, color=_COLORS["DIVERGES"], linewidth=1, linestyle=":", zorder=0)
    text = "first divergence: " + _name(first, between="\n")
    side, offset = ("left", (8, -4)) if place < count / 2 else ("right", (-8, -4))
    axes.annotate(
        text, (place, 0.98), offset, xycoords=("data", "axes fraction"), ha=side, va="top",
        textcoords="offset points", fontsize=9,
    )  # fmt: skip


def _name(line: Layer, between: str = " ") -> str:
    return line.linen if line.linen == line.nnx else f"{line.linen}{between}(nnx {line.nnx})"


def _short(name: str) -> str:
    return name if len(name) < 28 else f"{name[:11]}…{name[-15:]}"


def _amount(error: Error | None) -> str:
    if error is None:
        return "-"
    return "0" if error.exact else f"{error.relative:.1e} ({error.ulps:.3g} ulp)"


def _numbers(error: Error | None) -> dict[str, Any] | None:
    if error is None:
        return None
    numbers: dict[str, Any] = {}
    for name, value in error._asdict().items():
        # JSON has no infinity and no NaN.
        numbers[name] = value if math.isfinite(value) else str(value)
    return numbers
