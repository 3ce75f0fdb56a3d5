"""A classifier of sentences of many lengths: two inputs, word dropout drawn inside the model."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import optax
from linen_nnx import Part

from configs.build import Count, Decay
from model import Applied, Batch, Metrics, Rngs

STREAMS = ("dropout", "words")


@dataclass(frozen=True)
class Options:
    """Options of the classifier; see `configs/model/classifier.yaml` for meanings."""

    family: Literal["examples.classifier"]
    vocab: Count
    width: Count
    dropout: Decay
    word_dropout: Decay


def parts(cfg: Options) -> Part:
    """Embedding, both LSTMs, attention and output, in one part."""
    from examples.classifier import linen, nnx

    sizes = (cfg.vocab, cfg.width, cfg.dropout, cfg.word_dropout)
    return Part(
        linen=lambda: linen.Classifier(*sizes),
        nnx=lambda rngs: nnx.Classifier(*sizes, rngs=rngs),
    )


def inputs(batch: Batch) -> tuple[Any, ...]:
    """Words (B, L) int32, and how many of each row are real (B,) int32."""
    return batch["words"], batch["lengths"]


def loss(model: Applied, batch: Batch, rngs: Rngs) -> Metrics:
    """Cross-entropy of labels (B,) int32, and counts of which `derived` makes an F1."""
    logits = model(*inputs(batch), train=model.train)
    labels, found = batch["labels"], logits > 0
    return {
        "loss": optax.sigmoid_binary_cross_entropy(logits, labels),
        "accuracy": (found == labels).astype(jnp.float32),
        "hits": (found * labels).astype(jnp.float32),
        "found": found.astype(jnp.float32),
        "positive": labels.astype(jnp.float32),
    }


def derived(means: Mapping[str, float]) -> dict[str, float]:
    """F1 of the positive sentences, which is no mean over sentences."""
    either = means["found"] + means["positive"]
    return {"f1": 2 * means["hits"] / either if either else 0.0}
