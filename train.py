"""Trains a model at one stage of the migration from Linen to nnx; see `python train.py --help`."""

from training.runtime import signals

if __name__ == "__main__":
    signals.end_on_signals()  # before the imports, which take time

from pathlib import Path

from configs.schema import Config
from training.config import CHECKS
from training.runtime import cli


def main(cfg: Config) -> float | None:
    """Trains, evaluates or exports, as configured.

    Returns:
        The lowest validation loss of a run that has trained: what a sweeper goes by.

    Raises:
        Refusal: with a message alone for whatever a person can put right.
        SystemExit: 130 or 143 when a signal has stopped the run, with its state saved; the other
            jobs of a --multirun do not begin then.
    """
    from training.evaluation import report
    from training.export import export
    from training.loop import train
    from training.runtime.metrics import read

    if cfg.mode == "eval":
        return report(cfg)
    if cfg.mode == "export":
        return export(cfg)
    stopped_by = train(cfg)
    if stopped_by is not None:
        raise SystemExit(signals.exit_code(stopped_by))
    losses = [row["loss"] for row in read(Path(cfg.run_dir)) if row["split"] == "eval"]
    return min(losses, default=None)


def results(runs: list[Path]) -> None:
    """What a --multirun ends with: its runs, the best one first."""
    from training.table import show

    show(runs)


if __name__ == "__main__":
    cli.run(main, Config, CHECKS, results)
