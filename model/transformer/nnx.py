"""The transformer in nnx: named attributes, a list of blocks. Its twin: `linen.py` beside it.

Shapes: B batch, L length, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from model.shared import Shared, causal_attention, keep_dtype, tied_logits
from model.transformer import Options


class Mlp(nnx.Module):
    """Linear, gelu, Linear, dropout: (B, L, D) -> (B, L, D)."""

    def __init__(self, cfg: Options, *, rngs: nnx.Rngs) -> None:
        hidden = cfg.mlp_factor * cfg.width
        self.up = nnx.Linear(cfg.width, hidden, dtype=cfg.dtype, rngs=rngs)
        self.down = nnx.Linear(hidden, cfg.width, dtype=cfg.dtype, rngs=rngs)
        self.dropout = nnx.Dropout(cfg.dropout, rngs=rngs)

    def __call__(self, x: Array, *, train: bool) -> Array:
        x = self.up(x)
        x = nnx.gelu(x)
        x = self.down(x)
        return self.dropout(x, deterministic=not train)


class Block(nnx.Module):
    """A pre-norm block: (B, L, D) -> (B, L, D)."""

    def __init__(self, cfg: Options, *, rngs: nnx.Rngs) -> None:
        self.attention_norm = norm(cfg, rngs)
        self.attention = nnx.MultiHeadAttention(
            cfg.heads,
            cfg.width,
            dtype=cfg.dtype,
            attention_fn=causal_attention,
            # nnx asks at each call for what is not said here; and without a stream of its own the
            # layer has no random state that its Linen twin has not.
            decode=False,
            keep_rngs=False,
            rngs=rngs,
        )
        self.mlp_norm = norm(cfg, rngs)
        self.mlp = Mlp(cfg, rngs=rngs)
        self.dropout = nnx.Dropout(cfg.dropout, rngs=rngs)

    def __call__(self, x: Array, train: bool) -> Array:
        y = self.attention_norm(x)
        y = self.attention(y)
        x = x + self.dropout(y, deterministic=not train)
        y = self.mlp_norm(x)
        return x + self.mlp(y, train=train)


class Encoder(nnx.Module):
    """Embedding, blocks, final norm: tokens (B, L) int32 -> features (B, L, D), {table (V, D)}."""

    def __init__(self, cfg: Options, *, rngs: nnx.Rngs) -> None:
        self.cfg = cfg
        self.token_embed = nnx.Embed(cfg.vocab, cfg.width, dtype=cfg.dtype, rngs=rngs)
        self.position_embed = nnx.Embed(cfg.length, cfg.width, dtype=cfg.dtype, rngs=rngs)
        self.dropout = nnx.Dropout(cfg.dropout, rngs=rngs)
        # An nnx.List, for nnx refuses modules in a plain list. Its indices are the names that the
        # rule book has for the blocks of Linen: `blocks/0`, `blocks/1`.
        self.blocks = nnx.List([Block(cfg, rngs=rngs) for _ in range(cfg.depth)])
        self.norm = norm(cfg, rngs)

    def __call__(self, tokens: Array, *, train: bool) -> tuple[Array, Shared]:
        cfg = self.cfg
        x = self.token_embed(tokens)
        # With an axis for the batch: to add (L, D) to (B, L, D) is a promotion of rank, which the
        # tests forbid, since it is more often a mistake than meant.
        positions = jnp.arange(tokens.shape[-1])[None]
        x = x + self.position_embed(positions)
        x = self.dropout(x, deterministic=not train)
        # `train` is static (argument 2, after the block and x), since dropout is there or not there
        # in the traced program.
        call = nnx.remat(Block.__call__, static_argnums=(2,)) if cfg.remat else Block.__call__
        if cfg.scan:
            # A loop's body rounds otherwise than the same blocks written out: where Linen's blocks
            # are under nn.scan, these have to be in a loop as well, their parameters stacked.
            graphdef = nnx.graphdef(self.blocks[0])
            states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, self.blocks))
            x, _ = jax.lax.scan(
                lambda x, state: (call(nnx.merge(graphdef, state), x, train), None), x, states
            )
        else:
            for block in self.blocks:
                x = call(block, x, train)
        x = self.norm(x)
        # The array and not the Variable: the head may be a Linen module, which knows no Variables.
        return x, {"table": self.token_embed.embedding[...]}


class Head(nnx.Module):
    """Linear, gelu, norm, tied logits: features (B, L, D), {table (V, D)} -> (B, L, V) float32."""

    def __init__(self, cfg: Options, *, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(cfg.width, cfg.width, dtype=cfg.dtype, rngs=rngs)
        self.norm = norm(cfg, rngs)
        self.dropout = nnx.Dropout(cfg.dropout, rngs=rngs)
        self.logits_bias = nnx.Param(jnp.zeros((cfg.vocab,)))

    def __call__(self, x: Array, shared: Shared, *, train: bool) -> Array:
        x = self.dense(x)
        x = nnx.gelu(x)
        x = self.norm(x)
        x = self.dropout(x, deterministic=not train)
        return tied_logits(x, shared["table"], self.logits_bias[...])


def norm(cfg: Options, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # Linen normalises before it casts, and nnx after, unless it is told not to cast.
    return nnx.LayerNorm(cfg.width, dtype=cfg.dtype, promote_dtype=keep_dtype, rngs=rngs)
