"""Trains a model at one stage of the migration from Linen to nnx; see `python train.py --help`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.schema import Config
from training import cli


def main(cfg: Config) -> float | None:
    """Trains, or evaluates, as configured.

    Returns:
        The lowest validation loss of a run that has trained: what a sweeper goes by.

    Raises:
        Refused: with a message alone for whatever a person can put right.
    """
    from linen_nnx import RuleError
    from model.stages import VariablesError
    from training.errors import Refused
    from training.evaluation import report
    from training.loop import train
    from training.metrics import read

    try:
        if cfg.mode == "eval":
            return report(cfg)
        stopped = train(cfg)
    except (RuleError, VariablesError) as error:
        raise Refused(str(error)) from None
    if stopped:
        raise SystemExit(0)  # so that the other jobs of a --multirun do not begin
    losses = [row["loss"] for row in read(Path(cfg.run_dir)) if row["split"] == "eval"]
    return min(losses, default=None)


def check_model(model: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for model options that the family does not have."""
    from model.families import create

    create(model)


if __name__ == "__main__":
    cli.run(main, check_model)
