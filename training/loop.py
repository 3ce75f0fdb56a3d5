"""The training loop, from top to bottom: set-up, start, steps, evaluation, saving, summary."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import jax

from configs.schema import Config
from training import data, debug, loggers, moving, samples, summary
from training.assemble import Setup, prepare, share
from training.evaluation import evaluate
from training.runtime import disk, lock, processes, start
from training.runtime.board import Board
from training.runtime.checkpoints import Checkpoints, save_aside
from training.runtime.errors import Refused
from training.runtime.metrics import Metrics, read
from training.runtime.program import State
from training.runtime.recorder import NonFiniteError, Recorder
from training.runtime.terminal import Terminal, say, show


def train(cfg: Config) -> int | None:
    """Trains as configured; returns when the run has ended or was asked to stop.

    Returns:
        The signal that has stopped it, with its state saved; None where none has.

    Raises:
        Refusal: for anything that cannot be done as asked; nothing has been overwritten then.
        ConfigError: for model options that do not fit the data; nothing has been written then.
    """
    # Set-up: processes, data, model, optimizer. Nothing of the run directory is read yet.
    setup = prepare(cfg)
    run_dir, home = setup.run.run_dir, setup.run.home
    with lock.held(run_dir), lock.held_beside(home, run_dir), disk.needed(run_dir, home):
        return _train(setup)


def _train(setup: Setup) -> int | None:
    cfg, program, run = setup.cfg, setup.program, setup.run
    began = time.monotonic()
    with processes.together():
        drawn = data.train_iterator(setup.dataset, *share())

    # Start: resume, init_from or scratch. Nothing is written yet.
    saved = start.find(run)
    step = first = 0 if saved is None else saved.step
    profile = debug.Profile(setup, first)
    pool = ThreadPoolExecutor(1)  # compiles while the state is drawn or read
    compiling = pool.submit(_compile, setup)
    pool.shutdown(wait=False)
    state = start.begin(run, program, saved, lambda other: moving.moved(setup, other))
    if saved is not None and cfg.debug.mode != "overfit":  # which stays at the first batch
        moving.set_position(drawn, saved)
    show(summary.opening(setup, first, saved))
    compiling.result()
    with debug.checks(cfg):  # what cannot be traced, from this very state, writes nothing
        jax.eval_shape(program.train_step, state, setup.traced)

    # From here on the run directory is this run's.
    with processes.together():
        start.write_run(run, saved)
    writes = processes.first()
    metrics = Metrics(run.run_dir, first, write=writes)
    checkpoints = Checkpoints(run.home, cfg.checkpoint.keep, cfg.checkpoint.best, run.item(saved))
    checkpoints.forget_after(first)
    wanted = loggers.create(cfg, first)
    board = Board(wanted if writes else {}, partial(read, run.run_dir))
    rows = setup.dataset.options.batch
    terminal = Terminal(run.last, first, rows, progress=cfg.log.progress)
    recorder = Recorder(metrics, board, terminal, cfg.log_every)

    # Steps. What is due after step k is done before batch k + 1 is drawn.
    batches = debug.batches(cfg, drawn)
    sample, stopped_by = None, None
    ended = step >= run.last or _patience_lost(cfg, metrics)
    if ended:
        say("Nothing is left to train; another run_dir begins anew.")
    with processes.interrupts() as stop:
        try:
            with terminal, debug.checks(cfg), ExitStack() as closing:
                closing.callback(profile.close)
                while not ended:
                    profile.before(step, state)
                    state, values = program.train_step(state, program.place(next(batches)))
                    step += 1
                    recorder.train(step, values)
                    is_best = False
                    if _due(step, cfg.eval.every) or step == cfg.steps:
                        recorder.drain()
                        is_best = recorder.eval(step, evaluate(setup, state))
                        # By everyone: drawing is computed together, and the first one shows it.
                        sample = samples.show(setup, state, board) if wanted else None
                    if wanted:
                        _show_parameters(setup, step, state, board)
                    stopped_by = stop(step)
                    ended = step == run.last or stopped_by is not None
                    ended = ended or _patience_lost(cfg, metrics)
                    is_due = ended or _due(step, cfg.checkpoint.every)
                    if is_due or is_best:
                        recorder.drain()
                        metrics.sync()
                        position, noted = drawn.get_state(), metrics.tally.noted()
                        checkpoints.save(state, position, noted, latest=is_due, best=is_best)
        except NonFiniteError as error:
            # The last seconds before it are what one will want to see.
            board.close(finished=False)
            raise Refused(_set_aside(error, run.home, state)) from None
        finally:
            with ExitStack() as closing:  # all of them, in this order, whichever fails
                closing.callback(drawn.close)
                closing.callback(metrics.close)
                closing.callback(checkpoints.close)

    # The words at the end.
    seconds = time.monotonic() - began
    finished = step == cfg.steps or _patience_lost(cfg, metrics)
    if finished:
        show(summary.closing(setup, metrics, seconds))
        if sample is None:
            sample = samples.show(setup, state, board)
        if sample:
            show(sample)
    else:
        say(summary.stopped(setup, step, seconds))
    show(summary.commands(setup, finished=finished))
    board.close(finished=finished)
    return stopped_by


def _compile(setup: Setup) -> None:
    """Compiles the train step, which its first call then finds."""
    with debug.checks(setup.cfg):
        setup.program.train_step.lower(setup.program.abstract, setup.traced).compile()


def _show_parameters(setup: Setup, step: int, state: State, board: Board) -> None:
    """Histograms and norms of the parameters, where they are due."""
    log = setup.cfg.log
    histograms, norms = _due(step, log.histograms_every), _due(step, log.norms_every)
    if not (histograms or norms):
        return
    # Fetched once for both, and by every process: the parameters may lie in parts.
    leaves = setup.program.fetch(setup.view.leaves(state["params"]))
    if histograms:
        board.histograms(step, leaves)
    if norms:
        board.norms(step, leaves)


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


def _set_aside(error: NonFiniteError, home: Path, state: State) -> str:
    """Keeps the state in which a metric went wrong, where no resume will find it."""
    step = int(state["step"])
    path = home / "nonfinite" / str(step)
    save_aside(path, state)
    return (
        f"{error} The state after step {step} is in {path}, to be looked at; the checkpoints "
        "before it are untouched. debug=nans finds the operation; a lower optimizer.lr, a longer "
        "optimizer.warmup or optimizer.clip_norm are the usual remedies."
    )
