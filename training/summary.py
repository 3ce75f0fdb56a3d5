"""The words a run opens and closes with."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from configs.schema import Config
from model.stages import HALVES, STAGES
from training.board import Board
from training.data import Dataset
from training.metrics import Metrics
from training.start import flat_config
from training.state import Program


def opening(cfg: Config, dataset: Dataset, program: Program, step: int) -> str:
    """What is trained, on what, from where, on which devices if on several."""
    counts = dict.fromkeys(HALVES, 0)
    for path, spec in program.stage.abstract.items():
        if path.startswith("params/"):
            counts[path.split("/")[1]] += math.prod(spec.shape)
    form = STAGES[cfg.stage]
    halves = ", ".join(f"{half} {getattr(form, half)} {n:,}" for half, n in counts.items())
    begin = f"going on from step {step}" if step else "from scratch"
    devices = ""
    if program.layout is not None:
        devices = f"\nmesh: {program.layout.describe(program.abstract())}"
    elif jax.device_count() > 1:
        devices = f"\nmesh: 1 device of {jax.device_count()}; mesh.data=-1 uses all"
    table = "" if step else f"\n{parameters(program)}"
    return (
        f"{cfg.name} at stage {cfg.stage}: {cfg.model['family']} with {sum(counts.values()):,} "
        f"parameters ({halves})\ndata: {dataset.description}\n"
        f"run: {Path(cfg.run_dir)}, {begin}{devices}{table}"
    )


def parameters(program: Program) -> str:
    """A table of the parameters by module, of both halves: count, bytes, dtypes."""
    rows: dict[str, list[Any]] = {}
    for path, spec in program.stage.abstract.items():
        collection, half, *names = path.split("/")
        if collection != "params":
            continue
        for module in {"/".join((half, *names[:-1][:2])), half}:
            row = rows.setdefault(module, [0, 0, set()])
            row[0] += math.prod(spec.shape)
            row[1] += math.prod(spec.shape) * spec.dtype.itemsize
            row[2].add(str(spec.dtype))
    table = [("module", "parameters", "bytes", "dtype")]
    for module in sorted(rows):
        count, size, dtypes = rows[module]
        table.append((module, f"{count:,}", f"{size:,}", ", ".join(sorted(dtypes))))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in table
    )


def closing(cfg: Config, dataset: Dataset, metrics: Metrics, board: Board) -> str:
    """Last losses beside the baselines; writes the run's results to TensorBoard too."""
    last = metrics.last
    lines = [f"finished at step {max(row['step'] for row in last.values())}"]
    results: dict[str, float] = {}
    for split, title in (("train", "train, batch"), ("eval", "validation, step")):
        if split not in last:
            continue
        title = f"{title} {last[split]['step']}"
        values = {k: v for k, v in last[split].items() if k in ("loss", "accuracy")}
        results |= {f"final/{split}_{name}": value for name, value in values.items()}
        text = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        lines.append(f"  {title:<22}{text}")
    for name, value in dataset.baselines.items():
        lines.append(f"  baseline {name:<13}{value:.4f}")
    board.results(flat_config(dataclasses.asdict(cfg)), results)
    return "\n".join(lines)
