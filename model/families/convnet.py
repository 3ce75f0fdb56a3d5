"""A small ResNet with BatchNorm, for images; the head reuses the encoder's channel gains."""

from dataclasses import dataclass
from typing import Literal

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

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def rules(cfg: Config) -> str:
    return "convnet"


def losses(outputs: Array, batch: dict[str, Array]) -> dict[str, Array]:
    """Cross-entropy in nats and accuracy: logits (B, classes), targets (B,) int32 -> (B,) each."""
    targets = batch["targets"]
    nats = optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
    return {"loss": nats, "accuracy": (outputs.argmax(axis=-1) == targets).astype(jnp.float32)}
