"""A variational autoencoder in nnx. Its twin: `linen.py` beside it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


class VAE(nnx.Module):
    """Images (B, 8, 8, 1) -> logits of their pixels (B, 64); mean and log variance (B, latent)."""

    def __init__(
        self, hidden: int = 64, latent: int = 8, dropout: float = 0.1, *, rngs: nnx.Rngs
    ) -> None:
        self.rngs = rngs
        self.encode = nnx.Linear(64, hidden, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.mean = nnx.Linear(hidden, latent, rngs=rngs)
        self.log_variance = nnx.Linear(hidden, latent, rngs=rngs)
        self.decoder = nnx.Sequential(
            nnx.Linear(latent, hidden, rngs=rngs), nnx.relu, nnx.Linear(hidden, 64, rngs=rngs)
        )

    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array, Array]:
        h = nnx.relu(self.encode(x.reshape(len(x), -1)))
        h = self.dropout(h, deterministic=not train)
        mean, log_variance = self.mean(h), self.log_variance(h)
        noise = jax.random.normal(self.rngs.noise(), mean.shape)
        z = mean + jnp.exp(log_variance / 2) * noise
        return self.decode(z), mean, log_variance

    def decode(self, z: Array) -> Array:
        """Latent vectors (B, latent) -> logits of pixels (B, 64)."""
        return self.decoder(z)
