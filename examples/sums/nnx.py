"""A causal transformer in nnx, with dropout in its attention. Its twin: `linen.py`."""

import jax
from flax import nnx
from jax import Array

SYMBOLS, POSITIONS = 14, 64


class Block(nnx.Module):
    """x (B, L, width), mask (B, 1, L, L) -> (B, L, width)."""

    def __init__(self, width: int, heads: int, dropout: float, *, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            heads, width, dropout_rate=dropout, decode=False, rngs=rngs
        )
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None, train: bool) -> Array:
        y = self.attention(self.norm1(x), mask=mask, deterministic=not train)
        x = x + self.dropout(y, deterministic=not train)
        y = self.down(nnx.gelu(self.up(self.norm2(x))))
        return x + self.dropout(y, deterministic=not train)


class Transformer(nnx.Module):
    """Symbols (B, L) int32, which are real (B, L) bool -> logits (B, L, symbols)."""

    def __init__(
        self,
        depth: int = 2,
        width: int = 32,
        heads: int = 2,
        dropout: float = 0.1,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.embed = nnx.Embed(SYMBOLS, width, rngs=rngs)
        self.positions = nnx.Param(0.02 * jax.random.normal(rngs.params(), (POSITIONS, width)))
        self.blocks = nnx.List([Block(width, heads, dropout, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.out = nnx.Linear(width, SYMBOLS, rngs=rngs)

    def __call__(self, symbols: Array, real: Array, train: bool = False) -> Array:
        x = self.embed(symbols) + self.positions[: symbols.shape[1]]
        mask = nnx.combine_masks(nnx.make_causal_mask(symbols), nnx.make_attention_mask(real, real))
        for block in self.blocks:
            x = block(x, mask, train)
        return self.out(self.norm(x))
