"""A causal transformer in Flax Linen, with dropout in its attention. Its twin: `nnx.py`."""

import flax.linen as nn
from jax import Array

SYMBOLS, POSITIONS = 14, 64


class Block(nn.Module):
    """x (B, L, width), mask (B, 1, L, L) -> (B, L, width)."""

    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, mask: Array | None, train: bool) -> Array:
        y = nn.LayerNorm()(x)
        y = nn.MultiHeadDotProductAttention(self.heads, dropout_rate=self.dropout)(
            y, mask=mask, deterministic=not train
        )
        x = x + nn.Dropout(self.dropout)(y, deterministic=not train)
        y = nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x))
        y = nn.Dense(x.shape[-1])(nn.gelu(y))
        return x + nn.Dropout(self.dropout)(y, deterministic=not train)


class Transformer(nn.Module):
    """Symbols (B, L) int32, which are real (B, L) bool -> logits (B, L, symbols)."""

    depth: int = 2
    width: int = 32
    heads: int = 2
    dropout: float = 0.1

    @nn.compact
    def __call__(self, symbols: Array, real: Array, train: bool = False) -> Array:
        x = nn.Embed(SYMBOLS, self.width)(symbols)
        positions = self.param("positions", nn.initializers.normal(0.02), (POSITIONS, self.width))
        x = x + positions[: symbols.shape[1]]
        mask = nn.combine_masks(nn.make_causal_mask(symbols), nn.make_attention_mask(real, real))
        for _ in range(self.depth):
            x = Block(self.heads, self.dropout)(x, mask, train)
        return nn.Dense(SYMBOLS)(nn.LayerNorm()(x))
