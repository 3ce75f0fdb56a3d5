"""A bidirectional LSTM with attention in nnx. Its twin: `linen.py` beside it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class Attention(nnx.Module):
    """Pools x (B, L, F) where real (B, L) bool -> (B, F)."""

    def __init__(self, features: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(features, width, rngs=rngs)
        self.score = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x: Array, real: Array) -> Array:
        scores = self.score(nnx.tanh(self.hidden(x)))[..., 0]
        weights = nnx.softmax(jnp.where(real, scores, -1e9))
        return jnp.einsum("bl,blf->bf", weights, x)


class Classifier(nnx.Module):
    """Words (B, L) int32, lengths (B,) int32 -> logits (B,)."""

    def __init__(
        self,
        vocab: int = 40,
        width: int = 16,
        dropout: float = 0.1,
        word_dropout: float = 0.1,
        *,
        rngs: nnx.Rngs,
    ) -> None:
        self.word_dropout, self.rngs = word_dropout, rngs
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.lstm = nnx.Bidirectional(
            nnx.RNN(nnx.LSTMCell(width, width, rngs=rngs)),
            nnx.RNN(nnx.LSTMCell(width, width, rngs=rngs)),
        )
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.attention = Attention(2 * width, width, rngs=rngs)
        self.out = nnx.Linear(2 * width, 1, rngs=rngs)

    def __call__(self, words: Array, lengths: Array, train: bool = False) -> Array:
        real = jnp.arange(words.shape[1]) < lengths[:, None]
        if train:
            kept = jax.random.bernoulli(self.rngs.words(), 1 - self.word_dropout, words.shape)
            words = jnp.where(kept, words, 0)
        x = self.lstm(self.embed(words), seq_lengths=lengths)
        x = self.dropout(x, deterministic=not train)
        return self.out(self.attention(x, real))[:, 0]
