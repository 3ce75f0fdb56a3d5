"""A small vision transformer in Flax Linen, as a stranger brings it: its blocks under `nn.scan`."""

import jax
import jax.numpy as jnp
from flax import linen as nn


class Block(nn.Module):
    """A pre-norm block, written as `nn.scan` wants it: (batch, tokens, width), with a carry."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        width = x.shape[-1]
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.heads)(y)  # pyrefly: ignore
        y = nn.LayerNorm()(x)
        y = nn.Dense(4 * width)(y)
        return x + nn.Dense(width)(nn.gelu(y)), None


class ViT(nn.Module):
    """Images (batch, height, width, channels) float32 -> logits (batch, classes) float32."""

    classes: int = 10
    patch: int = 2
    width: int = 64
    depth: int = 4
    heads: int = 4

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        patch = (self.patch, self.patch)
        x = nn.Conv(self.width, patch, strides=patch, name="embedding")(images)
        x = x.reshape(len(x), -1, self.width)
        cls = self.param("cls", nn.initializers.zeros, (1, 1, self.width))
        x = jnp.concatenate([jnp.tile(cls, (len(x), 1, 1)), x], axis=1)
        shape = (1, x.shape[1], self.width)
        x = x + self.param("pos_embedding", nn.initializers.normal(0.02), shape)
        blocks = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
        )
        x, _ = blocks(self.heads, name="encoder")(x, None)
        x = nn.LayerNorm(name="encoder_norm")(x)
        return nn.Dense(self.classes, name="head")(x[:, 0])
