"""The smallest hybrid, for regression; the head projects back through the encoder's own kernel."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from linen_nnx import Part

from configs.build import Count, Decay
from model import Applied, Batch, Metrics, Rngs


@dataclass(frozen=True)
class Options:
    """Options of the MLP; see `configs/model/mlp.yaml` for meanings and units."""

    family: Literal["mlp"]
    features: Count
    hidden: Count
    outputs: Count
    dropout: Decay
    dtype: Literal["float32", "bfloat16"]


def parts(cfg: Options) -> dict[str, Part]:
    """Both halves of the model, each written twice."""
    from model.mlp import linen, nnx  # late: both import `Options` from here

    return {
        "encoder": Part(
            linen=lambda: linen.Encoder(cfg), nnx=lambda rngs: nnx.Encoder(cfg, rngs=rngs)
        ),
        "head": Part(linen=lambda: linen.Head(cfg), nnx=lambda rngs: nnx.Head(cfg, rngs=rngs)),
    }


def forward(parts: Any, x: jax.Array, *, train: bool = False) -> jax.Array:
    """x (B, features) float32 -> (B, outputs) float32.

    The encoder lends its kernel to the head.
    """
    features, shared = parts.encoder(x, train=train)
    return parts.head(features, shared, train=train)


def inputs(batch: Batch) -> tuple[Any, ...]:
    """What `forward` takes of a batch."""
    return (batch["inputs"],)


def loss(model: Applied, batch: Batch, rngs: Rngs) -> Metrics:
    """Mean squared error: targets (B, outputs) float32 -> loss (B,)."""
    predicted = model(*inputs(batch), train=model.train)
    return {"loss": jnp.square(predicted - batch["targets"]).mean(axis=-1)}


def misfits(cfg: Options, batch: Mapping[str, Any], classes: int | None) -> dict[str, str]:
    """Options that do not fit the data: `{key: what is wrong}`."""
    return {
        key: f"got {getattr(cfg, key)}; the data has {side} of shape {batch[side].shape[1:]}"
        for key, side in (("features", "inputs"), ("outputs", "targets"))
        if batch[side].shape[1:] != (getattr(cfg, key),)
    }
