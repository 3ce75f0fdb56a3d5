"""Goes on with `nnx.Optimizer` and Orbax from the converted checkpoint.

python examples/vit/train_nnx.py --steps 500
"""

import argparse
from pathlib import Path

import jax
import optax
import orbax.checkpoint as ocp
from digits import batch, optimizer, test_set, write_losses
from flax import nnx
from nnx_vit import ViT


@nnx.jit
def train_step(
    model: ViT, optimizer: nnx.Optimizer[ViT], images: jax.Array, labels: jax.Array
) -> jax.Array:
    def loss_of(model: ViT) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    loss, grads = nnx.value_and_grad(loss_of)(model)
    optimizer.update(model, jax.lax.optimization_barrier(grads))  # as in train_linen.py
    return loss


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=500, help="train until this step")
    parser.add_argument("--dir", type=Path, default="runs/vit/nnx", help="the checkpoints")
    parser.add_argument("--loop", action="store_true", help="run the blocks in a loop")
    args = parser.parse_args()
    model = ViT(loop=args.loop, rngs=nnx.Rngs(1))
    state = nnx.Optimizer(model, optimizer(), wrt=nnx.Param)
    with ocp.CheckpointManager(args.dir.absolute()) as manager:
        like = {"model": nnx.state(model), "optimizer": nnx.state(state)}
        saved = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(like))
        nnx.update(model, saved["model"])
        nnx.update(state, saved["optimizer"])
        first = int(state.step[...])
        if first >= args.steps:
            parser.error(f"{args.dir} is at step {first} already: choose more --steps")
        losses = [train_step(model, state, *batch(step)) for step in range(first, args.steps)]
        tree = {"model": nnx.state(model), "optimizer": nnx.state(state)}
        manager.save(args.steps, args=ocp.args.StandardSave(tree))
    write_losses(args.dir.with_suffix(".json"), first, losses)
    images, labels = test_set()
    accuracy = (model(images).argmax(-1) == labels).mean()
    print(f"nnx, steps {first} to {args.steps}: last loss {losses[-1]:.4f}, ", end="")
    print(f"{100 * accuracy:.1f} % of the test images right")


if __name__ == "__main__":
    main()
