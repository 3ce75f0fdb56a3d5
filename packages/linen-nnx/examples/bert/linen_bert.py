"""BERT in Flax Linen with the names that Hugging Face's Flax models gave it, without dropout.

It stands in for their code, which is no longer maintained: what is stranded are its files.
Shapes: B batch, L length, D width, H heads, V vocabulary.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import linen as nn

EPSILON = 1e-12


@dataclass(frozen=True)
class Config:
    """The sizes of BERT base."""

    vocab: int = 30522
    positions: int = 512
    types: int = 2
    width: int = 768
    depth: int = 12
    heads: int = 12


BASE = Config()
SMALL = Config(vocab=1000, positions=64, width=64, heads=4)


class Embeddings(nn.Module):
    """Tokens (B, L), token types (B, L) -> (B, L, D), and the table of words (V, D)."""

    cfg: Config

    @nn.compact
    def __call__(self, tokens: jax.Array, types: jax.Array) -> tuple[jax.Array, jax.Array]:
        cfg = self.cfg
        words = nn.Embed(cfg.vocab, cfg.width, name="word_embeddings")
        x = words(tokens) + nn.Embed(cfg.types, cfg.width, name="token_type_embeddings")(types)
        positions = nn.Embed(cfg.positions, cfg.width, name="position_embeddings")
        x = x + positions(jnp.arange(tokens.shape[1]))
        return nn.LayerNorm(EPSILON, name="LayerNorm")(x), words.embedding


class SelfAttention(nn.Module):
    """(B, L, D), bias (B, 1, 1, L) -> (B, L, D)."""

    cfg: Config

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        q, k, v = (
            nn.Dense(self.cfg.width, name=name)(x).reshape(*x.shape[:2], self.cfg.heads, -1)
            for name in ("query", "key", "value")
        )
        weights = nn.dot_product_attention_weights(q, k, bias)
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape)


class Output(nn.Module):
    """A projection back to the width, added to what came before, and normalised."""

    @nn.compact
    def __call__(self, y: jax.Array, x: jax.Array) -> jax.Array:
        y = nn.Dense(x.shape[-1], name="dense")(y)
        return nn.LayerNorm(EPSILON, name="LayerNorm")(x + y)


class Attention(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        return Output(name="output")(SelfAttention(self.cfg, name="self")(x, bias), x)


class Projection(nn.Module):
    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.features, name="dense")(x)


class Layer(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        x = Attention(self.cfg, name="attention")(x, bias)
        y = Projection(4 * self.cfg.width, name="intermediate")(x)
        return Output(name="output")(nn.gelu(y, approximate=False), x)


class Layers(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        for i in range(self.cfg.depth):
            x = Layer(self.cfg, name=str(i))(x, bias)
        return x


class Encoder(nn.Module):
    cfg: Config

    @nn.compact
    def __call__(self, x: jax.Array, bias: jax.Array) -> jax.Array:
        return Layers(self.cfg, name="layer")(x, bias)


class Model(nn.Module):
    """-> features (B, L, D), pooled (B, D), the table of words (V, D)."""

    cfg: Config

    @nn.compact
    def __call__(
        self, tokens: jax.Array, types: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        x, table = Embeddings(self.cfg, name="embeddings")(tokens, types)
        bias = jnp.where(mask, 0.0, jnp.finfo(x.dtype).min)[:, None, None, :]
        x = Encoder(self.cfg, name="encoder")(x, bias)
        return x, nn.tanh(Projection(self.cfg.width, name="pooler")(x[:, 0])), table


class Transform(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.gelu(nn.Dense(x.shape[-1], name="dense")(x), approximate=False)
        return nn.LayerNorm(EPSILON, name="LayerNorm")(x)


class Predictions(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, table: jax.Array) -> jax.Array:
        bias = self.param("bias", nn.initializers.zeros, table.shape[:1])
        return Transform(name="transform")(x) @ table.T + bias


class Heads(nn.Module):
    @nn.compact
    def __call__(
        self, x: jax.Array, pooled: jax.Array, table: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        words = Predictions(name="predictions")(x, table)
        return words, nn.Dense(2, name="seq_relationship")(pooled)


class BertForPreTraining(nn.Module):
    """Tokens, types (B, L) int32, mask (B, L) bool -> words (B, L, V), next sentence (B, 2)."""

    cfg: Config

    @nn.compact
    def __call__(
        self, tokens: jax.Array, types: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return Heads(name="cls")(*Model(self.cfg, name="bert")(tokens, types, mask))
