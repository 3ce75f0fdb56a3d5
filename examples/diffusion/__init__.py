"""A diffusion model of digits: time and noise are drawn in the loss, evaluation uses an average."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from linen_nnx import Part

from configs.build import Count, Decay
from model import Applied, Batch, Metrics, Rngs

STREAMS = ("dropout", "time", "noise")


@dataclass(frozen=True)
class Options:
    """Options of the denoiser; see `configs/model/diffusion.yaml` for meanings."""

    family: Literal["examples.diffusion"]
    width: Count
    dropout: Decay


def parts(cfg: Options) -> Part:
    """The denoiser, in one part."""
    from examples.diffusion import linen, nnx

    return Part(
        linen=lambda: linen.UNet(cfg.width, cfg.dropout),
        nnx=lambda rngs: nnx.UNet(cfg.width, cfg.dropout, rngs=rngs),
    )


def inputs(batch: Batch) -> tuple[Any, ...]:
    """Images and times, in the place of noisy ones."""
    images = batch["inputs"]
    return images, jnp.zeros(len(images))


def loss(model: Applied, batch: Batch, rngs: Rngs) -> Metrics:
    """Squared error of the noise that the denoiser sees in an image (B, 8, 8, 1) from 0 to 1."""
    images = 2 * batch["inputs"] - 1
    time = jax.random.uniform(rngs["time"], (len(images),))
    noise = jax.random.normal(rngs["noise"], images.shape)
    signal, spread = _shares(time[:, None, None, None])
    found = model(signal * images + spread * noise, time, train=model.train)
    return {"loss": jnp.square(found - noise).mean(axis=(1, 2, 3))}


def show(setup: Any, state: Any, board: Any) -> str:
    """Images that the model makes out of noise, for TensorBoard."""
    variables = {"params": setup.steps.evaluated(state)}
    count, steps = setup.cfg.log.samples, 30

    def denoise(image: Array, time: Array) -> tuple[Array, None]:
        """One step of DDIM: the noise is found, and put back for an earlier time."""
        found = setup.stage.apply(variables, image, jnp.full(count, time), train=False)
        signal, spread = _shares(time)
        clean = jnp.clip((image - spread * found) / signal, -1, 1)
        signal, spread = _shares(time - 1 / steps)
        return signal * clean + spread * found, None

    times = jnp.linspace(1, 1 / steps, steps) * 0.999
    noise = jax.random.normal(jax.random.key(setup.cfg.seed), (count, 8, 8, 1))
    images, _ = jax.jit(lambda noise: jax.lax.scan(denoise, noise, times))(noise)
    row = np.concatenate(setup.program.fetch(images), axis=1)
    pixels = (255 * np.clip((row + 1) / 2, 0, 1)).astype(np.uint8)
    board.image(int(state["step"]), "samples", np.repeat(pixels, 3, axis=-1))
    return ""


def _shares(time: Any) -> tuple[Array, Array]:
    """How much of an image, and of noise, there is at a time: 1 and 0 at 0, 0 and 1 at 1."""
    return jnp.cos(time * jnp.pi / 2), jnp.sin(time * jnp.pi / 2)
