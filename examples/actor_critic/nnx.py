"""Torso, actor and critic in nnx. Its twin: `linen.py` beside it."""

from flax import nnx
from jax import Array

ACTIONS = 5


class Torso(nnx.Module):
    """Places (B, 4) -> features (B, width)."""

    def __init__(self, width: int = 32, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.second = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return nnx.relu(self.second(nnx.tanh(self.norm(self.first(x)))))


class Actor(nnx.Module):
    """Features (B, width) -> logits of actions (B, actions)."""

    def __init__(self, width: int = 32, *, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(width, width, rngs=rngs)
        self.logits = nnx.Linear(width, ACTIONS, kernel_init=nnx.initializers.zeros, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.logits(nnx.relu(self.hidden(x)))


class Critic(nnx.Module):
    """Features (B, width) -> values of actions (B, actions)."""

    def __init__(self, width: int = 32, *, rngs: nnx.Rngs) -> None:
        self.value = nnx.Linear(width, 1, rngs=rngs)
        self.advantage = nnx.Linear(width, ACTIONS, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        advantage = self.advantage(x)
        return self.value(x) + advantage - advantage.mean(axis=-1, keepdims=True)
