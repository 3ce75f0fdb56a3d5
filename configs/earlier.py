"""Configurations that earlier versions of this template wrote, as this one has them.

A run keeps its configuration in `config.yaml` and in each checkpoint; both go on being read.
"""

from collections.abc import Mapping
from typing import Any

HALVES = ("encoder", "head")  # beside the optimizer's own keys, before there was `parts`


def upgraded(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run in today's keys; what is not an earlier form stays as it is.

    >>> old = {"name": "sgd", "momentum": 0.9, "encoder": {"freeze": False}, "head": {}}
    >>> data = {"name": "digits", "path": None, "batch": 64}
    >>> new = upgraded({"optimizer": old, "data": data, "init": "linen"})
    >>> new["optimizer"]["chain"], new["optimizer"]["parts"]
    ([{'trace': {'decay': 0.9}}], {'encoder': {'freeze': False}, 'head': {}})
    >>> new["data"]
    {'name': 'digits', 'batch': 64}
    >>> "init" in new
    False
    """
    # Who drew the initial parameters, Linen or the stage: of no bearing once a run has begun.
    result = {key: value for key, value in mapping.items() if key != "init"}
    result.setdefault("ported", None)
    result.setdefault("init_rules", None)
    result.setdefault("init_optimizer", "keep")
    if isinstance(log := mapping.get("log"), Mapping):
        # Keys that have come since. What they ask for was not there, so they ask for nothing.
        absent = dict.fromkeys(("csv", "wandb", "mlflow", "norms_every"))
        result["log"] = {**absent, "csv": False, **log}
    if isinstance(checkpoint := mapping.get("checkpoint"), Mapping):
        result["checkpoint"] = {"dir": None, **checkpoint}
    optimizer, data = mapping.get("optimizer"), mapping.get("data")
    # Told by the halves beside the optimizer's own keys: its name was the same then as now.
    if isinstance(optimizer, Mapping) and optimizer.keys() >= set(HALVES):
        result["optimizer"] = _optimizer(optimizer)
    if isinstance(data, Mapping) and data.get("name") in ("digits", "diabetes"):
        # Every data set used to have the keys of text, with null where they made no sense.
        absent = [key for key in ("path", "length") if data.get(key, "") is None]
        result["data"] = {key: value for key, value in data.items() if key not in absent}
    return result


def _optimizer(group: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizers used to be a menu of four, with the settings of all side by side."""
    settings = ("b1", "b2", "eps", "momentum")
    b1, b2, eps, momentum = (group.get(key) for key in settings)
    # The chains that those names stood for, with the same states in the same places: a checkpoint
    # of that time is restored into them.
    menu: dict[str, list[Any]] = {
        "adamw": [{"scale_by_adam": {"b1": b1, "b2": b2, "eps": eps}}],
        "lion": [{"scale_by_lion": {"b1": b1, "b2": b2}}],
        "sgd": ["identity" if momentum is None else {"trace": {"decay": momentum}}],
        "adafactor": [_adafactor(eps, momentum)],
    }
    result = dict(group)
    for key in (*settings, *HALVES):
        result.pop(key, None)
    result["chain"] = menu.get(group.get("name", ""), [])
    result["parts"] = {half: group[half] for half in HALVES}
    return result


def _adafactor(eps: Any, momentum: Any) -> list[Any]:
    """A chain of its own, as the checkpoints of those runs have it."""
    parts: list[Any] = [
        {"scale_by_factored_rms": {"epsilon": eps}},
        {"clip_by_block_rms": {"threshold": 1.0}},
        "scale_by_param_block_rms",
    ]
    if momentum is not None:
        parts.append({"ema": {"decay": momentum, "debias": False}})
    return parts
