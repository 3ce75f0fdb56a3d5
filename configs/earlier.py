"""Configurations that earlier versions of this template wrote, as this one has them.

A run keeps its configuration in `config.yaml` and in each checkpoint; both go on being read.
"""

from collections.abc import Mapping
from typing import Any


def upgraded(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run in today's keys; one that has them already is returned as it is.

    >>> old = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "encoder": {}, "head": {}}
    >>> upgraded({"optimizer": old})["optimizer"]
    {'name': 'sgd', 'lr': 0.1, 'chain': [{'trace': {'decay': 0.9}}], 'parts': {...}}
    """
    return {**mapping, "optimizer": _optimizer(mapping["optimizer"])}


def _optimizer(group: Mapping[str, Any]) -> dict[str, Any]:
    """The optimizers used to be a menu of four, with the settings of all side by side."""
    if "chain" in group:
        return dict(group)
    settings = ("b1", "b2", "eps", "momentum")
    b1, b2, eps, momentum = (group.get(key) for key in settings)
    chains: dict[str, list[Any]] = {
        "adamw": [{"scale_by_adam": {"b1": b1, "b2": b2, "eps": eps}}],
        "lion": [{"scale_by_lion": {"b1": b1, "b2": b2}}],
        "sgd": ["identity" if momentum is None else {"trace": {"decay": momentum}}],
        "adafactor": [
            [
                {"scale_by_factored_rms": {"epsilon": eps}},
                {"clip_by_block_rms": {"threshold": 1.0}},
                "scale_by_param_block_rms",
                *([] if momentum is None else [{"ema": {"decay": momentum, "debias": False}}]),
            ]
        ],
    }
    parts = {part: group[part] for part in ("encoder", "head")}
    rest = {key: value for key, value in group.items() if key not in (*settings, *parts)}
    return {**rest, "chain": chains[group["name"]], "parts": parts}
