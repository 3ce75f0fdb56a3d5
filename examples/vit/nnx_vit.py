"""The same vision transformer in nnx: a plain list of blocks, names of its own."""

import jax
import jax.numpy as jnp
from flax import nnx


class Mlp(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x)))


class Block(nnx.Module):
    """A pre-norm block: (batch, tokens, width) -> the same."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        # nnx's norms and attention have Linen's defaults for epsilon and bias.
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = Mlp(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nnx.Module):
    """Images (batch, height, width, channels) float32 -> logits (batch, classes) float32."""

    def __init__(
        self,
        *,
        rngs: nnx.Rngs,
        tokens: int = 16,
        channels: int = 1,
        classes: int = 10,
        patch: int = 2,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        size = (patch, patch)
        self.patches = nnx.Conv(channels, width, size, strides=size, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, width)))
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, tokens + 1, width)))
        self.blocks = nnx.List([Block(width, heads, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.classifier = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = self.patches(images)
        x = x.reshape(len(x), -1, x.shape[-1])
        x = jnp.concatenate([jnp.tile(self.class_token[...], (len(x), 1, 1)), x], axis=1)
        x = x + self.position[...]
        for block in self.blocks:
            x = block(x)
        return self.classifier(self.norm(x)[:, 0])
