"""How good a state is: while a run goes on, and of a checkpoint (`mode=eval`)."""

import dataclasses
from pathlib import Path
from typing import Any

from linen_nnx.disk.remote import as_path

from configs.build import build
from configs.earlier import upgraded
from configs.schema import Config
from training import data, moving, samples, summary
from training.assemble import Setup, prepare, share
from training.runtime import checkpoints, homes, numerics, reading, start
from training.runtime.board import Board
from training.runtime.program import State
from training.runtime.terminal import figures, say, show


def evaluate(setup: Setup, state: State) -> dict[str, float]:
    """The validation means of the family's metrics, and what it derives from them."""
    batches = data.eval_batches(setup.dataset, setup.cfg.eval.batches, *share())
    means = setup.program.evaluate(state, batches)
    derived = getattr(setup.family.module, "derived", lambda means: {})
    return means | derived(means)


def report(cfg: Config) -> None:
    """Evaluates the checkpoints of `cfg.run_dir` and shows a sample of the last; writes nothing.

    The model, data and stage come from the checkpoint. From `cfg` only `eval`, `log` and the device
    settings are used. Where `run_dir` has no checkpoint and `init_from` names one, that is
    evaluated, as the model, data and stage of `cfg`.

    Raises:
        Refused: when there is no checkpoint, or one is damaged.
    """
    run_dir, home = Path(cfg.run_dir), homes.home(cfg.run_dir, cfg.checkpoint.dir)
    if cfg.init_from is not None and not checkpoints.steps_of(home / "checkpoints"):
        setup = prepare(cfg)
        saved = start.given(setup.run, as_path(cfg.init_from))
        _show(f"{saved.path}, step {saved.step}", setup, moving.moved(setup, saved))
        return
    found = checkpoints.of_run(run_dir, home)
    setup = None
    # The best one first, so that what the last one does stands at the end, where one looks.
    for saved in filter(None, reversed(found)):
        if cfg.checkpoint.verify:
            saved.intact()
        setup = setup_of(cfg, saved, setup)
        if changed := numerics.changes_since(saved.run):
            say("\n".join([f"{saved.path} was trained otherwise; this evaluation:", *changed]))
        state = saved.restore(setup.program.abstract)
        if saved is found[0]:  # the last one; its losses end the report
            show(summary.parameters(setup))
            if sample := samples.show(setup, state, Board({})):
                show(sample)
        _show(f"{saved.path.parent.name}, step {saved.step}", setup, state)


def setup_of(
    cfg: Config, saved: checkpoints.Saved, known: Setup | None = None, **changes: Any
) -> Setup:
    """The run of a checkpoint of this template, set up anew.

    Args:
        cfg: what was asked for, of which `eval`, `log` and the devices are taken.
        saved: the checkpoint, of which the rest is taken.
        known: a setup, returned where it is the same one.
        changes: further keys of the configuration.
    """
    # How to look, and where to compute; all that decides what is computed is the checkpoint's.
    own = ("eval", "log", "mesh", "distributed", "compile_cache", "checkpoint", "run_dir")
    asked = {name: getattr(cfg, name) for name in own}
    with reading.named(saved.path / "run"):
        config = build(Config, upgraded(saved.run["config"]))
    run = dataclasses.replace(config, **asked, **changes)
    return known if known is not None and run == known.cfg else prepare(run)


def _show(what: str, setup: Setup, state: State) -> None:
    text = figures(evaluate(setup, state), digits=6)
    say(f"{what}, stage {setup.cfg.stage}: validation {text}")
