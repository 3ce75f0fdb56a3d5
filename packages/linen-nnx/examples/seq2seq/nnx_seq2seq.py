"""The same encoder-decoder in nnx, in one class; each cell holds its four gates fused.

Shapes: B batch, S source length, T target length, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx


class Seq2Seq(nnx.Module):
    """Source (B, S) and lengths (B,), target shifted right (B, T), int32 -> logits (B, T, V)."""

    def __init__(
        self, vocab: int, embedding: int = 32, width: int = 128, *, rngs: nnx.Rngs
    ) -> None:
        def lstm() -> nnx.RNN:
            # rngs=False: else an RNN keeps a random key, for which Linen has no leaf.
            cell = nnx.OptimizedLSTMCell(embedding, width, rngs=rngs)
            return nnx.RNN(cell, return_carry=True, rngs=False)

        self.width = width
        self.characters = nnx.Embed(vocab, embedding, rngs=rngs)
        self.reader, self.writer = lstm(), lstm()
        self.scores = nnx.Linear(width, vocab, rngs=rngs)

    def __call__(self, source: jax.Array, lengths: jax.Array, target: jax.Array) -> jax.Array:
        zeros = jnp.zeros((len(source), self.width))  # as Linen's RNN begins by default
        x = self.characters(source)
        carry, _ = self.reader(x, initial_carry=(zeros, zeros), seq_lengths=lengths)
        _, y = self.writer(self.characters(target), initial_carry=carry)
        return self.scores(y)
