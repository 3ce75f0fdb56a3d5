"""A family as a twin, for `convert.py suggest` and `bisect`: copy it and put your family in.

The halves are named as a rule book of `configs/rules/` names them, so that what `suggest` writes is
that book. While the head is not ported yet, leave it out of both and return the features.
"""

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx
from jax import Array

from linen_nnx import Twin
from model.families.mlp import Config
from model.linen import mlp as linen_mlp
from model.nnx import mlp as nnx_mlp

CFG = Config(family="mlp", features=10, hidden=64, outputs=1, dropout=0.1, dtype="float32")


class Linen(nn.Module):
    encoder: nn.Module
    head: nn.Module

    def __call__(self, inputs: Array) -> Array:
        features, shared = self.encoder(inputs, train=False, key=None)
        return self.head(features, shared, train=False, key=None)


class Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.encoder = nnx_mlp.Encoder(CFG, rngs=rngs)
        self.head = nnx_mlp.Head(CFG, rngs=rngs)

    def __call__(self, inputs: Array) -> Array:
        features, shared = self.encoder(inputs, train=False, key=None)
        return self.head(features, shared, train=False, key=None)


TWIN = Twin(
    linen=lambda: Linen(linen_mlp.Encoder(CFG), linen_mlp.Head(CFG)),
    nnx=Nnx,
    inputs=lambda: (jnp.zeros((4, CFG.features)),),
)
