"""The training loop, from top to bottom: set-up, start, steps, evaluation, saving, summary."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

import jax

from configs.schema import Config
from model import families
from model.stages import Stage
from training import data, samples, start, summary
from training.board import Board
from training.checkpoints import Checkpoints, save_aside
from training.errors import Refused
from training.metrics import Metrics
from training.recorder import NonFiniteError, Recorder
from training.state import Program, State
from training.terminal import Terminal, say

PROFILED = range(5, 15)  # steps after the first that debug=profile records


def train(cfg: Config) -> bool:
    """Trains as configured; returns when the run has ended or was asked to stop.

    Returns:
        Whether a signal has stopped it.

    Raises:
        Refused: for anything that cannot be done as asked; nothing has been overwritten then.
    """
    # Set-up: data, model, optimizer. Nothing is written yet.
    dataset = data.load(cfg.data)
    batches = data.train_iterator(dataset, cfg.data)
    family = families.create(cfg.model)
    rules = start.load_rules(cfg, family)
    example = dataset.example_batch(cfg.data.batch)["inputs"]
    program = Program(cfg, Stage(cfg.stage, family, example), rules)

    # Start: resume, init_from or scratch. From here on the run directory is this run's.
    state = start.begin(cfg, program, batches)
    step = first = int(state.step)
    last = cfg.stop_at or cfg.steps
    if cfg.debug.mode == "profile" and last - first <= PROFILED.start:
        raise Refused(
            f"debug=profile records what follows the first {PROFILED.start} steps; this run would "
            f"go from step {first} to {last}. Give more steps, or another run_dir."
        )
    lock = start.write_run(cfg, rules)
    run_dir = Path(cfg.run_dir)
    metrics = Metrics(run_dir, first)
    checkpoints = Checkpoints(run_dir, cfg.checkpoint, start.run_item(cfg, rules))
    checkpoints.forget_best_after(first)
    board = Board(run_dir, first, dataclasses.asdict(cfg), on=cfg.log.tensorboard)
    terminal = Terminal(last, first, cfg.data.batch, progress=cfg.log.progress)
    say(summary.opening(cfg, dataset, program, first))
    recorder = Recorder(metrics, board, terminal, cfg.log_every)

    # Steps. What is due after step k is done before batch k + 1 is drawn.
    batch = None
    ended = step >= last or _patience_lost(cfg, metrics)
    if ended:
        say("Nothing is left to train; another run_dir begins anew.")
    try:
        with terminal, _interrupts() as stop, _checks(cfg), ExitStack() as profile:
            while not ended:
                if cfg.debug.mode == "profile" and step - first == PROFILED.start:
                    profile.enter_context(jax.profiler.trace(run_dir))
                if batch is None or cfg.debug.mode != "overfit":
                    batch = next(batches)
                state, values = program.train_step(state, batch)
                step += 1
                recorder.train(step, values)
                if step - first == PROFILED.stop:
                    jax.block_until_ready(state)
                    profile.close()
                if _due(step, cfg.eval.every) or step == cfg.steps:
                    recorder.drain()
                    if recorder.eval(step, evaluate(cfg, program, dataset, state)):
                        metrics.sync()
                        checkpoints.save(state, batches.get_state(), best=True)
                    if cfg.log.tensorboard:
                        samples.show(cfg, program, dataset, state, board)
                if _due(step, cfg.log.histograms_every):
                    board.histograms(step, program.view.leaves(state.variables["params"]))
                ended = step == last or bool(stop) or _patience_lost(cfg, metrics)
                if _due(step, cfg.checkpoint.every) or ended:
                    recorder.drain()
                    metrics.sync()
                    checkpoints.save(state, batches.get_state())
    except NonFiniteError as error:
        raise Refused(_set_aside(error, run_dir, state)) from None
    finally:
        checkpoints.close()
        metrics.close()
        batches.close()
        os.close(lock)

    # Summary, where the run is at its end and not only stopped.
    if step == cfg.steps or _patience_lost(cfg, metrics):
        say(summary.closing(cfg, dataset, metrics, board))
        if sample := samples.show(cfg, program, dataset, state, board):
            say(sample)
    else:
        how = "without stop_at " if step == cfg.stop_at else ""
        say(f"Saved at step {step} of {cfg.steps}; the same command {how}goes on from there.")
    board.close()
    return bool(stop)


def evaluate(
    cfg: Config, program: Program, dataset: data.Dataset, state: State
) -> dict[str, float]:
    """The validation means of the family's losses, each example with equal weight."""
    totals: dict[str, float] = {}
    pending = []
    for batch in data.eval_batches(dataset, cfg.data, cfg.eval.batches):
        pending.append(program.eval_step(state, batch))
    for sums in jax.device_get(pending):
        for name, value in sums.items():
            totals[name] = totals.get(name, 0.0) + float(value)
    weight = totals.pop("weight")
    return {name: total / weight for name, total in totals.items()}


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _patience_lost(cfg: Config, metrics: Metrics) -> bool:
    """Whether the last `patience` evaluations brought no lower loss."""
    losses = [row["loss"] for row in metrics.rows if row["split"] == "eval"]
    patience = cfg.eval.patience
    return (
        patience is not None
        and len(losses) > patience
        and (min(losses[-patience:]) >= min(losses[:-patience]))
    )


def _set_aside(error: NonFiniteError, run_dir: Path, state: State) -> str:
    """Keeps the state in which a metric went wrong, where no resume will find it."""
    path = run_dir / "nonfinite" / str(int(state.step))
    save_aside(path, state)
    return (
        f"{error} The state after step {int(state.step)} is in {path}, to be looked at; the "
        "checkpoints before it are untouched. debug=nans finds the operation; a lower "
        "optimizer.lr, a longer optimizer.warmup or optimizer.clip_norm are the usual remedies."
    )


@contextmanager
def _checks(cfg: Config) -> Iterator[None]:
    """debug=nans: the first operation that gives a NaN or an infinity raises FloatingPointError.

    As contexts, since some library code turns the global flags off for its thread and on again.
    """
    on = cfg.debug.mode == "nans"
    with jax.debug_nans(on), jax.debug_infs(on):
        yield


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C end the run after the step at hand; a second one ends it at once."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        say(f"{signal.Signals(number).name}: saving after this step.")

    before = {n: signal.signal(n, receive) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
