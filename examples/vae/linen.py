"""A variational autoencoder in Flax Linen. Its twin: `nnx.py` beside it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


class VAE(nn.Module):
    """Images (B, 8, 8, 1) -> logits of their pixels (B, 64); mean and log variance (B, latent)."""

    hidden: int = 64
    latent: int = 8
    dropout: float = 0.1

    def setup(self) -> None:
        self.encoder = nn.Dense(self.hidden)
        self.mean = nn.Dense(self.latent)
        self.log_variance = nn.Dense(self.latent)
        self.decoder = nn.Dense(self.hidden)
        self.pixels = nn.Dense(64)
        self.drop = nn.Dropout(self.dropout)

    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array, Array]:
        h = nn.relu(self.encoder(x.reshape(len(x), -1)))
        h = self.drop(h, deterministic=not train)
        mean, log_variance = self.mean(h), self.log_variance(h)
        noise = jax.random.normal(self.make_rng("noise"), mean.shape)
        z = mean + jnp.exp(log_variance / 2) * noise
        return self.decode(z), mean, log_variance

    def decode(self, z: Array) -> Array:
        """Latent vectors (B, latent) -> logits of pixels (B, 64)."""
        return self.pixels(nn.relu(self.decoder(z)))
