"""The ladder: unmodified models with their own dropout give the same bits at every stage."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import STAGES
from ladder_twins import CASES, Case

from linen_nnx import Ladder, VariablesError
from linen_nnx.book.tree import flatten, unflatten

HEAVY = {"transformer, remat", "scan, list", "rnn", "called twice"}
NAMES = [pytest.param(name, marks=pytest.mark.long if name in HEAVY else ()) for name in CASES]


@cache
def ladder(name: str) -> Ladder:
    return CASES[name].ladder()


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def as_linen(ladder: Ladder, stage: str, variables: Any) -> Any:
    """Some variables of a stage, as the Linen model has them."""
    return unflatten(ladder.translate(flatten(variables), stage, "linen"))


def run(model: Any, case: Case, variables: Any, train: bool) -> tuple[list[bytes], Any]:
    """The bits of the outputs, and the updates, of one compiled call."""

    @jax.jit
    def call(variables: Any, rngs: Any, args: Any) -> Any:
        return model.apply(variables, *args, train=train, rngs=rngs, mutable=["batch_stats"])

    outputs, updates = call(variables, case.rngs(5), case.inputs())
    return bits(outputs), updates


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", NAMES)
def test_four_stages_give_the_same_bits_with_dropout_on_and_off(name: str) -> None:
    case, key = CASES[name], {"params": jax.random.key(0)}
    linen = case.linen()
    start = linen.init(key, *case.inputs())
    due = {train: run(linen, case, start, train) for train in (False, True)}

    for stage in STAGES:
        model = ladder(name).at(stage)
        variables = model.init(key, *case.inputs())
        assert bits(as_linen(ladder(name), stage, variables)) == bits(start)
        for train in (False, True):
            outputs, updates = run(model, case, variables, train)
            assert outputs == due[train][0], (stage, train)
            assert bits(as_linen(ladder(name), stage, updates)) == bits(due[train][1])
    assert due[True][0] != due[False][0]  # dropout was on


def train(model: Any, case: Case, steps: int = 5) -> tuple[list[bytes], Any]:
    """A training script as people write them; the losses, and the variables at the end."""
    args = case.inputs()
    variables = model.init({"params": jax.random.key(0)}, *args)
    tx = optax.adamw(1e-2)

    @jax.jit
    def step(variables: Any, state: Any, number: Any) -> Any:
        rngs = {"dropout": jax.random.fold_in(jax.random.key(1), number)}
        rest = {name: tree for name, tree in variables.items() if name != "params"}

        def loss(params: Any) -> Any:
            out, updates = model.apply(
                {"params": params, **rest}, *args, train=True, rngs=rngs, mutable=[*rest]
            )
            return (out.astype(jnp.float32) ** 2).mean(), updates

        (value, updates), grads = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        grads = jax.lax.optimization_barrier(grads)
        moves, state = tx.update(grads, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], moves), **updates}, state, value

    state, losses = tx.init(variables["params"]), []
    for number in range(steps):
        variables, state, value = step(variables, state, number)
        losses += bits(value)
    return losses, variables


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        "mlp in bfloat16",
        pytest.param("transformer", marks=pytest.mark.long),
        "scan, nnx.scan",
    ],
)
def test_four_stages_train_to_the_same_bits(name: str) -> None:
    case = CASES[name]
    losses, variables = train(case.linen(), case)

    for stage in STAGES:
        own, after = train(ladder(name).at(stage), case)
        assert own == losses, stage
        assert bits(as_linen(ladder(name), stage, after)) == bits(variables), stage
    assert len(set(losses)) == len(losses)


@pytest.mark.parametrize("stage", STAGES)
def test_variables_that_do_not_fit_are_refused_with_every_difference(stage: str) -> None:
    model = ladder("mlp").at(stage)
    leaves = {path: jnp.zeros(leaf.shape) for path, leaf in flatten(model.abstract()).items()}
    kernels = [path for path in leaves if path.endswith("kernel")]
    del leaves[kernels[0]]
    leaves[kernels[1]] = jnp.zeros((3, 3))
    leaves["params/extra"] = jnp.zeros(())

    with pytest.raises(VariablesError) as caught:
        model.apply(unflatten(leaves), *CASES["mlp"].inputs())

    for word in (
        f"missing     {kernels[0]}",
        f"mismatch    {kernels[1]}",
        "unexpected  params/extra",
    ):
        assert word in str(caught.value)
