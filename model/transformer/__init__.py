"""A causal byte-level language model; the head scores with the encoder's own embedding table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax
from linen_nnx import Part

from configs.build import Count, Decay, refuse
from model import Applied, Batch, Metrics, Rngs


@dataclass(frozen=True)
class Options:
    """Options of the transformer; see `configs/model/transformer.yaml` for meanings and units."""

    family: Literal["transformer"]
    depth: Count
    width: Count
    heads: Count
    mlp_factor: Count
    vocab: Count
    length: Count
    dropout: Decay
    dtype: Literal["float32", "bfloat16"]
    remat: bool
    scan: bool

    def __post_init__(self) -> None:
        if self.width % self.heads:
            refuse({"width": f"got {self.width}; expected a multiple of heads, {self.heads}"})


def parts(cfg: Options) -> dict[str, Part]:
    """Both halves of the model, each written twice."""
    from model.transformer import linen, nnx  # late: both import `Options` from here

    return {
        "encoder": Part(
            linen=lambda: linen.Encoder(cfg), nnx=lambda rngs: nnx.Encoder(cfg, rngs=rngs)
        ),
        "head": Part(linen=lambda: linen.Head(cfg), nnx=lambda rngs: nnx.Head(cfg, rngs=rngs)),
    }


def forward(parts: Any, tokens: jax.Array, *, train: bool = False) -> jax.Array:
    """tokens (B, L) int32 -> logits (B, L, V) float32; the encoder lends its table to the head."""
    features, shared = parts.encoder(tokens, train=train)
    return parts.head(features, shared, train=train)


def inputs(batch: Batch) -> tuple[Any, ...]:
    """What `forward` takes of a batch."""
    return (batch["inputs"],)


def loss(model: Applied, batch: Batch, rngs: Rngs) -> Metrics:
    """Cross-entropy in nats per byte: targets (B, L) int32 -> loss (B,)."""
    logits = model(*inputs(batch), train=model.train)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    # One value for each window, since the mean over examples is the run's to take: rows that only
    # fill up a batch weigh nothing.
    return {"loss": nats.mean(axis=-1)}


def rules(cfg: Options) -> str:
    """Scanned Linen blocks are stored stacked, which takes a rule book of its own."""
    return "rules_scan.yaml" if cfg.scan else "rules.yaml"


def misfits(cfg: Options, batch: Mapping[str, Any], classes: int | None) -> dict[str, str]:
    """Options that do not fit the data: `{key: what is wrong}`."""
    shape, found = batch["inputs"].shape[1:], {}
    # A position beyond the table has no row there, and jax refuses no index.
    if len(shape) != 1 or shape[0] > cfg.length:
        found["length"] = f"got {cfg.length}; the data has inputs of shape {shape}"
    if classes is None or classes > cfg.vocab or batch["targets"].shape[1:] != shape:
        found["vocab"] = f"got {cfg.vocab}; the data has {classes or 'no'} symbols"
    return found
