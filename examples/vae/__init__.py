"""A variational autoencoder of digits: the model itself draws the latent sample."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from linen_nnx import Part

from configs.build import Count, Decay
from model import Applied, Batch, Metrics, Rngs

STREAMS = ("noise", "dropout")


@dataclass(frozen=True)
class Options:
    """Options of the autoencoder; see `configs/model/vae.yaml` for meanings."""

    family: Literal["examples.vae"]
    hidden: Count
    latent: Count
    dropout: Decay


def parts(cfg: Options) -> Part:
    """Encoder, sampling and decoder, in one part."""
    from examples.vae import linen, nnx

    return Part(
        linen=lambda: linen.VAE(cfg.hidden, cfg.latent, cfg.dropout),
        nnx=lambda rngs: nnx.VAE(cfg.hidden, cfg.latent, cfg.dropout, rngs=rngs),
    )


def inputs(batch: Batch) -> tuple[Any, ...]:
    """Images (B, 8, 8, 1) from 0 to 1."""
    return (batch["inputs"],)


def loss(model: Applied, batch: Batch, rngs: Rngs) -> Metrics:
    """What the evidence of an image (B, 8, 8, 1) lacks at most, in nats; and its two terms."""
    images = batch["inputs"].reshape(len(batch["inputs"]), -1)
    logits, mean, log_variance = model(*inputs(batch), train=model.train)
    reconstruction = optax.sigmoid_binary_cross_entropy(logits, images).sum(axis=-1)
    divergence = jnp.exp(log_variance) + jnp.square(mean) - 1 - log_variance
    divergence = 0.5 * divergence.sum(axis=-1)
    return {
        "loss": reconstruction + divergence,
        "reconstruction": reconstruction,
        "divergence": divergence,
    }


def show(setup: Any, state: Any, board: Any) -> str:
    """Images that the decoder makes of random latent vectors, for TensorBoard."""
    count = setup.cfg.log.samples
    latents = jax.random.normal(
        jax.random.key(setup.cfg.seed), (count, setup.family.options.latent)
    )
    variables = {"params": setup.steps.evaluated(state)}
    decode = jax.jit(lambda variables, z: setup.stage.apply(variables, z, method="decode"))
    images = jax.nn.sigmoid(setup.program.fetch(decode(variables, latents)))
    row = np.concatenate(np.asarray(images).reshape(count, 8, 8, 1), axis=1)
    board.image(int(state["step"]), "samples", np.repeat((255 * row).astype(np.uint8), 3, axis=-1))
    return ""
