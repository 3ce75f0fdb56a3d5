"""The small ResNet in Linen: compact modules, automatic names. Its twin: `nnx.py` beside it.

Shapes: B batch, H height, W width of the image, C channels.
"""

import flax.linen as nn
from jax import Array

from model.convnet import Options
from model.shared import Shared


class Block(nn.Module):
    """A residual block: (B, H, W, C) -> (B, H, W, C)."""

    cfg: Options

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        cfg = self.cfg
        y = nn.Conv(cfg.width, (3, 3), use_bias=False, dtype=cfg.dtype)(x)
        y = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=cfg.dtype)(y)
        y = nn.relu(y)
        y = nn.Dropout(cfg.dropout)(y, deterministic=not train)
        y = nn.Conv(cfg.width, (3, 3), use_bias=False, dtype=cfg.dtype)(y)
        y = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=cfg.dtype)(y)
        return nn.relu(x + y)


class Encoder(nn.Module):
    """Convolutions: images (B, H, W, channels) float32 -> features (B, C), {gain (C,)}."""

    cfg: Options

    @nn.compact
    def __call__(self, images: Array, *, train: bool) -> tuple[Array, Shared]:
        cfg = self.cfg
        x = nn.Conv(cfg.width, (3, 3), use_bias=False, dtype=cfg.dtype)(images)
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, dtype=cfg.dtype)(x)
        x = nn.relu(x)
        # Named in the loop, for under remat Linen would call them CheckpointBlock_0 and so on.
        block = nn.remat(Block, static_argnums=(2,)) if cfg.remat else Block
        for i in range(cfg.depth):
            x = block(cfg, name=f"Block_{i}")(x, train)
        gain = self.param("gain", nn.initializers.ones, (cfg.width,))
        x = x.mean(axis=(1, 2)) * gain.astype(cfg.dtype)[None]
        return x, {"gain": gain}


class Head(nn.Module):
    """Dense, relu, gain, Dense: features (B, C), {gain (C,)} -> logits (B, classes) float32."""

    cfg: Options

    @nn.compact
    def __call__(self, x: Array, shared: Shared, *, train: bool) -> Array:
        cfg = self.cfg
        x = nn.relu(nn.Dense(cfg.width, dtype=cfg.dtype)(x))
        x = x * shared["gain"].astype(cfg.dtype)[None]
        x = nn.Dropout(cfg.dropout)(x, deterministic=not train)
        return nn.Dense(cfg.classes, dtype=cfg.dtype)(x).astype("float32")
