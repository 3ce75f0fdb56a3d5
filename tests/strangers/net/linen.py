"""A small Linen model in the usual style, which knows nothing of this project."""

import flax.linen as nn
from jax import Array


class Net(nn.Module):
    """Dense, BatchNorm, relu, Dropout, Dense: (B, features) float32 -> (B, 1)."""

    hidden: int
    rate: float

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        x = nn.Dense(self.hidden)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(1)(x)
