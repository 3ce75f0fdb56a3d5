"""Both models and an example of their input: for `linen-nnx`. Only `verify` uses the optimizer."""

import jax
from digits import optimizer
from linen_vit import ViT as LinenViT
from nnx_vit import ViT as NnxViT

from linen_nnx import Twin

twin = Twin(
    linen=LinenViT,
    nnx=lambda rngs: NnxViT(rngs=rngs),
    inputs=lambda: (jax.random.uniform(jax.random.key(0), (2, 8, 8, 1)),),
    optimizer=optimizer(),
)
