"""The configuration of a run, built in Python as on the command line.

>>> from training import compose
>>> cfg = compose("experiment=digits", "steps=10")
>>> cfg.steps, cfg.model["family"]
(10, 'convnet')
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.build import ConfigError, refuse
from configs.schema import Config
from training.runtime import cli
from training.runtime.environment import installation


def compose(*overrides: str, config_dir: str | Path | None = None) -> Config:
    """The configuration of `python train.py *overrides`, checked.

    Args:
        overrides: as on the command line: `"experiment=digits"`, `"optimizer.lr=1e-3"`.
        config_dir: a folder with more configurations, as `--config-dir` on the command line.

    Raises:
        configs.build.ConfigError: naming every key that is unknown, missing or wrong.
        hydra.errors.HydraException: for overrides that Hydra refuses.
    """
    return cli.compose(*overrides, config_dir=config_dir, schema=Config, checks=CHECKS)


def _model(mapping: Mapping[str, Any]) -> None:
    """Refuses options and parts that the family does not have."""
    import model

    family = model.create(mapping["model"])
    if isinstance(mapping.get("ported"), list):
        family.check_ported(mapping["ported"])


def _optimizer(mapping: Mapping[str, Any]) -> None:
    """Refuses transformations and arguments that optax does not have."""
    import model
    from training.optimizer import check

    try:
        parts = model.create(mapping["model"]).parts
    except (ConfigError, KeyError, TypeError):
        parts = []  # which `_model` tells
    check(mapping["optimizer"], parts)


def _data(mapping: Mapping[str, Any]) -> None:
    """Refuses options that the data set does not have."""
    from training.datasets import create

    create(mapping["data"])


def _log(mapping: Mapping[str, Any]) -> None:
    """Refuses trackers that are not installed, before anything is computed."""
    problems: dict[str, str] = {}
    for name in ("wandb", "mlflow"):
        if mapping["log"].get(name) is not None and find_spec(name) is None:
            command = installation(f"-e '.[{name}]'")
            problems[f"log.{name}"] = f"{name} is not installed:\n    {command}"
    refuse(problems)


def _checkpoint(mapping: Mapping[str, Any]) -> None:
    """Refuses a bucket without what reads and writes it, before anything is computed."""
    place = mapping["checkpoint"].get("dir")
    if not isinstance(place, str) or not place.startswith("gs://"):
        return
    # Orbax puts its side files through gcsfs; this template's own go through obstore.
    absent = [name for name in ("gcsfs", "obstore") if find_spec(name) is None]
    if absent:
        words = f"{' and '.join(absent)} missing: pip install -e '.[buckets]'"
        refuse({"checkpoint.dir": f"got {place}, with {words}"})


CHECKS: cli.Checks = {
    "model": _model,
    "optimizer": _optimizer,
    "data": _data,
    "checkpoint": _checkpoint,
    "log": _log,
}
