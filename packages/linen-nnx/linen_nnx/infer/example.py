"""The twin that the pages of this package draw: two layers, ten numbers, written in two ways.

    Linen                                  nnx
    up/kernel    (2, 2)                    first/kernel  (2, 2)
    up/bias      (2,)                      first/bias    (2,)
    down/kernel  (2, 2)  inputs, outputs   last          (2, 2)  outputs, inputs: transposed

Names, order and layout differ. Both compute `tanh(x @ up + bias) @ down`, and the rule book that
`suggest` finds for them has two rules:

    >>> from linen_nnx.infer.suggest import suggest
    >>> for rule in suggest(two_layers()).rules:
    ...     print(rule)
    `params/up/{leaf}` <-> `first/{leaf}`
    `params/down/kernel` <-> `last`
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from linen_nnx.infer.twin import Twin


class _Linen(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        hidden = nn.tanh(nn.Dense(2, name="up")(x))
        return nn.Dense(2, use_bias=False, name="down")(hidden)


class _Nnx(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(2, 2, rngs=rngs)
        self.last = nnx.Param(jax.random.normal(rngs.params(), (2, 2)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.tanh(self.first(x)) @ self.last[...].T


def two_layers() -> Twin:
    """The twin of the drawings, with one example `(1, 2) float32` as its input."""
    return Twin(linen=_Linen, nnx=lambda rngs: _Nnx(rngs), inputs=lambda: (jnp.ones((1, 2)),))
