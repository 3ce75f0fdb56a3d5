"""A small U-Net in nnx that tells the noise in an image. Its twin: `linen.py` beside it."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


def sinusoids(time: Array, width: int) -> Array:
    """Times (B,) -> (B, width): sines and cosines of rising frequencies."""
    angles = time[:, None] * 1000 * jnp.exp(-jnp.linspace(0, 7, width // 2))
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


class Block(nnx.Module):
    """A residual block: x (B, H, W, inner), time (B, T) -> (B, H, W, outer)."""

    def __init__(
        self, inner: int, outer: int, time: int, dropout: float, *, rngs: nnx.Rngs
    ) -> None:
        self.norm1 = nnx.GroupNorm(inner, num_groups=4, rngs=rngs)
        self.conv1 = nnx.Conv(inner, outer, (3, 3), rngs=rngs)
        self.time = nnx.Linear(time, outer, rngs=rngs)
        self.norm2 = nnx.GroupNorm(outer, num_groups=4, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.conv2 = nnx.Conv(outer, outer, (3, 3), rngs=rngs)
        self.skip = None if inner == outer else nnx.Conv(inner, outer, (1, 1), rngs=rngs)

    def __call__(self, x: Array, time: Array, train: bool) -> Array:
        h = self.conv1(nnx.silu(self.norm1(x)))
        h = h + self.time(time)[:, None, None, :]
        h = nnx.silu(self.norm2(h))
        h = self.conv2(self.dropout(h, deterministic=not train))
        return (x if self.skip is None else self.skip(x)) + h


class UNet(nnx.Module):
    """Noisy images (B, 8, 8, 1), times (B,) from 0 to 1 -> their noise, (B, 8, 8, 1)."""

    def __init__(self, width: int = 16, dropout: float = 0.1, *, rngs: nnx.Rngs) -> None:
        self.width = width
        self.time = nnx.Linear(width, 2 * width, rngs=rngs)
        self.first = nnx.Conv(1, width, (3, 3), rngs=rngs)
        self.down = Block(width, 2 * width, 2 * width, dropout, rngs=rngs)
        self.up = Block(3 * width, width, 2 * width, dropout, rngs=rngs)
        self.last = nnx.Conv(width, 1, (3, 3), rngs=rngs)

    def __call__(self, x: Array, time: Array, train: bool = False) -> Array:
        time = nnx.silu(self.time(sinusoids(time, self.width)))
        fine = self.first(x)
        x = self.down(nnx.avg_pool(fine, (2, 2), strides=(2, 2)), time, train)
        x = jax.image.resize(x, (*fine.shape[:3], x.shape[-1]), "nearest")
        x = self.up(jnp.concatenate([x, fine], axis=-1), time, train)
        return self.last(nnx.silu(x))
