"""Both models and an example of their input."""

import jax.numpy as jnp
from linen_cnn import CNN as LinenCNN
from nnx_cnn import CNN as NnxCNN

from linen_nnx import Twin

twin = Twin(
    linen=LinenCNN,
    nnx=lambda rngs: NnxCNN(rngs=rngs),
    inputs=lambda: (jnp.ones((2, 8, 8, 1)),),
)
