"""The training step and the evaluation step: short, and yours to change or to replace.

The state is a plain dict of arrays: `step` (int32, batches consumed), `params`, one entry for each
collection, `opt_state`, and `ema` if an average is kept. A step of your own may keep more in it (a
target network, a second optimizer): the runtime saves, shards and moves whatever it finds.

The k-th batch (k from 1) is drawn when `step` is k - 1; its loss is taken before update k;
afterwards `step` is k. With accumulation an update happens every `accumulate` batches.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from training import losses, optimizer
from training.assemble import Setup

State = dict[str, Any]


class Step:
    """What a run computes: the runtime compiles `train` and `evaluate`."""

    def __init__(self, setup: Setup) -> None:
        cfg = setup.cfg
        self.setup, self.cfg = setup, cfg.optimizer
        self.rate = optimizer.shown_rate(cfg.optimizer, cfg.steps)
        self.optimizer = optimizer.create(cfg.optimizer, cfg.steps, setup.view, setup.own_optimizer)

    def start(self, variables: State) -> State:
        """The state before the first batch, of initial variables `{"params": ..., ...}`."""
        params = variables["params"]
        state = {"step": jnp.zeros((), jnp.int32), **variables}
        state["opt_state"] = self.optimizer.init(params)
        if self.cfg.ema is not None:
            # A copy: the step donates the state, and one buffer cannot be given away twice.
            state["ema"] = jax.tree.map(jnp.copy, params)
        return state

    def train(self, state: State, batch: Any) -> tuple[State, dict[str, Array]]:
        """One update: the next state, and metrics as float32 scalars."""
        params, setup = state["params"], self.setup
        rngs = setup.keys(state["step"])

        def loss_fn(params: State) -> tuple[Array, tuple[State, dict[str, Array]]]:
            model = setup.model({**setup.collections(state), "params": params}, rngs, train=True)
            added = losses.sums(setup.metrics(model, batch, rngs))
            means = {name: total / weight for name, (total, weight) in added.items()}
            return means["loss"], (model.collections, means)

        grads, (collections, metrics) = jax.grad(loss_fn, has_aux=True)(setup.layout.gather(params))
        # Without the barrier XLA fuses the end of the backward pass into the update, whose rounding
        # would then depend on how a stage stores the leaves: stacked, or cut out of a stack.
        grads = jax.lax.optimization_barrier(setup.layout.scatter(grads))
        updates, opt_state = self.optimizer.update(
            grads, state["opt_state"], params, value=metrics["loss"]
        )
        params = optax.apply_updates(params, updates)
        new = {**state, **collections, "step": state["step"] + 1}
        new |= {"params": params, "opt_state": opt_state}
        if self.cfg.ema is not None:
            moved = optax.incremental_update(params, state["ema"], 1 - self.cfg.ema)
            # Between two updates the parameters stand still, and the average would move towards
            # them all the same.
            due = new["step"] % self.cfg.accumulate == 0
            new["ema"] = jax.tree.map(lambda a, b: jnp.where(due, a, b), moved, state["ema"])
        metrics |= {f"grad_norm_{part}": setup.view.norm(grads, [part]) for part in setup.parts}
        metrics["lr"] = jnp.asarray(self.rate(state["step"] // self.cfg.accumulate), jnp.float32)
        return new, metrics

    def evaluate(self, state: State, batch: Any, rows: Array, index: Array) -> losses.Sums:
        """The sums of batch `index` of the validation set, with the parameters of `evaluated`."""
        rngs = self.setup.keys(index)
        variables = {**self.setup.collections(state), "params": self.evaluated(state)}
        model = self.setup.model(variables, rngs, train=False)
        return losses.sums(self.setup.metrics(model, batch, rngs), rows)

    def evaluated(self, state: State) -> Any:
        """The parameters that evaluation uses: the average, if one is kept."""
        return state.get("ema") or optimizer.evaluated(state["opt_state"], state["params"])
