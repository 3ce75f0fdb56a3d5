"""A small U-Net in Flax Linen that tells the noise in an image. Its twin: `nnx.py` beside it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array


def sinusoids(time: Array, width: int) -> Array:
    """Times (B,) -> (B, width): sines and cosines of rising frequencies."""
    angles = time[:, None] * 1000 * jnp.exp(-jnp.linspace(0, 7, width // 2))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Block(nn.Module):
    """A residual block: x (B, H, W, C), time (B, T) -> (B, H, W, width)."""

    width: int
    dropout: float

    @nn.compact
    def __call__(self, x: Array, time: Array, train: bool) -> Array:
        h = nn.Conv(self.width, (3, 3))(nn.silu(nn.GroupNorm(4)(x)))
        h = h + nn.Dense(self.width)(time)[:, None, None, :]
        h = nn.silu(nn.GroupNorm(4)(h))
        h = nn.Dropout(self.dropout)(h, deterministic=not train)
        h = nn.Conv(self.width, (3, 3))(h)
        if x.shape[-1] != self.width:
            x = nn.Conv(self.width, (1, 1), name="skip")(x)
        return x + h


class UNet(nn.Module):
    """Noisy images (B, 8, 8, 1), times (B,) from 0 to 1 -> their noise, (B, 8, 8, 1)."""

    width: int = 16
    dropout: float = 0.1

    @nn.compact
    def __call__(self, x: Array, time: Array, train: bool = False) -> Array:
        time = nn.silu(nn.Dense(2 * self.width)(sinusoids(time, self.width)))
        fine = nn.Conv(self.width, (3, 3))(x)
        x = nn.avg_pool(fine, (2, 2), strides=(2, 2))
        x = Block(2 * self.width, self.dropout)(x, time, train)
        x = jax.image.resize(x, (*fine.shape[:3], x.shape[-1]), "nearest")
        x = Block(self.width, self.dropout)(jnp.concatenate([x, fine], axis=-1), time, train)
        return nn.Conv(1, (3, 3))(nn.silu(x))
