"""The training loop, from top to bottom: set-up, start, steps, evaluation, saving, summary."""

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jax

from configs.schema import Config
from training import data, disk, lock, processes, samples, start, summary
from training.board import Board
from training.checkpoints import Checkpoints, save_aside
from training.datasets import Dataset
from training.errors import Refused
from training.evaluation import evaluate
from training.metrics import Metrics
from training.recorder import NonFiniteError, Recorder
from training.setup import prepare, share
from training.state import Program, State
from training.terminal import Terminal, say

PROFILED = range(5, 15)  # steps after the first that debug=profile records


def train(cfg: Config) -> int | None:
    """Trains as configured; returns when the run has ended or was asked to stop.

    Returns:
        The signal that has stopped it, with its state saved; None where none has.

    Raises:
        Refusal: for anything that cannot be done as asked; nothing has been overwritten then.
        ConfigError: for model options that do not fit the data; nothing has been written then.
    """
    # Set-up: processes, data, model, optimizer. Nothing of the run directory is read yet.
    dataset, program, example = prepare(cfg)
    run_dir = Path(cfg.run_dir)
    with lock.held(run_dir), disk.needed(run_dir):
        return _train(cfg, dataset, program, example)


def _train(cfg: Config, dataset: Dataset, program: Program, example: dict[str, Any]) -> int | None:
    with processes.together():
        batches = data.train_iterator(dataset, *share())

    # Start: resume, init_from or scratch. Nothing is written yet.
    saved = start.find(cfg, program.rules)
    step = first = 0 if saved is None else saved.step
    last = cfg.stop_at or cfg.steps
    if cfg.debug.mode == "profile" and last - first <= PROFILED.start:
        raise Refused(
            f"debug=profile records what follows the first {PROFILED.start} steps; this run would "
            f"go from step {first} to {last}. Give more steps, or another run_dir."
        )
    pool = ThreadPoolExecutor(1)  # compiles while the state is drawn or read
    compiling = pool.submit(_compile, cfg, program, example)
    pool.shutdown(wait=False)
    state = start.begin(cfg, program, batches, saved)
    say(summary.opening(cfg, dataset, program, first))
    compiling.result()
    with _checks(cfg):  # what cannot be traced, from this very state, writes nothing
        jax.eval_shape(program.train_step, state, example)

    # From here on the run directory is this run's.
    with processes.together():
        start.write_run(cfg, program.rules)
    writes = processes.first()
    run_dir = Path(cfg.run_dir)
    metrics = Metrics(run_dir, first, write=writes)
    checkpoints = Checkpoints(run_dir, cfg.checkpoint, start.run_item(cfg, program.rules))
    checkpoints.forget_after(first)
    board = Board(run_dir, first, dataclasses.asdict(cfg), on=cfg.log.tensorboard and writes)
    terminal = Terminal(last, first, dataset.options.batch, progress=cfg.log.progress)
    recorder = Recorder(metrics, board, terminal, cfg.log_every)

    # Steps. What is due after step k is done before batch k + 1 is drawn.
    batch, sample, stopped_by = None, None, None
    ended = step >= last or _patience_lost(cfg, metrics)
    if ended:
        say("Nothing is left to train; another run_dir begins anew.")
    with processes.interrupts() as stop:
        try:
            with terminal, _checks(cfg), ExitStack() as profile:
                while not ended:
                    if cfg.debug.mode == "profile" and step - first == PROFILED.start and writes:
                        compiled = program.train_step.lower(state, example).compile()
                        (run_dir / "train_step.hlo.txt").write_text(compiled.as_text() or "")
                        words = f"The profile in {run_dir} is for TensorBoard or xprof."
                        profile.callback(say, words)
                        profile.enter_context(jax.profiler.trace(run_dir))
                    if batch is None or cfg.debug.mode != "overfit":
                        batch = program.place(next(batches))
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
                            noted = metrics.tally.noted()
                            checkpoints.save(state, batches.get_state(), noted, best=True)
                        if cfg.log.tensorboard:
                            sample = samples.show(cfg, program, dataset, state, board)
                    if cfg.log.tensorboard and _due(step, cfg.log.histograms_every):
                        leaves = program.view.leaves(state.variables["params"])
                        fetched = program.fetch(leaves)  # by every process
                        if writes:
                            board.histograms(step, fetched)
                    stopped_by = stop(step)
                    ended = step == last or stopped_by is not None or _patience_lost(cfg, metrics)
                    if _due(step, cfg.checkpoint.every) or ended:
                        recorder.drain()
                        metrics.sync()
                        checkpoints.save(state, batches.get_state(), metrics.tally.noted())
        except NonFiniteError as error:
            raise Refused(_set_aside(error, run_dir, state)) from None
        finally:
            with ExitStack() as closing:  # all of them, in this order, whichever fails
                closing.callback(batches.close)
                closing.callback(metrics.close)
                closing.callback(checkpoints.close)

    # Summary, where the run is at its end and not only stopped.
    if step == cfg.steps or _patience_lost(cfg, metrics):
        say(summary.closing(dataset, metrics))
        board.finished()
        if sample is None:
            sample = samples.show(cfg, program, dataset, state, board)
        if sample:
            say(sample)
    else:
        how = "without stop_at " if step == cfg.stop_at else ""
        say(f"Saved at step {step} of {cfg.steps}; the same command {how}goes on from there.")
    board.close()
    return stopped_by


def _compile(cfg: Config, program: Program, example: dict[str, Any]) -> None:
    """Compiles the train step, which its first call then finds."""
    with _checks(cfg):
        program.train_step.lower(program.abstract, example).compile()


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _patience_lost(cfg: Config, metrics: Metrics) -> bool:
    """Whether the last `patience` evaluations brought no lower loss."""
    losses, patience = metrics.eval_losses, cfg.eval.patience
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
    What JAX_DEBUG_NANS and JAX_DEBUG_INFS have turned on stays on.
    """
    on = cfg.debug.mode == "nans"
    with (
        jax.debug_nans(on or jax.debug_nans.value),
        jax.debug_infs(on or jax.debug_infs.value),
    ):
        yield
