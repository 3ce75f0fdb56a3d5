"""Curves of several runs in one picture: `python -m training.plot runs/a runs/b`.

Training is a line, validation has dots. A run that has changed stage is one line, with a mark where
it moved. --text draws in the terminal instead, and needs no matplotlib.
"""

from training.runtime import signals

if __name__ == "__main__":
    signals.end_on_signals("")  # before the imports, which take time

import argparse
import math
import shutil
from dataclasses import dataclass
from pathlib import Path

from training.runtime import reading, vouching
from training.runtime.environment import installation
from training.runtime.errors import Refused
from training.runtime.metrics import read
from training.runtime.terminal import for_errors

Points = list[tuple[int, float]]
HEIGHT = 16  # lines of a picture in the terminal
MARKS = "ox+*#@%&"  # of the runs in the terminal, in order


@dataclass(frozen=True)
class Curve:
    """One metric of one run.

    Attributes:
        name: of the run.
        train, evaluation: (step, value) of each row.
        stages: (step from which on, stage), in order; the first is where it began.
    """

    name: str
    train: Points
    evaluation: Points
    stages: list[tuple[int, str]]


def curves(paths: list[Path], metric: str) -> list[Curve]:
    """The runs at or below the paths.

    Raises:
        Refused: when there is none, one has no such metric, or a file cannot be read.
    """
    return [_curve(run, metric) for run in vouching.runs_below(paths)]


def _curve(run: Path, metric: str) -> Curve:
    points: dict[str, Points] = {"train": [], "eval": []}
    known: set[str] = set()
    for row in read(run):
        known |= row.keys() - {"step", "split"}
        if metric in row:
            points[row["split"]].append((row["step"], row[metric]))
    if not any(points.values()):
        raise Refused(f"{run} has no metric {metric}; it has {', '.join(sorted(known)) or 'none'}.")
    with reading.named(run / vouching.CONFIG):
        config = reading.yaml_mapping(run / vouching.CONFIG)
        vouching.check_recorded(config)
    # Runs of earlier versions say at which stage they are, and not since when.
    stages = config.get("stages", {"0": config.get("stage", "")})
    moves = sorted((int(step), str(stage)) for step, stage in stages.items())
    return Curve(str(run), points["train"], points["eval"], moves)


def draw(found: list[Curve], metric: str, path: Path, *, log: bool) -> None:
    """Writes the picture, in the format of the file's ending."""
    # Without pyplot, which would look for a screen.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(found):
        color = f"C{number % 10}"
        name = f"{curve.name}, {' -> '.join(stage for _, stage in curve.stages)}"
        # Equal curves lie on each other, as those of two stages do: the lower ones are wider.
        wide = 1 + min(len(found) - 1 - number, 2)
        if curve.train:
            axes.plot(*zip(*curve.train, strict=True), color=color, linewidth=wide, label=name)
            name = ""
        if curve.evaluation:
            style = {"marker": "o", "markersize": 4 + wide, "markeredgecolor": "black"}
            axes.plot(*zip(*curve.evaluation, strict=True), color=color, label=name, **style)
        for step, stage in curve.stages[1:]:
            # A mark and not another colour: it is one curve, and that it goes on is what is to be
            # seen.
            axes.axvline(step, color=color, linewidth=0.8, linestyle=":")
            label = {"rotation": 90, "fontsize": 8, "color": color, "va": "top", "ha": "right"}
            # Above the axis the curves cannot run through the words.
            axes.text(step, 0.99, stage, transform=axes.get_xaxis_transform(), **label)
    axes.set(xlabel="step", ylabel=metric, yscale="log" if log else "linear")
    axes.legend(title="line: training, dots: validation", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def text(found: list[Curve], metric: str, width: int, *, log: bool) -> str:
    """The same in characters: training where there is any, else validation."""
    shown = [curve.train or curve.evaluation for curve in found]
    # A logarithm of what is not positive is none: then the axis stays as it is.
    scale = math.log10 if log and all(value > 0 for one in shown for _, value in one) else float
    values = [scale(value) for one in shown for _, value in one]
    low, high = min(values), max(values)
    last = max(step for one in shown for step, _ in one)
    margin = 10
    columns = width - margin
    grid = [[" "] * columns for _ in range(HEIGHT)]

    def column(step: int) -> int:
        return min(columns - 1, step * columns // max(last, 1))

    for number, one in enumerate(shown):
        for step, value in one:
            height = (scale(value) - low) / (high - low or 1) * (HEIGHT - 1)
            grid[HEIGHT - 1 - round(height)][column(step)] = MARKS[number % len(MARKS)]
    ends = {
        0: max(v for one in shown for _, v in one),
        HEIGHT - 1: min(v for one in shown for _, v in one),
    }
    lines = [f"{metric}, {'validation' if not found[0].train else 'training'}"]
    for number, row in enumerate(grid):
        label = f"{ends[number]:.4g}" if number in ends else ""
        lines.append(f"{label:>{margin - 2}} |{''.join(row)}".rstrip())
    lines.append(f"{'step':>{margin - 2}} +{'-' * columns}")
    lines.append(f"{'0':>{margin}}{last:>{columns}}")
    for number, curve in enumerate(found):
        moves = ", ".join(f"{stage} from step {step}" for step, stage in curve.stages)
        lines.append(f"{MARKS[number % len(MARKS)]}  {curve.name}: {moves}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.plot", description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or folders of them")
    parser.add_argument("--metric", default="loss", help="of metrics.jsonl; default: loss")
    parser.add_argument("--log", action="store_true", help="a logarithmic axis")
    parser.add_argument("--text", action="store_true", help="draw in the terminal")
    parser.add_argument("-o", "--output", type=Path, default=Path("curves.png"), metavar="FILE")
    options = parser.parse_args()
    found = curves(options.runs, options.metric)
    if options.text:
        print(text(found, options.metric, shutil.get_terminal_size().columns, log=options.log))
        return
    try:
        draw(found, options.metric, options.output, log=options.log)
    except ImportError:
        command = installation("-e '.[plot]'")
        raise Refused(
            f"matplotlib is not installed; --text does without it. To install it:\n  {command}"
        ) from None
    print(f"{options.output}: {options.metric} of {len(found)} runs")


if __name__ == "__main__":
    try:
        main()
    except Refused as error:
        raise SystemExit(for_errors(error)) from None
