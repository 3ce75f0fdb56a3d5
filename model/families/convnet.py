"""A small ResNet with BatchNorm, for images; the head reuses the encoder's channel gains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax import Array

from configs.build import Count, Decay


@dataclass(frozen=True)
class Config:
    """Options of the ResNet; see `configs/model/convnet.yaml` for meanings and units."""

    family: Literal["convnet"]
    depth: Count
    width: Count
    channels: Count
    classes: Count
    dropout: Decay
    dtype: Literal["float32", "bfloat16"]
    remat: bool


def rules(cfg: Config) -> str:
    return "convnet"


def misfits(cfg: Config, batch: Mapping[str, Any], classes: int | None) -> dict[str, str]:
    """Options that do not fit the data: `{key: what is wrong}`."""
    shape, found = batch["inputs"].shape[1:], {}
    if len(shape) != 3 or shape[-1] != cfg.channels:
        found["channels"] = f"got {cfg.channels}; the data has inputs of shape {shape}"
    if classes != cfg.classes or batch["targets"].ndim != 1:
        found["classes"] = f"got {cfg.classes}; the data has {classes or 'no'} classes"
    return found


def losses(outputs: Array, batch: dict[str, Array]) -> dict[str, Array]:
    """Cross-entropy in nats and accuracy: logits (B, classes), targets (B,) int32 -> (B,) each."""
    targets = batch["targets"]
    nats = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    return {"loss": nats, "accuracy": (outputs.argmax(axis=-1) == targets).astype(jnp.float32)}
