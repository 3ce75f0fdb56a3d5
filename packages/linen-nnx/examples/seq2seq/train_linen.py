"""Trains the Linen model with `TrainState` and Orbax, and resumes: a stranger's own script.

python examples/seq2seq/train_linen.py --steps 500
"""

import argparse
from pathlib import Path

import jax
import optax
import orbax.checkpoint as ocp
from dates import ALPHABET, batch, exact_matches, optimizer, shifted, write_losses
from flax.training.train_state import TrainState
from linen_seq2seq import Seq2Seq


@jax.jit
def train_step(
    state: TrainState, source: jax.Array, lengths: jax.Array, late: jax.Array, target: jax.Array
) -> tuple[TrainState, jax.Array]:
    def loss_of(params: optax.Params) -> jax.Array:
        logits = state.apply_fn({"params": params}, source, lengths, late)
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500, help="train until this step")
    parser.add_argument("--dir", type=Path, default="runs/seq2seq/linen", help="the checkpoints")
    args = parser.parse_args()
    model = Seq2Seq(len(ALPHABET))
    variables = model.init(jax.random.key(0), *batch(0))
    state = TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optimizer())
    with ocp.CheckpointManager(args.dir.absolute()) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        first, losses = int(state.step), []
        if first >= args.steps:
            parser.error(f"{args.dir} is at step {first} already: choose more --steps")
        for step in range(first, args.steps):
            source, lengths, target = batch(step)
            state, loss = train_step(state, source, lengths, shifted(target), target)
            losses.append(loss)
        manager.save(args.steps, args=ocp.args.StandardSave(state))
    write_losses(args.dir.with_suffix(".json"), first, losses)
    predict = jax.jit(lambda *inputs: model.apply({"params": state.params}, *inputs))
    print(f"Linen, steps {first} to {args.steps}: last loss {losses[-1]:.4f}, ", end="")
    print(f"{100 * exact_matches(predict):.1f} % of the test dates right")


if __name__ == "__main__":
    main()
