"""The same vision transformer in nnx: a plain list of blocks, names of its own."""

import jax
import jax.numpy as jnp
from flax import nnx


def attend(query: jax.Array, key: jax.Array, value: jax.Array, **_: object) -> jax.Array:
    """Softmax attention in the order of Linen's; nnx's own, from `jax.nn`, rounds otherwise.

    `(batch, tokens, heads, head width)` each. What nnx passes besides concerns masks and dropout,
    which this model has not.
    """
    query = query / jnp.sqrt(query.shape[-1])
    weights = nnx.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


class Mlp(nnx.Module):
    def __init__(self, width: int, *, rngs: nnx.Rngs) -> None:
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(nnx.gelu(self.up(x)))


class Block(nnx.Module):
    """A pre-norm block: (batch, tokens, width) -> the same."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, attention_fn=attend, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.mlp = Mlp(width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nnx.Module):
    """Images (batch, height, width, channels) float32 -> logits (batch, classes) float32.

    With `loop` the blocks run in a loop, as under `nn.scan`, and round as they do there.
    """

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
        loop: bool = False,
    ) -> None:
        self.loop = loop
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
        if self.loop:
            block = nnx.graphdef(self.blocks[0])
            states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, self.blocks))
            x, _ = jax.lax.scan(lambda x, state: (nnx.merge(block, state)(x), None), x, states)
        else:
            for block in self.blocks:
                x = block(x)
        return self.classifier(self.norm(x)[:, 0])
