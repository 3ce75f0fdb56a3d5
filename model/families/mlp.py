"""The smallest hybrid, for regression; the head projects back through the encoder's own kernel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from configs.build import Count, Decay


@dataclass(frozen=True)
class Config:
    """Options of the MLP; see `configs/model/mlp.yaml` for meanings and units."""

    family: Literal["mlp"]
    features: Count
    hidden: Count
    outputs: Count
    dropout: Decay
    dtype: Literal["float32", "bfloat16"]


def rules(cfg: Config) -> str:
    return "mlp"


def misfits(cfg: Config, batch: Mapping[str, Any], classes: int | None) -> dict[str, str]:
    """Options that do not fit the data: `{key: what is wrong}`."""
    return {
        key: f"got {getattr(cfg, key)}; the data has {side} of shape {batch[side].shape[1:]}"
        for key, side in (("features", "inputs"), ("outputs", "targets"))
        if batch[side].shape[1:] != (getattr(cfg, key),)
    }


def losses(outputs: Array, batch: dict[str, Array]) -> dict[str, Array]:
    """Mean squared error: predictions (B, outputs), targets (B, outputs) -> loss (B,)."""
    return {"loss": jnp.square(outputs - batch["targets"]).mean(axis=-1)}
