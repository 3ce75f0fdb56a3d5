"""BERT in nnx, flat and short, without dropout.

Shapes: B batch, L length, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from linen_bert import EPSILON, Config


class Attention(nnx.Module):
    """(B, L, D), bias (B, 1, 1, L) -> (B, L, D)."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs) -> None:
        self.heads = cfg.heads
        self.query = nnx.Linear(cfg.width, cfg.width, rngs=rngs)
        self.key = nnx.Linear(cfg.width, cfg.width, rngs=rngs)
        self.value = nnx.Linear(cfg.width, cfg.width, rngs=rngs)
        self.out = nnx.Linear(cfg.width, cfg.width, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        q, k, v = (
            project(x).reshape(*x.shape[:2], self.heads, -1)
            for project in (self.query, self.key, self.value)
        )
        # In the order of Linen's attention; `jax.nn.dot_product_attention` rounds otherwise.
        scores = jnp.einsum("bqhd,bkhd->bhqk", q / jnp.sqrt(q.shape[-1]), k) + bias
        weights = nnx.softmax(scores)
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class Layer(nnx.Module):
    """A post-norm layer: (B, L, D), bias (B, 1, 1, L) -> (B, L, D)."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs) -> None:
        self.attention = Attention(cfg, rngs=rngs)
        self.attention_norm = nnx.LayerNorm(cfg.width, epsilon=EPSILON, rngs=rngs)
        self.up = nnx.Linear(cfg.width, 4 * cfg.width, rngs=rngs)
        self.down = nnx.Linear(4 * cfg.width, cfg.width, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(cfg.width, epsilon=EPSILON, rngs=rngs)

    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        x = self.attention_norm(x + self.attention(x, bias))
        return self.mlp_norm(x + self.down(nnx.gelu(self.up(x), approximate=False)))


class Bert(nnx.Module):
    """Tokens, types (B, L) int32, mask (B, L) bool -> words (B, L, V), next sentence (B, 2)."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs) -> None:
        self.words = nnx.Embed(cfg.vocab, cfg.width, rngs=rngs)
        self.positions = nnx.Embed(cfg.positions, cfg.width, rngs=rngs)
        self.types = nnx.Embed(cfg.types, cfg.width, rngs=rngs)
        self.norm = nnx.LayerNorm(cfg.width, epsilon=EPSILON, rngs=rngs)
        self.layers = nnx.List([Layer(cfg, rngs=rngs) for _ in range(cfg.depth)])
        self.pooler = nnx.Linear(cfg.width, cfg.width, rngs=rngs)
        self.transform = nnx.Linear(cfg.width, cfg.width, rngs=rngs)
        self.transform_norm = nnx.LayerNorm(cfg.width, epsilon=EPSILON, rngs=rngs)
        self.word_bias = nnx.Param(jnp.zeros(cfg.vocab))
        self.next_sentence = nnx.Linear(cfg.width, 2, rngs=rngs)

    def __call__(
        self, tokens: jax.Array, types: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        x = self.words(tokens) + self.types(types)
        x = self.norm(x + self.positions(jnp.arange(tokens.shape[1])))
        bias = jnp.where(mask, 0.0, jnp.finfo(x.dtype).min)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, bias)
        pooled = nnx.tanh(self.pooler(x[:, 0]))
        y = self.transform_norm(nnx.gelu(self.transform(x), approximate=False))
        words = y @ self.words.embedding[...].T + self.word_bias[...]
        return words, self.next_sentence(pooled)
