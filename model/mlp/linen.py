"""The smallest hybrid's Linen twin: Dense, relu | Dense. Its twin: `nnx.py` beside it.

Shapes: B batch, F input features, H hidden width.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from model.mlp import Options
from model.shared import Shared


class Encoder(nn.Module):
    """Dense, relu: inputs (B, F) float32 -> features (B, H), {kernel (F, H)}."""

    cfg: Options

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> tuple[Array, Shared]:
        cfg = self.cfg
        dense = nn.Dense(cfg.hidden, dtype=cfg.dtype)
        x = nn.relu(dense(x))
        x = nn.Dropout(cfg.dropout)(x, deterministic=not train)
        return x, {"kernel": dense.variables["params"]["kernel"]}


class Head(nn.Module):
    """Dense over the features and their projection back through the encoder's own kernel.

    features (B, H), {kernel (F, H)} -> predictions (B, outputs) float32.
    """

    cfg: Options

    @nn.compact
    def __call__(self, x: Array, shared: Shared, *, train: bool) -> Array:
        cfg = self.cfg
        back = jnp.dot(x, shared["kernel"].astype(cfg.dtype).T)
        x = jnp.concatenate([x, back], axis=-1)
        return nn.Dense(cfg.outputs, dtype=cfg.dtype)(x).astype("float32")
