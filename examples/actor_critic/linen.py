"""Torso, actor and critic in Flax Linen. Its twin: `nnx.py` beside it."""

import flax.linen as nn
from jax import Array

ACTIONS = 5


class Torso(nn.Module):
    """Places (B, 4) -> features (B, width)."""

    width: int = 32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.tanh(nn.LayerNorm()(nn.Dense(self.width)(x)))
        return nn.relu(nn.Dense(self.width)(x))


class Actor(nn.Module):
    """Features (B, width) -> logits of actions (B, actions)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(nn.Dense(x.shape[-1])(x))
        return nn.Dense(ACTIONS, kernel_init=nn.initializers.zeros)(x)


class Critic(nn.Module):
    """Features (B, width) -> values of actions (B, actions)."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        value = nn.Dense(1, name="value")(x)
        advantage = nn.Dense(ACTIONS, name="advantage")(x)
        return value + advantage - advantage.mean(axis=-1, keepdims=True)
