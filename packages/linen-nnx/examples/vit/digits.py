"""The data and the optimizer: what does not change when the framework does."""

import json
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

BATCH = 32
CLASSES = 10
_TEST = 297  # images held out, of 1797

Arrays = tuple[jax.Array, jax.Array]


def _load() -> tuple[np.ndarray, np.ndarray]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images = images[order].reshape(-1, 8, 8, 1).astype(np.float32) / 16
    return images, labels[order].astype(np.int32)


_IMAGES, _LABELS = _load()


def batch(step: int) -> Arrays:
    """The batch of a step, a function of the step alone: (32, 8, 8, 1) float32, (32,) int32."""
    chosen = np.random.default_rng(step).integers(_TEST, len(_IMAGES), BATCH)
    return jnp.asarray(_IMAGES[chosen]), jnp.asarray(_LABELS[chosen])


def test_set() -> Arrays:
    """The images and labels that no batch holds."""
    return jnp.asarray(_IMAGES[:_TEST]), jnp.asarray(_LABELS[:_TEST])


def optimizer() -> optax.GradientTransformation:
    """AdamW that warms up and decays over 500 steps, whenever a run is stopped."""
    return optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 1e-3, 50, 500), weight_decay=1e-2)


def write_losses(path: Path, first: int, losses: Sequence[jax.Array]) -> None:
    """A file `{step: loss}`, each loss with all its bits."""
    rows = {first + k: float(loss).hex() for k, loss in enumerate(losses)}
    path.write_text(json.dumps(rows))
