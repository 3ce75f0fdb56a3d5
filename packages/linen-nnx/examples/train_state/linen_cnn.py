"""A small convolutional network in Flax Linen: BatchNorm, dropout."""

import flax.linen as nn
import jax


class CNN(nn.Module):
    """Images (batch, 8, 8, 1) float32 -> logits (batch, classes) float32."""

    classes: int = 10
    width: int = 8

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for width in (self.width, 2 * self.width):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
            x = nn.max_pool(nn.relu(x), (2, 2), strides=(2, 2))
        x = x.reshape(len(x), -1)
        x = nn.Dropout(0.3)(x, deterministic=not train)
        return nn.Dense(self.classes)(x)
