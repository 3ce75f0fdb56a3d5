"""How good a state is: while a run goes on, and of a checkpoint (`mode=eval`)."""

import dataclasses
from pathlib import Path

import jax

from configs.schema import Config
from training import checkpoints, data, numerics, samples, summary
from training.board import Board
from training.datasets import Dataset
from training.setup import prepare, share
from training.state import Program, State
from training.terminal import say


def evaluate(cfg: Config, program: Program, dataset: Dataset, state: State) -> dict[str, float]:
    """The validation means of the family's losses, each example with equal weight."""
    totals: dict[str, float] = {}
    pending = []
    for pair in data.eval_batches(dataset, cfg.eval.batches, *share()):
        batch, weight = program.place(pair)
        pending.append(program.eval_step(state, batch, weight))
    for sums in jax.device_get(pending):
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    weight = totals.pop("weight")
    return {name: total / weight for name, total in totals.items()}


def report(cfg: Config) -> None:
    """Evaluates the checkpoints of `cfg.run_dir` and shows a sample of the last; writes nothing.

    Model, data and stage are those that a checkpoint says; what is read of `cfg` is how to evaluate
    and show (`eval`, `log`) and on which devices.

    Raises:
        Refused: when there is no checkpoint, or one is damaged.
    """
    run_dir = Path(cfg.run_dir)
    found = [checkpoints.find(run_dir), checkpoints.latest(run_dir / "best")]
    own = ("eval", "log", "mesh", "distributed", "compile_cache", "checkpoint", "run_dir")
    asked = {name: getattr(cfg, name) for name in own}
    prepared = None
    for saved in filter(None, reversed(found)):
        if cfg.checkpoint.verify:
            saved.intact()
        run = dataclasses.replace(saved.config(), **asked)
        if prepared is None or run != prepared[0]:
            prepared = run, prepare(run)
        dataset, program, _ = prepared[1]
        if changed := numerics.changes_since(saved.run):
            say("\n".join([f"{saved.path} was trained otherwise; this evaluation:", *changed]))
        state = saved.restore(program.abstract)
        values = evaluate(run, program, dataset, state)
        text = "  ".join(f"{name} {value:.6f}" for name, value in values.items())
        say(f"{saved.path.parent.name}, step {saved.step}, stage {run.stage}: validation {text}")
        if saved is found[0]:
            board = Board(run_dir, saved.step, {}, on=False)
            if sample := samples.show(run, program, dataset, state, board):
                say(sample)
            say(summary.parameters(program))
