"""Times the whole training loop against the bare step, and a run from command to first step.

    python -m benchmarks.loop [--rounds 3] [--steps 100] [--json FILE]

Loop: `train.py`'s own loop on the default `lm` with everything on (data, metrics, progress,
TensorBoard, a checkpoint with its digests every 100 steps), from step 10 on, against the same
number of steps on one batch that lies on the device; alternating. Evaluation is work of its
own, and so is timed apart: its share at the default cadence.
Start-up: the whole command as a process of its own, until the first step's loss is known, with an
empty compile cache and with the one that this leaves.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import jax

from benchmarks.rounds import save, table
from benchmarks.steps import LM, prepared, stage_step
from training import compose, data, loop
from training.evaluation import evaluate
from training.runtime.program import Program

ROOT = Path(__file__).parent.parent
WARM = 10  # steps before the clock starts
START = (*LM, "stop_at=1", "log_every=1", "log.progress=false")


@contextmanager
def watched() -> Iterator[tuple[list[float], list[float]]]:
    """Notes when each step of a loop begins, and the seconds that it waits for each batch."""
    steps: list[float] = []
    waits: list[float] = []
    create, read = Program.__init__, data.TrainIterator.__next__

    def init(self: Program, *args: Any, **options: Any) -> None:
        create(self, *args, **options)
        inner: Any = self.train_step

        def train_step(state: Any, batch: Any) -> Any:
            steps.append(time.perf_counter())
            return inner(state, batch)

        train_step.lower = inner.lower  # pyrefly: ignore
        self.train_step = train_step

    def following(self: data.TrainIterator) -> Any:
        begin = time.perf_counter()
        batch = read(self)
        waits.append(time.perf_counter() - begin)
        return batch

    with (
        mock.patch.object(Program, "__init__", init),
        mock.patch.object(data.TrainIterator, "__next__", following),
    ):
        yield steps, waits


def whole_loop(folder: Path, steps: int) -> tuple[float, list[float]]:
    """Seconds a step in the loop, and the waits for batches after the first."""
    cfg = compose(
        *LM,
        f"run_dir={folder}",
        "steps=100000",  # so that the end of the run, with its evaluation, is not reached
        f"stop_at={WARM + steps + 1}",
        "eval.every=100000",
        "log.progress=true",
    )
    with watched() as (begins, waits):
        loop.train(cfg)
    return (begins[WARM + steps] - begins[WARM]) / steps, waits[1:]


def bare_steps(stage: str, steps: int) -> float:
    """Seconds a step on one batch, one after another."""
    step = stage_step(*prepared(LM, stage))
    for _ in range(WARM):
        jax.block_until_ready(step())
    begin = time.perf_counter()
    for _ in range(steps - 1):
        step()
    jax.block_until_ready(step())
    return (time.perf_counter() - begin) / steps


def evaluation() -> float:
    """Seconds of one reading of the validation set, as the default does it."""
    setup, _ = prepared(LM, "nnx_in_linen")
    state = setup.program.init()
    evaluate(setup, state)
    begin = time.perf_counter()
    evaluate(setup, state)
    return time.perf_counter() - begin


def first_step(folder: Path, cache: Path) -> float:
    """Seconds from the command to the first loss in metrics.jsonl."""
    settings = [*START, f"run_dir={folder}", f"compile_cache={cache}"]
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *settings], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    rows = folder / "metrics.jsonl"
    while not (rows.exists() and rows.stat().st_size):
        if process.poll() is not None:
            raise SystemExit(f"train.py ended with exit code {process.returncode}")
        time.sleep(0.01)
    seconds = time.perf_counter() - begin
    process.wait()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="of one measurement of the loop")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    cold, warm, loops, bare, waits = [], [], [], [], []
    with tempfile.TemporaryDirectory() as name:
        for number in range(options.rounds):
            folder = Path(name, str(number))
            cold.append(first_step(folder / "cold", folder / "cache"))
            warm.append(first_step(folder / "warm", folder / "cache"))
        for number in range(options.rounds):
            bare.append(bare_steps("nnx_in_linen", options.steps))
            seconds, waited = whole_loop(Path(name, f"loop{number}"), options.steps)
            loops.append(seconds)
            waits += waited
    ratio = statistics.median(a / b for a, b in zip(loops, bare, strict=True))
    evaluated = evaluation()
    found = {
        "cold start": statistics.median(cold),
        "warm start": statistics.median(warm),
        "loop": statistics.median(loops),
        "bare step": statistics.median(bare),
        "loop / bare step": ratio,
        "longest wait for a batch": max(waits),
        "evaluation": evaluated,
    }
    rows = [["", ""]]
    rows += [[k, f"{v:.3f}" if "/" in k else f"{v * 1e3:.2f} ms"] for k, v in found.items()]
    table("lm, nnx_in_linen", rows[1:])
    save(options.json, {**found, "loops": loops, "bare": bare, "cold": cold, "warm": warm})


if __name__ == "__main__":
    main()
