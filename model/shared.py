"""Functions that both twins of a model call, so that they compute the same bits.

Linen and nnx differ by default in their attention function and in the precision of their norms.
Giving both frameworks the functions below removes each difference at its source.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array

Shared = dict[str, Array]  # what the encoder lends to the head, by name


def causal_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = None,
    bias: Array | None = None,
    dropout_rate: float = 0.0,
    **_: Any,
) -> Array:
    """Causal softmax attention for Linen's and nnx's attention layers (their `attention_fn`).

    By default Linen computes its own softmax and nnx calls `jax.nn.dot_product_attention`; the two
    are 1e-5 apart. One function given to both makes them equal in every bit.

    Args:
        query, key, value: (batch, length, heads, head width), float.
        mask, bias: must be None; the causal mask is built in.
        dropout_rate: must be 0; dropout acts on the layer's output.
        _: what the frameworks pass besides (dtype, precision, deterministic, ...), which has no
            bearing here: the inputs already have the compute dtype.

    Returns:
        (batch, length, heads, head width), the dtype of `query`.

    Raises:
        ValueError: for a mask, a bias or a dropout rate, rather than ignoring them.
    """
    if mask is not None or bias is not None or dropout_rate:
        raise ValueError(
            "causal_attention builds its own causal mask and has neither bias nor dropout; got "
            f"mask={mask is not None}, bias={bias is not None}, dropout_rate={dropout_rate}."
        )
    # One call for both frameworks, and no mask as an array, which would have length x length
    # entries.
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def linen_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    mask: Array | None = None,
    is_causal: bool = False,
    **more: Any,
) -> Array:
    """What Linen's attention layers compute by default, as the `attention_fn` of an nnx port.

    So a Linen model that was written before its port stays as it is.

    Args:
        query, key, value: (batch, length, heads, head width), float.
        mask: (batch or 1, heads or 1, length of query, length of key), where to look; None: all.
        is_causal: look at earlier places only, as well.
        more: what `flax.linen.dot_product_attention` takes besides: dropout, dtype, precision.

    Returns:
        (batch, length, heads, head width), the dtype of `value`.
    """
    # nnx has an argument for what Linen expresses by the mask alone.
    if is_causal:
        earlier = jnp.tril(jnp.ones((query.shape[-3], key.shape[-3]), bool))
        mask = earlier[None, None] if mask is None else jnp.logical_and(mask, earlier)
    return nn.dot_product_attention(query, key, value, mask=mask, **more)


def keep_dtype(arrays: Any, *_: Any, **__: Any) -> Any:
    """The `promote_dtype` of every nnx norm here: none.

    nnx norms cast their input to the compute dtype before they normalise, Linen's after. Without
    the early cast the two are equal in bfloat16 as well; in float32 it makes no difference.
    """
    return arrays


def tied_logits(features: Array, table: Array, bias: Array) -> Array:
    """Scores of each row of an embedding table, in float32: `features @ table.T + bias`.

    Args:
        features: (..., width), the compute dtype, in which the product is taken.
        table: (vocabulary, width), float32; the encoder's own embedding.
        bias: (vocabulary,), float32.
    """
    # The table is cast, and not the features: the product is the largest of the model, and shall be
    # taken in the compute dtype.
    scores = jnp.dot(features, table.astype(features.dtype).T)
    return scores.astype(jnp.float32) + bias.reshape((1,) * (scores.ndim - 1) + (-1,))
