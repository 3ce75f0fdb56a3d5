"""Its port in the usual style of nnx."""

from flax import nnx
from jax import Array


class Port(nnx.Module):
    """Linear, BatchNorm, relu, Dropout, Linear: (B, features) float32 -> (B, 1)."""

    def __init__(self, features: int, hidden: int, rate: float, *, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(features, hidden, rngs=rngs)
        self.norm = nnx.BatchNorm(hidden, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.out = nnx.Linear(hidden, 1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.dropout(nnx.relu(self.norm(self.inner(x))))
        return self.out(x)
