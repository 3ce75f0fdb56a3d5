"""The words a run opens and closes with."""

import math
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flax
import jax
from linen_nnx.book.stages import STAGES
from linen_nnx.book.tree import flatten
from omegaconf import OmegaConf

from configs.schema import Optimizer
from training import chains
from training.assemble import Setup
from training.optimizer import own_rate
from training.runtime import numerics
from training.runtime.checkpoints import Saved
from training.runtime.cli import CONFIGS, command
from training.runtime.environment import program
from training.runtime.metrics import Metrics
from training.runtime.terminal import clock, figures, folded, labelled
from training.runtime.view import WHOLE

FAR = 5  # a learning rate so many times another is worth a word


def opening(setup: Setup, step: int, saved: Saved | None) -> str:
    """What is trained, on what data and which device, and from where it goes on."""
    cfg = setup.cfg
    counts = dict.fromkeys(setup.parts, 0)
    for path, spec in _parameters(setup).items():
        counts[setup.view.part_of(path)] += math.prod(spec.shape)
    forms = {part or WHOLE: form for part, form in setup.stage.forms.items()}
    parts = ", ".join(f"{part} {forms[part]} {n:,}" for part, n in counts.items())
    total = sum(counts.values())
    lines = [
        (
            f"{cfg.name} at stage {cfg.stage}",
            f"{cfg.model['family']} with {total:,} parameters ({parts})",
        ),
        ("data", setup.dataset.description),
        *_learning_rate(cfg.optimizer, cfg.steps),
        ("device", _device(setup)),
    ]
    if devices := setup.layout.describe(setup.program.abstract):
        lines.append(("mesh", devices))
    lines.append(("run", f"{_origin(setup, step, saved)}, in {Path(cfg.run_dir)}"))
    if cfg.checkpoint.dir is not None:
        lines.append(("checkpoints", f"in {setup.run.home}"))
    text = labelled(lines)
    return text if step else f"{text}\n{parameters(setup)}"


def _device(setup: Setup) -> str:
    """What computes, and how precisely: `cpu, float32, jax 0.10.2, flax 0.12.8`."""
    kind = jax.devices()[0].device_kind
    # A family need not have an option for it; then it computes in what its parameters are.
    dtypes = {str(spec.dtype) for spec in _parameters(setup).values()}
    precision = setup.cfg.model.get("dtype") or ", ".join(sorted(dtypes))
    if (products := numerics.setting("jax_default_matmul_precision")) is not None:
        precision += f" (matrix products: {products})"
    return f"{kind}, {precision}, jax {jax.__version__}, flax {flax.__version__}"


def _origin(setup: Setup, step: int, saved: Saved | None) -> str:
    """Where a run begins: `going on from step 300 of runs/old, stage linen -> nnx`."""
    if saved is None:
        return "from scratch"
    cfg, text = setup.cfg, f"going on from step {step}"
    if not setup.run.owns(saved):
        text += f" of {cfg.init_from}"
    was = saved.run.get("stage", cfg.stage)
    return text if was == cfg.stage else f"{text}, stage {was} -> {cfg.stage}"


def _parameters(setup: Setup) -> dict[str, Any]:
    """The shape of each parameter, by its path at the stage."""
    return flatten(setup.stage.abstract()["params"])


def _learning_rate(cfg: Optimizer, steps: int) -> Iterator[tuple[str, str]]:
    """The rule, and a note where its learning rate is not what somebody may think it is."""
    has_own = own_rate(cfg) is not None
    name = cfg.name if cfg.chain is not None else "the family's own"
    yield "optimizer", f"{name}, " + ("lr of its chain" if has_own else _run_rate(cfg))
    for name, reason in chains.depending_on_stage(cfg.chain or []).items():
        yield (
            "note",
            f"{name} {reason}: the curve may be another one at another stage (docs/optimizers.md)",
        )
    updates = steps // cfg.accumulate
    if cfg.warmup >= updates and not has_own:
        yield (
            "note",
            f"optimizer.warmup is {cfg.warmup} updates, and the run has {updates}: the learning "
            "rate never reaches optimizer.lr",
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


def closing(setup: Setup, metrics: Metrics, seconds: float) -> str:
    """Last losses beside the baselines, and how long it took."""
    last = metrics.last
    lines = [f"finished at step {max(row['step'] for row in last.values())}"]
    for split, title in (("train", "train, batch"), ("eval", "validation, step")):
        if split not in last:
            continue
        title = f"{title} {last[split]['step']}"
        # What everybody knows; norms and rates say little when all is over.
        values = {k: v for k, v in last[split].items() if k in ("loss", "accuracy")}
        lines.append(f"  {title:<22}  {figures(values)}")
    for name, value in setup.dataset.baselines.items():
        lines.append(f"  baseline {name:<13}  {value:.4f}")
    lines.append(f"  {'time':<22}  {clock(seconds)}")
    return "\n".join(lines)


def stopped(setup: Setup, step: int, seconds: float) -> str:
    """Where a run that is not at its end has been left."""
    cfg = setup.cfg
    how = "without stop_at " if step == cfg.stop_at else ""
    return (
        f"Saved at step {step} of {cfg.steps} after {clock(seconds)}.\n"
        f"The same command {how}goes on from there."
    )


def commands(setup: Setup, *, finished: bool) -> str:
    """What one would type next."""
    cfg, run, python = setup.cfg, Path(setup.cfg.run_dir), program("python")
    stages = list(STAGES)
    later = stages[stages.index(cfg.stage) + 1 :]
    # As it is: a --multirun has put a name together that no shell would read as it stands there.
    here = ["stop_at=", *([f"run_dir={run}"] if "run_dir=" in command() else [])]
    home = [] if cfg.checkpoint.dir is None else [f"checkpoint.dir={setup.run.home}"]
    lines = [f"in {run}; from here:"]
    if not finished:
        lines.append(folded("  go on      ", command(*here, *home)))
    for stage in later[:1]:
        moved = _at_stage(run, cfg.stage, stage)
        if finished:  # and has nothing left to train: it is translated as it is
            words = shlex.join(["convert.py", "run", str(run), str(moved), "--to", stage])
            lines.append(folded("  convert    ", f"{python} {words}"))
        else:
            there = [key.replace(str(run), str(moved)) for key in here]
            if home:  # which holds the checkpoints of one run
                there.append(f"checkpoint.dir={_at_stage(setup.run.home, cfg.stage, stage)}")
            moving = command(f"stage={stage}", f"init_from={run}", *there)
            lines.append(folded("  new stage  ", moving))
    if finished:
        lines.append(folded("  export     ", command("mode=export", *here, *home)))
    in_terminal = "" if find_spec("matplotlib") else " --text"
    plot = f"{python} -m training.plot {shlex.quote(str(run))}{in_terminal}"
    lines.append(folded("  curves     ", plot))
    if cfg.log.tensorboard:
        # TensorBoard names runs by their place below this folder, and calls a folder of its own `.`
        shown = run if run.is_absolute() or run.parent == Path() else run.parent
        board = f"{program('tensorboard')} --logdir {shlex.quote(str(shown))}"
        lines.append(folded("             ", board))
    return "\n".join(lines)


def _at_stage(path: Path, was: str, stage: str) -> Path:
    """The name of a run at another stage: `runs/lm-linen` becomes `runs/lm-nnx`."""
    return path.with_name(f"{path.name.removesuffix(f'-{was}')}-{stage}")
