"""The same network in nnx, under names of its own; `model.train()` and `model.eval()` switch it."""

import jax
from flax import nnx


class Stage(nnx.Module):
    """Convolution, norm, relu, pooling: (batch, height, width, inner) -> half as high and wide."""

    def __init__(self, inner: int, outer: int, *, rngs: nnx.Rngs) -> None:
        self.conv = nnx.Conv(inner, outer, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(outer, momentum=0.9, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.conv(x)))
        return nnx.max_pool(x, (2, 2), strides=(2, 2))


class CNN(nnx.Module):
    """Images (batch, 8, 8, 1) float32 -> logits (batch, classes) float32."""

    def __init__(self, classes: int = 10, width: int = 8, *, rngs: nnx.Rngs) -> None:
        self.stages = nnx.List([Stage(1, width, rngs=rngs), Stage(width, 2 * width, rngs=rngs)])
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.classifier = nnx.Linear(2 * 2 * 2 * width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for stage in self.stages:
            x = stage(x)
        return self.classifier(self.dropout(x.reshape(len(x), -1)))
