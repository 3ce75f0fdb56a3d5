"""The stranger's model as a family of the template: one part, whose Linen half is used as it is."""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from linen_nnx import Part

from configs.build import Count, Decay
from model import Applied, Batch, Metrics, Rngs


@dataclass(frozen=True)
class Options:
    """The keys of `configs/model/mlp.yaml`, so that it needs none of its own."""

    family: Literal["net"]
    features: Count
    hidden: Count
    outputs: Count
    dropout: Decay
    dtype: Literal["float32"]


def parts(cfg: Options) -> Part:
    from .linen import Net
    from .nnx import Port

    return Part(
        linen=lambda: Net(cfg.hidden, cfg.dropout),
        nnx=lambda rngs: Port(cfg.features, cfg.hidden, cfg.dropout, rngs=rngs),
    )


def inputs(batch: Batch) -> tuple[Any, ...]:
    return (batch["inputs"],)


def loss(model: Applied, batch: Batch, rngs: Rngs) -> Metrics:
    predicted = model(*inputs(batch), train=model.train)
    return {"loss": jnp.square(predicted - batch["targets"])[:, 0]}
