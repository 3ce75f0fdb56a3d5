"""The training step of the actor and the critic, in place of `training/step.py`'s.

The state holds, beside `step` and `params`:

    opt_state/critic    Adam over torso and critic, which learn the values of actions
    opt_state/actor     Adam over the actor alone, which learns to choose what has most value
    target              torso and critic as they were on average, of which the critic learns

`target` and both optimizers hold a part of the parameters each. The runtime saves them, and moves
them between stages, as it finds them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from configs.build import refuse, show
from training import losses, optimizer
from training.assemble import Setup

State = dict[str, Any]
VALUED = ("torso", "critic")
UNUSED = {"chain": None, "weight_decay": 0, "clip_norm": None, "accumulate": 1, "ema": None}


class Step:
    """What a run computes. The runtime compiles `train` and `evaluate`."""

    def __init__(self, setup: Setup) -> None:
        cfg, self.options = setup.cfg, setup.family.options
        self.setup = setup
        problems = {}
        for key, value in UNUSED.items():
            if getattr(cfg.optimizer, key) != value:
                problems[f"optimizer.{key}"] = f"this step has no use for it: set {show(value)}"
        refuse(problems)
        self.rate = optimizer.schedule(cfg.optimizer, cfg.steps)
        self.critic = optax.adam(self.rate)
        factor = self.options.actor_lr_factor
        self.actor = optax.chain(optax.adam(self.rate), optax.scale(factor))

    def start(self, variables: State) -> State:
        """The state before the first batch, of initial variables `{"params": ...}`."""
        params = variables["params"]
        valued = {part: params[part] for part in VALUED}
        return {
            "step": jnp.zeros((), jnp.int32),
            "params": params,
            "opt_state": {
                "critic": self.critic.init(valued),
                "actor": self.actor.init({"actor": params["actor"]}),
            },
            "target": jax.tree.map(jnp.copy, valued),
        }

    def train(self, state: State, batch: Any) -> tuple[State, dict[str, Array]]:
        """One update of each: the next state, and metrics as float32 scalars."""
        params, options = state["params"], self.options
        valued = {part: params[part] for part in VALUED}
        acting = {"actor": params["actor"]}

        # What an action is worth: its reward, and what the target network sees after it.
        logits, _ = self._run(params, batch["next"])
        _, values = self._run({**params, **state["target"]}, batch["next"])
        after = (jax.nn.softmax(logits) * values).sum(axis=-1)
        worth = batch["reward"] + options.discount * after

        def critic_loss(valued: State) -> Array:
            _, values = self._run({**params, **valued}, batch["place"])
            chosen = jnp.take_along_axis(values, batch["action"][:, None], axis=-1)[:, 0]
            return jnp.square(chosen - worth).mean()

        def actor_loss(acting: State) -> Array:
            logits, values = self._run({**params, **acting}, batch["place"])
            chances, logs = jax.nn.softmax(logits), jax.nn.log_softmax(logits)
            return (chances * (options.entropy * logs - values)).sum(axis=-1).mean()

        of_critic, critic_grads = jax.value_and_grad(critic_loss)(valued)
        of_actor, actor_grads = jax.value_and_grad(actor_loss)(acting)
        # As in training/step.py: where a layer is stored has no effect on how an update rounds.
        critic_grads, actor_grads = jax.lax.optimization_barrier((critic_grads, actor_grads))
        old = state["opt_state"]
        valued, critic_state = _updated(self.critic, valued, critic_grads, old["critic"])
        acting, actor_state = _updated(self.actor, acting, actor_grads, old["actor"])
        new = {
            "step": state["step"] + 1,
            "params": {**valued, **acting},
            "opt_state": {"critic": critic_state, "actor": actor_state},
            "target": optax.incremental_update(valued, state["target"], options.target_rate),
        }
        metrics = {"loss": of_critic, "actor_loss": of_actor}
        metrics["grad_norm_critic"] = self.setup.view.norm(critic_grads, ["critic"])
        metrics["grad_norm_actor"] = self.setup.view.norm(actor_grads, ["actor"])
        metrics["lr"] = jnp.asarray(self.rate(state["step"]), jnp.float32)
        return new, metrics

    def evaluate(self, state: State, batch: Any, rows: Array, index: Array) -> losses.Sums:
        """The sums of batch `index` of the validation set."""
        rngs = self.setup.keys(index)
        model = self.setup.model({"params": state["params"]}, rngs, train=False)
        return losses.sums(self.setup.metrics(model, batch, rngs), rows)

    def evaluated(self, state: State) -> Any:
        """The parameters that samples use."""
        return state["params"]

    def _run(self, params: State, places: Array) -> tuple[Array, Array]:
        """Logits and values of all actions at some places."""
        return self.setup.model({"params": params}, {}, train=True)(places)


def _updated(
    optimizer: optax.GradientTransformation, params: State, grads: Any, opt_state: Any
) -> tuple[State, Any]:
    """Parameters and the optimizer's state after an update."""
    updates, opt_state = optimizer.update(grads, opt_state, params)
    new: Any = optax.apply_updates(params, updates)
    return new, opt_state
