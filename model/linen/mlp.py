"""The smallest hybrid's Linen twin: Dense, relu | Dense. Its twin: `model/nnx/mlp.py`.

Shapes: B batch, F input features, H hidden width.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from model.families.mlp import Config
from model.shared import Key, Shared, fold


class Encoder(nn.Module):
    """Dense, relu: inputs (B, F) float32 -> features (B, H), {kernel (F, H)}."""

    cfg: Config

    @nn.compact
    def __call__(self, x: Array, *, train: bool, key: Key) -> tuple[Array, Shared]:
        cfg = self.cfg
        dense = nn.Dense(cfg.hidden, dtype=cfg.dtype)
        x = nn.relu(dense(x))
        x = nn.Dropout(cfg.dropout)(x, deterministic=not train, rng=fold(key, 0))
        return x, {"kernel": dense.variables["params"]["kernel"]}


class Head(nn.Module):
    """Dense over the features and their projection back through the encoder's own kernel.

    features (B, H), {kernel (F, H)} -> predictions (B, outputs) float32.
    """

    cfg: Config

    @nn.compact
    def __call__(self, x: Array, shared: Shared, *, train: bool, key: Key) -> Array:
        cfg = self.cfg
        back = jnp.dot(x, shared["kernel"].astype(cfg.dtype).T)
        x = jnp.concatenate([x, back], axis=-1)
        return nn.Dense(cfg.outputs, dtype=cfg.dtype)(x).astype("float32")
