"""A bidirectional LSTM with attention in Flax Linen. Its twin: `nnx.py` beside it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


class Classifier(nn.Module):
    """Words (B, L) int32, lengths (B,) int32 -> logits (B,)."""

    vocab: int = 40
    width: int = 16
    dropout: float = 0.1
    word_dropout: float = 0.1

    @nn.compact
    def __call__(self, words: Array, lengths: Array, train: bool = False) -> Array:
        real = jnp.arange(words.shape[1]) < lengths[:, None]
        if train:
            kept = jax.random.bernoulli(self.make_rng("words"), 1 - self.word_dropout, words.shape)
            words = jnp.where(kept, words, 0)
        x = nn.Embed(self.vocab, self.width)(words)
        lstm = nn.Bidirectional(nn.RNN(nn.LSTMCell(self.width)), nn.RNN(nn.LSTMCell(self.width)))
        x = nn.Dropout(self.dropout)(lstm(x, seq_lengths=lengths), deterministic=not train)
        scores = nn.Dense(1)(nn.tanh(nn.Dense(self.width)(x)))[..., 0]
        weights = nn.softmax(jnp.where(real, scores, -1e9))
        return nn.Dense(1)(jnp.einsum("bl,blf->bf", weights, x))[:, 0]
