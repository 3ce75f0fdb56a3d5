"""The script of `train_linen.py` at any stage of the migration.

python examples/train_state/train_ladder.py nnx_in_linen
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from sklearn.datasets import load_digits
from twin import twin

from linen_nnx import Ladder

STEPS, BATCH = 100, 32


class TrainState(train_state.TrainState):
    """With the running statistics of BatchNorm."""

    batch_stats: Any


@jax.jit
def train_step(
    state: TrainState, images: jax.Array, labels: jax.Array, key: jax.Array
) -> tuple[TrainState, jax.Array]:
    """One update: images (batch, 8, 8, 1), labels (batch,); the new state, and the loss."""

    def loss_fn(params: Any) -> tuple[jax.Array, Any]:
        logits, updates = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            rngs={"dropout": jax.random.fold_in(key, state.step)},
            mutable=["batch_stats"],
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, updates["batch_stats"]

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats), loss


@jax.jit
def accuracy(state: TrainState, images: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of images that are told right."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return (state.apply_fn(variables, images).argmax(-1) == labels).mean()


def main() -> None:
    """Trains, and prints a loss every ten steps."""
    pixels, targets = map(np.asarray, load_digits(return_X_y=True))
    images = (pixels / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0)

    model = Ladder(twin, "examples/train_state/rules.yaml").at(sys.argv[1])
    variables = model.init(jax.random.key(0), jnp.ones((1, 8, 8, 1)))
    state = TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=optax.adamw(1e-2),
    )
    for step in range(STEPS):
        chosen = order.integers(300, len(images), BATCH)
        state, loss = train_step(state, images[chosen], targets[chosen], jax.random.key(1))
        if step % 10 == 9:
            print(f"step {step + 1}: loss {float(loss)!r}")
    print(f"accuracy {float(accuracy(state, images[:300], targets[:300])):.3f}")


if __name__ == "__main__":
    main()
