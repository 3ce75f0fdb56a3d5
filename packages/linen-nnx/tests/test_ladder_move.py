"""A whole training state goes from stage to stage in memory, and training goes on with its bits."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from conftest import STAGES
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict, freeze
from flax.training.train_state import TrainState
from ladder_twins import CASES
from test_ladder import bits

from linen_nnx import Ladder, Part, Refusal, RuleBook, RuleError, Twin, convert


class State(TrainState):
    batch_stats: Any
    ema: Any
    key: Any


X = CASES["mlp"].inputs()
PARTS = ("torso", "critic")


def start(model: Any, tx: Any) -> State:
    variables = model.init(jax.random.key(0), *X)
    rest = {"batch_stats": variables["batch_stats"], "key": jax.random.key(5)}
    params = variables["params"]
    return State.create(apply_fn=model.apply, params=params, tx=tx, ema=params, **rest)


@jax.jit
def step(state: State) -> tuple[State, Any]:
    rngs = {"dropout": jax.random.fold_in(state.key, state.step)}

    def loss(params: Any) -> Any:
        variables = {"params": params, "batch_stats": state.batch_stats}
        out, updates = state.apply_fn(variables, *X, train=True, rngs=rngs, mutable=["batch_stats"])
        return (out**2).mean(), updates["batch_stats"]

    (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    grads = jax.lax.optimization_barrier(grads)
    ema = optax.incremental_update(state.params, state.ema, 0.1)
    return state.apply_gradients(grads=grads, batch_stats=stats, ema=ema), value


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "masked": lambda: optax.chain(
        optax.masked(optax.trace(0.9), lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)),
        optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    ),
}


@pytest.mark.parametrize("name", ["adamw", pytest.param("masked", marks=pytest.mark.long)])
def test_training_goes_on_at_another_stage_with_the_same_bits(name: str) -> None:
    climb, tx = CASES["mlp"].ladder(), OPTIMIZERS[name]()
    state = start(climb.at("linen"), tx)
    for _ in range(2):
        state, _ = step(state)
    due, losses = state, []
    for _ in range(3):
        due, value = step(due)
        losses += bits(value)

    for stage in STAGES:
        other = climb.move(state, "linen", stage).replace(apply_fn=climb.at(stage).apply)
        assert jax.tree.structure(other.opt_state) == jax.tree.structure(
            tx.init(climb.at(stage).init(jax.random.key(0), *X)["params"])
        )
        own = []
        for _ in range(3):
            other, value = step(other)
            own += bits(value)
        assert own == losses, stage
        back = climb.move(other, stage, "linen").replace(apply_fn=due.apply_fn)
        assert jax.tree.structure(back) == jax.tree.structure(due)
        keyless = (back.replace(key=None), due.replace(key=None))
        assert bits(keyless[0]) == bits(keyless[1]), stage


def test_variables_and_bare_parameters_move_in_containers_of_any_kind() -> None:
    climb = CASES["mlp"].ladder()
    variables = climb.at("linen").init(jax.random.key(0), *X)
    due = climb.at("nnx").translate(variables)

    assert bits(climb.move(variables, "linen", "nnx")) == bits(due)
    assert bits(climb.move(variables["params"], "linen", "nnx")) == bits(due["params"])
    frozen = climb.move(freeze(variables["params"]), "linen", "nnx")
    assert isinstance(frozen, FrozenDict)
    pair = climb.move((variables, [variables["params"], 3]), "linen", "nnx")
    assert isinstance(pair, tuple) and isinstance(pair[1], list) and pair[1][1] == 3
    assert bits(pair[1][0]) == bits(due["params"])
    assert climb.move(optax.sgd(1.0).init(variables["params"]), "linen", "nnx") is not None


@pytest.mark.long
def test_stacked_layers_move_with_their_moments() -> None:
    case = CASES["scan, list"]
    climb, tx = case.ladder(), optax.adam(1e-2)
    params = climb.at("linen").init(jax.random.key(0), *case.inputs())["params"]
    _, state = tx.update(params, tx.init(params), params)

    moved = climb.move(state, "linen", "nnx")

    kernels = [moved[0].mu["layers"][k]["dense"]["kernel"] for k in "012"]
    assert (jnp.stack(kernels) == state[0].mu["layers"]["Dense_0"]["kernel"]).all()
    assert bits(climb.move(moved, "nnx", "linen")) == bits(state)


def test_a_list_for_each_parameter_keeps_its_kind() -> None:
    climb = CASES["mlp"].ladder()
    params = climb.at("linen").init(jax.random.key(0), *X)["params"]
    tx = optax.sm3(0.1)

    moved = climb.move(tx.init(params), "linen", "nnx")

    due = tx.init(climb.at("nnx").init(jax.random.key(0), *X)["params"])
    assert jax.tree.structure(moved) == jax.tree.structure(due)


def test_what_has_no_home_is_refused_by_name() -> None:
    climb = CASES["mlp"].ladder()

    with pytest.raises(RuleError, match="`stranger/weights` mirrors nothing of the model"):
        climb.move({"stranger": {"weights": np.ones(3)}}, "linen", "nnx")
    with pytest.raises(Refusal, match="there is no stage 'nix'"):
        climb.move({}, "linen", "nix")


def test_moments_of_a_rescaled_parameter_are_refused() -> None:
    rule = {"linen": "params/kernel", "nnx": "kernel", "ops": [{"op": "scale", "factor": 2.0}]}
    twin = Twin(
        lambda: nn.Dense(2, use_bias=False),
        lambda rngs: nnx.Linear(3, 2, use_bias=False, rngs=rngs),
        lambda: (jnp.ones((1, 3)),),
    )
    climb = Ladder(twin, RuleBook.from_dict({"version": 1, "rules": [rule]}))
    params = climb.at("linen").init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    state = TrainState.create(apply_fn=None, params=params, tx=optax.adam(0.1))

    with pytest.raises(RuleError, match=r"opt_state/0/mu/kernel.* follows a rule that changes"):
        climb.move(state, "linen", "nnx")


@pytest.mark.long
def test_on_disk_a_checkpoint_that_says_its_parts_goes_to_every_stage(tmp_path: Path) -> None:
    tx = optax.adamw(1e-2)
    torso = Part(nn.Dense(4), lambda rngs: nnx.Linear(3, 4, rngs=rngs))
    critic = Part(nn.Dense(1), lambda rngs: nnx.Linear(4, 1, rngs=rngs))
    rules = [{"linen": f"params/{part}/{{leaf}}", "nnx": f"{part}/{{leaf}}"} for part in PARTS]
    several = Ladder(
        parts={"torso": torso, "critic": critic},
        forward=lambda parts, x: parts.critic(parts.torso(x)),
        inputs=lambda: (jnp.ones((2, 3)),),
        rules=RuleBook.from_dict({"version": 1, "rules": rules}),
    )
    for name, climb in (("whole", CASES["mlp"].ladder()), ("parts", several)):
        variables = climb.at("linen").init(jax.random.key(0), *climb.inputs)
        state = {**variables, "opt_state": tx.init(variables["params"]), "step": 3}
        path = tmp_path / name
        says = {"stage": "linen", "forms": climb.forms("linen"), "rules": climb.rules.to_dict()}
        with ocp.CheckpointManager(path) as manager:
            saved = ocp.args.StandardSave(state)
            manager.save(3, args=ocp.args.Composite(state=saved, run=ocp.args.JsonSave(says)))
        for stage in STAGES[1:]:
            out = tmp_path / f"{name} {stage}"
            convert(path / "3", out, stage)
            if stage != "nnx":  # which is the layout of stock Flax
                due = climb.move(state, "linen", stage)
                with ocp.StandardCheckpointer() as reader:
                    assert bits(reader.restore(out / "state", due)) == bits(due), (name, stage)
            assert bits(climb.load(out, "linen", state)) == bits(state), (name, stage)
