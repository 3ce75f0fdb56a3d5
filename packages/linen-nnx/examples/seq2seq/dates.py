"""The task and the optimizer: `3 March 1987` is to become `1987-03-03`, letter by letter."""

import datetime
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

BATCH = 128
START = "\n"
ALPHABET = START + " -0123456789" + "ADFJMNOSabceghilmnoprstuvy"
_SOURCE, _TARGET = 17, 10  # letters: `30 September 1987`, `1987-09-30`
_DAYS = 40_000

Batch = tuple[jax.Array, jax.Array, jax.Array]


def _numbers(texts: Sequence[str], length: int) -> jax.Array:
    padded = [text.ljust(length) for text in texts]
    return jnp.array([[ALPHABET.index(letter) for letter in text] for text in padded], jnp.int32)


def batch(step: int, size: int = BATCH) -> Batch:
    """The batch of a step, a function of the step alone; the test set is that of step -1.

    Sources (B, 17), their lengths (B,), targets (B, 10), all int32.
    """
    days = np.random.default_rng(step + 1).integers(0, _DAYS, size)
    dates = [datetime.date(1920, 1, 1) + datetime.timedelta(int(day)) for day in days]
    sources = [f"{date.day} {date:%B} {date.year}" for date in dates]
    lengths = jnp.array([len(text) for text in sources], jnp.int32)
    targets = [date.isoformat() for date in dates]
    return _numbers(sources, _SOURCE), lengths, _numbers(targets, _TARGET)


def shifted(target: jax.Array) -> jax.Array:
    """What the decoder sees: the target one step late, after the start sign."""
    return jnp.concatenate([jnp.zeros_like(target[:, :1]), target[:, :-1]], axis=1)


def exact_matches(predict: Callable[..., jax.Array]) -> float:
    """The share of 512 dates that greedy decoding gets right in every letter."""
    source, lengths, target = batch(-1, 512)
    written = jnp.zeros_like(target)
    for k in range(_TARGET):
        scores = predict(source, lengths, shifted(written))
        written = written.at[:, k].set(scores[:, k].argmax(-1))
    return float((written == target).all(axis=1).mean())


def optimizer() -> optax.GradientTransformation:
    """Adam with element-wise clipping and a constant rate."""
    return optax.chain(optax.clip(1.0), optax.adam(1e-2))


def write_losses(path: Path, first: int, losses: Sequence[jax.Array]) -> None:
    """A file `{step: loss}`, each loss with all its bits."""
    rows = {first + k: float(loss).hex() for k, loss in enumerate(losses)}
    path.write_text(json.dumps(rows))
