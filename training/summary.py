"""The words a run opens and closes with."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linen_nnx.book.tree import flatten
from omegaconf import OmegaConf

from configs.schema import Optimizer
from training import chains
from training.assemble import Setup
from training.datasets import Dataset
from training.optimizer import own_rate
from training.runtime.cli import CONFIGS
from training.runtime.metrics import Metrics
from training.runtime.view import WHOLE

FAR = 5  # a learning rate so many times another is worth a word


def opening(setup: Setup, step: int) -> str:
    """What is trained, on what, from where, on which devices if on several."""
    cfg = setup.cfg
    counts = dict.fromkeys(setup.parts, 0)
    for path, spec in _parameters(setup).items():
        counts[setup.view.part_of(path)] += math.prod(spec.shape)
    forms = {part or WHOLE: form for part, form in setup.stage.forms.items()}
    parts = ", ".join(f"{part} {forms[part]} {n:,}" for part, n in counts.items())
    begin = f"going on from step {step}" if step else "from scratch"
    lines = [
        f"{cfg.name} at stage {cfg.stage}: {cfg.model['family']} with {sum(counts.values()):,} "
        f"parameters ({parts})",
        f"data: {setup.dataset.description}",
        f"run: {Path(cfg.run_dir)}, {begin}",
        *_learning_rate(cfg.optimizer, cfg.steps),
    ]
    if devices := setup.layout.describe(setup.program.abstract):
        lines.append(f"mesh: {devices}")
    if not step:
        lines.append(parameters(setup))
    return "\n".join(lines)


def _parameters(setup: Setup) -> dict[str, Any]:
    """The shape of each parameter, by its path at the stage."""
    return flatten(setup.stage.abstract()["params"])


def _learning_rate(cfg: Optimizer, steps: int) -> Iterator[str]:
    """What a person should know who, say, gave an experiment another optimizer than its own."""
    has_own = own_rate(cfg) is not None
    name = cfg.name if cfg.chain is not None else "the family's own"
    yield f"optimizer: {name}, " + ("lr of its chain" if has_own else _run_rate(cfg))
    for name, reason in chains.depending_on_stage(cfg.chain or []).items():
        yield (
            f"{name} {reason}: the curve may be another one at another stage (docs/optimizers.md)"
        )
    updates = steps // cfg.accumulate
    if cfg.warmup >= updates and not has_own:
        yield (
            f"optimizer.warmup is {cfg.warmup} updates, and the run has {updates}: the learning "
            "rate never reaches optimizer.lr"
        )


def _run_rate(cfg: Optimizer) -> str:
    """The highest learning rate of the run's schedule, with a word where it is far from usual."""
    file = CONFIGS / "optimizer" / f"{cfg.name}.yaml"
    options = OmegaConf.load(file) if file.exists() else OmegaConf.create()
    own = OmegaConf.select(options, "lr", throw_on_resolution_failure=False)
    if not isinstance(own, float) or own / FAR < cfg.lr < own * FAR:
        return f"lr {cfg.lr:g}"
    return f"lr {cfg.lr:g}, {cfg.lr / own:.3g} times the {own:g} of optimizer={cfg.name}"


def parameters(setup: Setup) -> str:
    """A table of the parameters by module, of all parts: count, bytes, dtypes."""
    rows: dict[str, list[Any]] = {}
    for path, spec in _parameters(setup).items():
        part, *names = path.split("/")
        for module in {"/".join((part, *names[:-1][:2])), part}:
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


def closing(dataset: Dataset, metrics: Metrics) -> str:
    """Last losses beside the baselines."""
    last = metrics.last
    lines = [f"finished at step {max(row['step'] for row in last.values())}"]
    for split, title in (("train", "train, batch"), ("eval", "validation, step")):
        if split not in last:
            continue
        title = f"{title} {last[split]['step']}"
        values = {k: v for k, v in last[split].items() if k in ("loss", "accuracy")}
        text = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        lines.append(f"  {title:<22}{text}")
    for name, value in dataset.baselines.items():
        lines.append(f"  baseline {name:<13}{value:.4f}")
    return "\n".join(lines)
