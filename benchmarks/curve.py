"""Draws the README's figure: one run that changes stage three times, on one that never does.

    python -m benchmarks.curve [--png docs/curve.png] [--steps 600]

A small `lm` is trained from end to end at stage `linen`, and once more climbing the four rungs, a
quarter of the steps at each. Compared are the rows of both `metrics.jsonl`, byte by byte.
"""

import argparse
import json
import tempfile
from pathlib import Path

from linen_nnx.ladder.stage import STAGES

from training import compose, loop

SMALL = (
    "experiment=lm",
    "model.width=64",
    "model.depth=2",
    "data.length=128",
    "data.batch=16",
    "optimizer.lr=2e-3",
    "log_every=1",
    "optimizer.ema=0.99",
    "log.tensorboard=false",
    "log.samples=0",
    "eval.every=50",
)


def train(run_dir: Path, *overrides: str) -> list[bytes]:
    """Trains; returns the rows of metrics.jsonl."""
    loop.train(compose(*SMALL, f"run_dir={run_dir}", *overrides))
    return (run_dir / "metrics.jsonl").read_bytes().splitlines()


def climb(folder: Path, steps: int) -> dict[str, list[bytes]]:
    """The rows that each stage has written, of one run that climbs the ladder."""
    rows, before = {}, []
    for number, stage in enumerate(STAGES, start=1):
        run = folder / stage
        end = f"stop_at={steps * number // len(STAGES)}"
        joined = train(run, f"steps={steps}", f"stage={stage}", end, *before)
        rows[stage] = joined[sum(map(len, rows.values())) :]  # the others' come before its own
        before = [f"init_from={run}"]
    return rows


def draw(path: Path, whole: list[bytes], parts: dict[str, list[bytes]]) -> None:
    import matplotlib.pyplot as plt

    def points(rows: list[bytes], split: str) -> tuple[list[int], list[float]]:
        found = [row for row in map(json.loads, rows) if row["split"] == split]
        return [row["step"] for row in found], [row["loss"] for row in found]

    figure, (curve, difference) = plt.subplots(
        2, 1, figsize=(8, 4.4), sharex=True, height_ratios=[4, 1], layout="constrained"
    )
    curve.plot(*points(whole, "train"), color="0.82", linewidth=6, label="never changes stage")
    base = dict(zip(*points(whole, "train"), strict=True))
    for number, (stage, rows) in enumerate(parts.items()):
        colour = f"C{number}"
        steps, losses = points(rows, "train")
        curve.plot(steps, losses, color=colour, linewidth=1, label=stage)
        curve.plot(*points(rows, "eval"), "o", color=colour, markersize=4, markeredgecolor="black")
        gaps = [loss - base[step] for step, loss in zip(steps, losses, strict=True)]
        difference.plot(steps, gaps, color=colour, linewidth=2)
        for axis in (curve, difference):
            axis.axvline(steps[0], color="0.6", linewidth=0.8, linestyle=":")
    curve.set_ylabel("loss, nats per byte")
    curve.legend(title="training loss (dots: validation)", frameon=False)
    difference.set_ylabel("difference")
    difference.set_xlabel("step")
    difference.set_ylim(-1e-7, 1e-7)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--png", type=Path, default=Path("docs/curve.png"))
    parser.add_argument("--steps", type=int, default=600)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole = train(Path(folder, "whole"), f"steps={options.steps}", "stage=linen")
        parts = climb(Path(folder), options.steps)
    climbed = [row for rows in parts.values() for row in rows]
    equal = sum(a == b for a, b in zip(climbed, whole, strict=True))
    print(f"{equal} of {len(whole)} rows are equal in every byte")
    draw(options.png, whole, parts)
    raise SystemExit(int(equal != len(whole)))


if __name__ == "__main__":
    main()
