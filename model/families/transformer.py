"""A causal byte-level language model; the head scores with the encoder's own embedding table."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import optax
from jax import Array

from configs.build import Count, Decay, refuse


@dataclass(frozen=True)
class Config:
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


def rules(cfg: Config) -> str:
    """Scanned Linen blocks are stored stacked, which takes a rule book of its own."""
    return "transformer_scan" if cfg.scan else "transformer"


def misfits(cfg: Config, batch: Mapping[str, Any], classes: int | None) -> dict[str, str]:
    """Options that do not fit the data: `{key: what is wrong}`."""
    shape, found = batch["inputs"].shape[1:], {}
    if len(shape) != 1 or shape[0] > cfg.length:
        found["length"] = f"got {cfg.length}; the data has inputs of shape {shape}"
    if classes is None or classes > cfg.vocab or batch["targets"].shape[1:] != shape:
        found["vocab"] = f"got {cfg.vocab}; the data has {classes or 'no'} symbols"
    return found


def losses(outputs: Array, batch: dict[str, Array]) -> dict[str, Array]:
    """Cross-entropy in nats per byte: logits (B, L, V), targets (B, L) int32 -> loss (B,)."""
    nats = optax.softmax_cross_entropy_with_integer_labels(outputs, batch["targets"])
    return {"loss": nats.mean(axis=-1)}
