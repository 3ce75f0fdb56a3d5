"""A small ResNet with BatchNorm, for images; the head reuses the encoder's channel gains."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from linen_nnx import Part

from configs.build import Count, Decay
from model import Applied, Batch, Metrics, Rngs


@dataclass(frozen=True)
class Options:
    """Options of the ResNet; see `configs/model/convnet.yaml` for meanings and units."""

    family: Literal["convnet"]
    depth: Count
    width: Count
    channels: Count
    classes: Count
    dropout: Decay
    dtype: Literal["float32", "bfloat16"]
    remat: bool


def parts(cfg: Options) -> dict[str, Part]:
    """Both halves of the model, each written twice."""
    from model.convnet import linen, nnx  # late: both import `Options` from here

    return {
        "encoder": Part(
            linen=lambda: linen.Encoder(cfg), nnx=lambda rngs: nnx.Encoder(cfg, rngs=rngs)
        ),
        "head": Part(linen=lambda: linen.Head(cfg), nnx=lambda rngs: nnx.Head(cfg, rngs=rngs)),
    }


def forward(parts: Any, images: jax.Array, *, train: bool = False) -> jax.Array:
    """images (B, H, W, channels) float32 -> logits (B, classes) float32.

    The encoder lends its gains to the head.
    """
    features, shared = parts.encoder(images, train=train)
    return parts.head(features, shared, train=train)


def inputs(batch: Batch) -> tuple[Any, ...]:
    """What `forward` takes of a batch."""
    return (batch["inputs"],)


def loss(model: Applied, batch: Batch, rngs: Rngs) -> Metrics:
    """Cross-entropy in nats and accuracy: targets (B,) int32 -> (B,) each."""
    logits, targets = model(*inputs(batch), train=model.train), batch["targets"]
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return {"loss": nats, "accuracy": (logits.argmax(axis=-1) == targets).astype(jnp.float32)}


def misfits(cfg: Options, batch: Mapping[str, Any], classes: int | None) -> dict[str, str]:
    """Options that do not fit the data: `{key: what is wrong}`."""
    shape, found = batch["inputs"].shape[1:], {}
    if len(shape) != 3 or shape[-1] != cfg.channels:
        found["channels"] = f"got {cfg.channels}; the data has inputs of shape {shape}"
    # Optax does not look whether a class is among the logits.
    if classes != cfg.classes or batch["targets"].ndim != 1:
        found["classes"] = f"got {cfg.classes}; the data has {classes or 'no'} classes"
    return found
