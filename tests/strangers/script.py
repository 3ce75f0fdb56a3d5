"""A training script in the usual style of Linen: a TrainState, and a step that is jitted."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

from strangers.net.linen import Net

MODEL = Net(hidden=8, rate=0.3)
SEED = 3


class State(TrainState):
    batch_stats: Any
    key: Any


def start(tx: optax.GradientTransformation, features: int) -> State:
    variables = MODEL.init(jax.random.key(SEED), jnp.ones((2, features)), train=False)
    return State.create(apply_fn=MODEL.apply, tx=tx, key=jax.random.key(SEED), **variables)


@jax.jit
def step(state: State, batch: Any) -> tuple[State, jax.Array]:
    rngs = {"dropout": jax.random.fold_in(state.key, state.step)}

    def loss_fn(params: Any) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        out, updates = state.apply_fn(
            variables, batch["inputs"], train=True, rngs=rngs, mutable=["batch_stats"]
        )
        return jnp.square(out - batch["targets"]).mean(), updates["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=stats), loss


def train(state: State, batches: Iterable[Any]) -> tuple[State, list[float]]:
    losses = []
    for batch in batches:
        state, loss = step(state, batch)
        losses.append(float(loss))
    return state, losses


def save(path: Path, state: State) -> None:
    with ocp.CheckpointManager(path) as manager:
        manager.save(int(state.step), args=ocp.args.StandardSave(state))
