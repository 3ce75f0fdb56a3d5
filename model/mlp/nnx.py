"""The smallest hybrid's nnx twin: Linear, relu | Linear. Its twin: `linen.py` beside it.

Shapes: B batch, F input features, H hidden width.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.mlp import Options
from model.shared import Shared


class Encoder(nnx.Module):
    """Linear, relu: inputs (B, F) float32 -> features (B, H), {kernel (F, H)}."""

    def __init__(self, cfg: Options, *, rngs: nnx.Rngs) -> None:
        self.linear = nnx.Linear(cfg.features, cfg.hidden, dtype=cfg.dtype, rngs=rngs)
        self.dropout = nnx.Dropout(cfg.dropout, rngs=rngs)

    def __call__(self, x: Array, *, train: bool) -> tuple[Array, Shared]:
        x = nnx.relu(self.linear(x))
        x = self.dropout(x, deterministic=not train)
        return x, {"kernel": self.linear.kernel[...]}


class Head(nnx.Module):
    """Linear over the features and their projection back through the encoder's own kernel.

    features (B, H), {kernel (F, H)} -> predictions (B, outputs) float32.
    """

    def __init__(self, cfg: Options, *, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        width = cfg.hidden + cfg.features
        self.readout = nnx.Linear(width, cfg.outputs, dtype=cfg.dtype, rngs=rngs)

    def __call__(self, x: Array, shared: Shared, *, train: bool) -> Array:
        back = jnp.dot(x, shared["kernel"].astype(self.cfg.dtype).T)
        x = jnp.concatenate([x, back], axis=-1)
        return self.readout(x).astype("float32")
