"""The smallest hybrid's nnx twin: Linear, relu | Linear. Its twin: `model/linen/mlp.py`.

Shapes: B batch, F input features, H hidden width.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.families.mlp import Config
from model.shared import Key, Shared, fold


class Encoder(nnx.Module):
    """Linear, relu: inputs (B, F) float32 -> features (B, H), {kernel (F, H)}."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(cfg.features, cfg.hidden, dtype=cfg.dtype, rngs=rngs)
        self.dropout = nnx.Dropout(cfg.dropout)

    def __call__(self, x: Array, *, train: bool, key: Key) -> tuple[Array, Shared]:
        x = nnx.relu(self.linear(x))
        x = self.dropout(x, deterministic=not train, rngs=fold(key, 0))
        return x, {"kernel": self.linear.kernel[...]}


class Head(nnx.Module):
    """Linear over the features and their projection back through the encoder's own kernel.

    features (B, H), {kernel (F, H)} -> predictions (B, outputs) float32.
    """

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        width = cfg.hidden + cfg.features
        self.readout = nnx.Linear(width, cfg.outputs, dtype=cfg.dtype, rngs=rngs)

    def __call__(self, x: Array, shared: Shared, *, train: bool, key: Key) -> Array:
        back = jnp.dot(x, shared["kernel"].astype(self.cfg.dtype).T)
        x = jnp.concatenate([x, back], axis=-1)
        return self.readout(x).astype("float32")
