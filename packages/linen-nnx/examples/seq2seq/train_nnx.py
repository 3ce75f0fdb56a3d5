"""Goes on with `nnx.Optimizer` and Orbax from the converted checkpoint.

python examples/seq2seq/train_nnx.py --steps 600
"""

import argparse
import functools
from pathlib import Path

import jax
import optax
import orbax.checkpoint as ocp
from dates import ALPHABET, batch, exact_matches, optimizer, shifted, write_losses
from flax import nnx
from nnx_seq2seq import Seq2Seq


@nnx.jit
def train_step(
    model: Seq2Seq,
    optimizer: nnx.Optimizer[Seq2Seq],
    source: jax.Array,
    lengths: jax.Array,
    late: jax.Array,
    target: jax.Array,
) -> jax.Array:
    def loss_of(model: Seq2Seq) -> jax.Array:
        logits = model(source, lengths, late)
        return optax.softmax_cross_entropy_with_integer_labels(logits, target).mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, grads)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=600, help="train until this step")
    parser.add_argument("--dir", type=Path, default="runs/seq2seq/nnx", help="the checkpoints")
    args = parser.parse_args()
    model = Seq2Seq(len(ALPHABET), rngs=nnx.Rngs(1))
    state = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    with ocp.CheckpointManager(args.dir.absolute()) as manager:
        like = {"model": nnx.state(model), "optimizer": nnx.state(state)}
        saved = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
        nnx.update(model, saved["model"])
        nnx.update(state, saved["optimizer"])
        first, losses = int(state.step[...]), []
        if first >= args.steps:
            parser.error(f"{args.dir} is at step {first} already: choose more --steps")
        for step in range(first, args.steps):
            source, lengths, target = batch(step)
            losses.append(train_step(model, state, source, lengths, shifted(target), target))
        tree = {"model": nnx.state(model), "optimizer": nnx.state(state)}
        manager.save(args.steps, args=ocp.args.StandardSave(tree))
    write_losses(args.dir.with_suffix(".json"), first, losses)
    matches = exact_matches(functools.partial(nnx.jit(Seq2Seq.__call__), model))
    print(f"nnx, steps {first} to {args.steps}: last loss {losses[-1]:.4f}, ", end="")
    print(f"{100 * matches:.1f} % of the test dates right")


if __name__ == "__main__":
    main()
