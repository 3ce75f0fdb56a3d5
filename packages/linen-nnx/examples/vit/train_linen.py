"""Trains the Linen model with `TrainState` and Orbax, and resumes: a stranger's own script.

python examples/vit/train_linen.py --steps 400
"""

import argparse
from pathlib import Path

import jax
import optax
import orbax.checkpoint as ocp
from digits import batch, optimizer, test_set, write_losses
from flax.training.train_state import TrainState
from linen_vit import ViT


@jax.jit
def train_step(
    state: TrainState, images: jax.Array, labels: jax.Array
) -> tuple[TrainState, jax.Array]:
    def loss_of(params: optax.Params) -> jax.Array:
        logits = state.apply_fn({"params": params}, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    # The one line that the migration added. Without it XLA fuses the end of the backward pass into
    # the update, whose rounding then depends on whether layers are stored stacked or in a list.
    grads = jax.lax.optimization_barrier(grads)
    return state.apply_gradients(grads=grads), loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=400, help="train until this step")
    parser.add_argument("--dir", type=Path, default="runs/vit/linen", help="checkpoints go here")
    args = parser.parse_args()
    model = ViT()
    variables = model.init(jax.random.key(0), batch(0)[0])
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optimizer())
    with ocp.CheckpointManager(args.dir.absolute()) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        first, losses = int(state.step), []
        if first >= args.steps:
            parser.error(f"{args.dir} is at step {first} already: choose more --steps")
        for step in range(first, args.steps):
            state, loss = train_step(state, *batch(step))
            losses.append(loss)
        manager.save(args.steps, args=ocp.args.StandardSave(state))
    write_losses(args.dir.with_suffix(".json"), first, losses)
    images, labels = test_set()
    logits = state.apply_fn({"params": state.params}, images)
    accuracy = (logits.argmax(-1) == labels).mean()
    print(f"Linen, steps {first} to {args.steps}: last loss {losses[-1]:.4f}, ", end="")
    print(f"{100 * accuracy:.1f} % of the test images right")


if __name__ == "__main__":
    main()
