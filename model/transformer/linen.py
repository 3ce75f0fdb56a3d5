"""The transformer in Linen: compact modules, automatic names. Its twin: `nnx.py` beside it.

Shapes: B batch, L length, D width, V vocabulary.
"""

import flax.linen as nn
import jax.numpy as jnp
from jax import Array

from model.shared import Shared, causal_attention, tied_logits
from model.transformer import Options


class Mlp(nn.Module):
    """Dense, gelu, Dense, dropout: (B, L, D) -> (B, L, D)."""

    cfg: Options

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array:
        cfg = self.cfg
        x = nn.Dense(cfg.mlp_factor * cfg.width, dtype=cfg.dtype)(x)
        x = nn.gelu(x)
        x = nn.Dense(cfg.width, dtype=cfg.dtype)(x)
        return nn.Dropout(cfg.dropout)(x, deterministic=not train)


class Block(nn.Module):
    """A pre-norm block: (B, L, D) -> (B, L, D)."""

    cfg: Options

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        cfg = self.cfg
        y = nn.LayerNorm(dtype=cfg.dtype)(x)
        y = nn.MultiHeadDotProductAttention(
            cfg.heads, dtype=cfg.dtype, attention_fn=causal_attention
        )(y)
        x = x + nn.Dropout(cfg.dropout)(y, deterministic=not train)
        y = nn.LayerNorm(dtype=cfg.dtype)(x)
        return x + Mlp(cfg)(y, train=train)


class Encoder(nn.Module):
    """Embedding, blocks, final norm: tokens (B, L) int32 -> features (B, L, D), {table (V, D)}."""

    cfg: Options

    @nn.compact
    def __call__(self, tokens: Array, *, train: bool) -> tuple[Array, Shared]:
        cfg = self.cfg
        embed = nn.Embed(cfg.vocab, cfg.width, dtype=cfg.dtype)
        x = embed(tokens)
        positions = jnp.arange(tokens.shape[-1])[None]
        x = x + nn.Embed(cfg.length, cfg.width, dtype=cfg.dtype)(positions)
        x = nn.Dropout(cfg.dropout)(x, deterministic=not train)
        # Named below, since Linen would call a block under remat CheckpointBlock_0: a checkpoint
        # would then depend on whether memory was saved.
        block = nn.remat(Block, static_argnums=(2,)) if cfg.remat else Block
        if cfg.scan:
            scan = nn.scan(
                lambda block, x, _: (block(x, train), None),
                variable_axes={"params": 0},
                # Else all blocks would begin with the same weights, and drop the same activations.
                split_rngs={"params": True, "dropout": True},
                length=cfg.depth,
            )
            x, _ = scan(block(cfg, name="ScanBlock"), x, None)
        else:
            for i in range(cfg.depth):
                x = block(cfg, name=f"Block_{i}")(x, train)
        x = nn.LayerNorm(dtype=cfg.dtype)(x)
        # Lent and not copied, so that the gradients of both uses add up in one leaf.
        return x, {"table": embed.embedding}


class Head(nn.Module):
    """Dense, gelu, norm, tied logits: features (B, L, D), {table (V, D)} -> (B, L, V) float32."""

    cfg: Options

    @nn.compact
    def __call__(self, x: Array, shared: Shared, *, train: bool) -> Array:
        cfg = self.cfg
        x = nn.Dense(cfg.width, dtype=cfg.dtype)(x)
        x = nn.gelu(x)
        x = nn.LayerNorm(dtype=cfg.dtype)(x)
        x = nn.Dropout(cfg.dropout)(x, deterministic=not train)
        # A bare parameter, in no layer: rule books have to tell what becomes of those, too.
        bias = self.param("bias", nn.initializers.zeros, (cfg.vocab,))
        return tied_logits(x, shared["table"], bias)
