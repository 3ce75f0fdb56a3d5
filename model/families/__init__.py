"""The registry of model families: a family is a module of this folder, found by its file's name.

Such a module holds `Config` (a frozen dataclass of the family's options), `rules(cfg)` (the name of
its rule book in `configs/rules/`), `losses(outputs, batch)` (per-example metrics, "loss" among
them) and `misfits(cfg, batch, classes)` (which options the data does not fit). It may hold
`optimizer(cfg, schedule, view)`, an Optax transformation for `optimizer.chain=null`. The twins are
`model/linen/<name>.py` and `model/nnx/<name>.py`, each with an `Encoder` and a `Head`.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from jax import Array

from configs.build import build, did_you_mean, refuse, show

RULES = Path(__file__).parents[2] / "configs" / "rules"


@dataclass(frozen=True)
class Family:
    """A model family, with one setting of its options.

    Attributes:
        losses: (model outputs, batch) -> `{metric: (batch,) float32}`, with "loss" among them.
        optimizer: stands in for `optimizer.chain` where that is null; see `training.optimizer`.
    """

    name: str
    cfg: Any
    losses: Callable[[Array, dict[str, Array]], dict[str, Array]]
    rules_path: Path
    optimizer: Callable[..., Any] | None = None

    def inputs(self, batch: Any) -> Any:
        """What the model is called with, of a batch."""
        return batch["inputs"]

    def check_data(self, batch: Mapping[str, Any], classes: int | None) -> None:
        """Compares the options with the data, which else would broadcast, or index out of bounds.

        Args:
            batch: one batch, `{"inputs", "targets"}` of arrays.
            classes: how many values a target can have; None where it is a number.

        Raises:
            configs.build.ConfigError: naming every option that does not fit.
        """
        module = importlib.import_module(f"{__name__}.{self.name}")
        misfits = module.misfits(self.cfg, batch, classes)
        refuse({f"model.{key}": text for key, text in misfits.items()})

    def twin(self, framework: str) -> ModuleType:
        """The module of the family's twin in `framework` ("linen" or "nnx"): `Encoder`, `Head`."""
        return importlib.import_module(f"model.{framework}.{self.name}")


def create(model: Mapping[str, Any]) -> Family:
    """The family that `model["family"]` names, with its options.

    Raises:
        configs.build.ConfigError: for an unknown family or option, naming every problem.
    """
    name: Any = model.get("family")
    known = [module.name for module in pkgutil.iter_modules(__path__)]
    if name not in known:
        refuse({"model.family": f"got {show(name)}{did_you_mean(str(name), known)}"})
    module = importlib.import_module(f"{__name__}.{name}")
    cfg = build(module.Config, model, at="model")
    own = getattr(module, "optimizer", None)
    return Family(name, cfg, module.losses, RULES / f"{module.rules(cfg)}.yaml", own)
