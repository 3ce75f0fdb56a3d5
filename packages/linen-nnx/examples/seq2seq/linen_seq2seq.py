"""An LSTM encoder-decoder in Flax Linen, as a stranger brings it.

Shapes: B batch, S source length, T target length, V vocabulary.
"""

import jax
from flax import linen as nn


class Encoder(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
        rnn = nn.RNN(nn.OptimizedLSTMCell(self.width), return_carry=True)
        carry, _ = rnn(x, seq_lengths=lengths)
        return carry


class Decoder(nn.Module):
    width: int
    vocab: int

    @nn.compact
    def __call__(self, y: jax.Array, carry: tuple[jax.Array, jax.Array]) -> jax.Array:
        features = nn.RNN(nn.OptimizedLSTMCell(self.width), name="rnn")(y, initial_carry=carry)
        return nn.Dense(self.vocab, name="logits")(features)


class Seq2Seq(nn.Module):
    """Source (B, S) and lengths (B,), target shifted right (B, T), int32 -> logits (B, T, V)."""

    vocab: int
    embedding: int = 32
    width: int = 128

    def setup(self) -> None:
        self.embed = nn.Embed(self.vocab, self.embedding)
        self.encoder = Encoder(self.width)
        self.decoder = Decoder(self.width, self.vocab)

    def __call__(self, source: jax.Array, lengths: jax.Array, target: jax.Array) -> jax.Array:
        carry = self.encoder(self.embed(source), lengths)
        return self.decoder(self.embed(target), carry)
