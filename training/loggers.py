"""Where a run shows itself: the group `log` of the configuration. A tracker of your own goes here.

It is an object with the methods of `training.runtime.board.Logger`; add it to `create`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from configs.schema import Config
from training.runtime.board import Logger
from training.runtime.tensorboard import TensorBoard
from training.runtime.trackers import Csv, MLflow, WandB


def create(cfg: Config, step: int) -> dict[str, Callable[[], Logger]]:
    """What opens each logger that the configuration asks for, by its name in messages.

    Args:
        cfg: the configuration of the run.
        step: what the run goes on from.
    """
    run_dir, config = Path(cfg.run_dir), dataclasses.asdict(cfg)
    wanted: dict[str, Callable[[], Logger]] = {}
    if cfg.log.tensorboard:
        wanted[f"TensorBoard: the event file in {run_dir}"] = lambda: TensorBoard(
            run_dir, step, config
        )
    if cfg.log.csv:
        wanted[f"{run_dir / 'metrics.csv'}"] = lambda: Csv(run_dir, step)
    if (project := cfg.log.wandb) is not None:
        wanted["Weights & Biases"] = lambda: WandB(run_dir, config, project)
    if (experiment := cfg.log.mlflow) is not None:
        wanted["MLflow"] = lambda: MLflow(run_dir, config, experiment)
    return wanted
