"""The small ResNet in nnx: named attributes, a list of blocks. Its twin: `linen.py` beside it.

Shapes: B batch, H height, W width of the image, C channels.
"""

import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.convnet import Options
from model.shared import Shared, keep_dtype


class Block(nnx.Module):
    """A residual block: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, cfg: Options, *, rngs: nnx.Rngs) -> None:
        self.conv_in = conv(cfg, cfg.width, rngs)
        self.norm_in = norm(cfg, rngs)
        self.dropout = nnx.Dropout(cfg.dropout, rngs=rngs)
        self.conv_out = conv(cfg, cfg.width, rngs)
        self.norm_out = norm(cfg, rngs)

    def __call__(self, x: Array, train: bool) -> Array:
        y = self.conv_in(x)
        y = self.norm_in(y, use_running_average=not train)
        y = nnx.relu(y)
        y = self.dropout(y, deterministic=not train)
        y = self.conv_out(y)
        y = self.norm_out(y, use_running_average=not train)
        return nnx.relu(x + y)


class Encoder(nnx.Module):
    """Convolutions: images (B, H, W, channels) float32 -> features (B, C), {gain (C,)}."""

    def __init__(self, cfg: Options, *, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        self.stem = conv(cfg, cfg.channels, rngs)
        self.stem_norm = norm(cfg, rngs)
        self.blocks = nnx.List([Block(cfg, rngs=rngs) for _ in range(cfg.depth)])
        self.channel_gain = nnx.Param(jnp.ones((cfg.width,)))

    def __call__(self, images: Array, *, train: bool) -> tuple[Array, Shared]:
        cfg = self.cfg
        x = self.stem(images)
        x = self.stem_norm(x, use_running_average=not train)
        x = nnx.relu(x)
        # `train` is static: BatchNorm takes its statistics from the batch or from the past, which
        # are two programs.
        call = nnx.remat(Block.__call__, static_argnums=(2,)) if cfg.remat else Block.__call__
        for block in self.blocks:
            x = call(block, x, train)
        # Read once, and used in both halves of the model: its gradients add up.
        gain = self.channel_gain[...]
        x = x.mean(axis=(1, 2)) * gain.astype(cfg.dtype)[None]
        return x, {"gain": gain}


class Head(nnx.Module):
    """Linear, relu, gain, Linear: features (B, C), {gain (C,)} -> logits (B, classes) float32."""

    def __init__(self, cfg: Options, *, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        self.hidden = nnx.Linear(cfg.width, cfg.width, dtype=cfg.dtype, rngs=rngs)
        self.dropout = nnx.Dropout(cfg.dropout, rngs=rngs)
        self.classify = nnx.Linear(cfg.width, cfg.classes, dtype=cfg.dtype, rngs=rngs)

    def __call__(self, x: Array, shared: Shared, *, train: bool) -> Array:
        x = nnx.relu(self.hidden(x))
        x = x * shared["gain"].astype(self.cfg.dtype)[None]
        x = self.dropout(x, deterministic=not train)
        # The loss is taken in float32 whatever the layers compute in: in bfloat16 a softmax over
        # ten classes has two or three digits.
        return self.classify(x).astype("float32")


def conv(cfg: Options, channels: int, rngs: nnx.Rngs) -> nnx.Conv:
    # Without a bias, which the norm behind it would subtract again together with the mean.
    return nnx.Conv(channels, cfg.width, (3, 3), use_bias=False, dtype=cfg.dtype, rngs=rngs)


def norm(cfg: Options, rngs: nnx.Rngs) -> nnx.BatchNorm:
    return nnx.BatchNorm(
        cfg.width, momentum=0.9, dtype=cfg.dtype, promote_dtype=keep_dtype, rngs=rngs
    )
