"""Both models and an example of their input, for `linen-nnx suggest`."""

import jax.numpy as jnp
from linen_bert import SMALL, BertForPreTraining
from nnx_bert import Bert

from linen_nnx import Twin

_TOKENS = jnp.array([[2, 71, 828, 18, 3, 0], [2, 845, 90, 452, 35, 3]])

twin = Twin(
    linen=lambda: BertForPreTraining(SMALL),
    nnx=lambda rngs: Bert(SMALL, rngs=rngs),
    inputs=lambda: (_TOKENS, jnp.array([[0] * 6, [0, 0, 0, 1, 1, 1]]), _TOKENS != 0),
)
