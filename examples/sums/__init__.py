"""Sums, digit by digit: only the answer counts, and batches come in several lengths from files."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp
from typing import Any, Literal

import jax.numpy as jnp
import optax
from linen_nnx import Part

from configs.build import Count, Decay
from model import Applied, Batch, Metrics, Rngs


@dataclass(frozen=True)
class Options:
    """Options of the transformer; see `configs/model/sums.yaml` for meanings."""

    family: Literal["examples.sums"]
    depth: Count
    width: Count
    heads: Count
    dropout: Decay


def parts(cfg: Options) -> Part:
    """The transformer, in one part."""
    from examples.sums import linen, nnx

    sizes = (cfg.depth, cfg.width, cfg.heads, cfg.dropout)
    return Part(
        linen=lambda: linen.Transformer(*sizes),
        nnx=lambda rngs: nnx.Transformer(*sizes, rngs=rngs),
    )


def inputs(batch: Batch) -> tuple[Any, ...]:
    """Symbols (B, L) int32 and which of them are real (B, L) bool."""
    return batch["inputs"], batch["real"]


def loss(model: Applied, batch: Batch, rngs: Rngs) -> Metrics:
    """Nats of each symbol of an answer, weighted (B, L): the mean is one over symbols."""
    logits = model(*inputs(batch), train=model.train)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    right = (logits.argmax(-1) == batch["targets"]).astype(jnp.float32)
    weights = batch["weights"]
    whole = jnp.where(weights > 0, right, 1.0).min(axis=1)
    return {"loss": (nats, weights), "symbols": (right, weights), "accuracy": whole}


def derived(means: Mapping[str, float]) -> dict[str, float]:
    """Perplexity of a symbol, which is no mean of perplexities."""
    return {"perplexity": exp(means["loss"])}
