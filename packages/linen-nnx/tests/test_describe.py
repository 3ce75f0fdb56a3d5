"""`inspect` calls a tree what it is, without a rule book."""

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

from linen_nnx.cli import main


class Linen(nn.Module):
    names: tuple[str | None, str | None] = (None, None)

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name=self.names[1])(nn.Dense(3, name=self.names[0])(x))


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(2)])


def linen(*names):
    return Linen(names or (None, None)).init(jax.random.key(0), jnp.ones((1, 2)))


def model():
    return Nnx(nnx.Rngs(0))


def optimizer():
    return nnx.Optimizer(model(), optax.adam(0.1), wrt=nnx.Param)


ADAM = optax.adam(0.1)
PARAMS = linen()["params"]
TREES = {
    "variables": (linen(), "variables"),
    "TrainState": (TrainState.create(apply_fn=None, params=PARAMS, tx=ADAM), "TrainState"),
    "numbered Linen names": (PARAMS, "bare parameters of Linen"),
    "given names": (
        linen("fc", "out")["params"],
        "bare parameters of Linen, or a pure dict of nnx: their names do not tell",
    ),
    "nnx": (nnx.state(model()), "nnx.State of the model"),
    "pure nnx": (nnx.to_pure_dict(nnx.state(model())), "nnx.State as a pure dict of the model"),
    "nnx with optimizer": (
        {"model": nnx.state(model()), "optimizer": nnx.state(optimizer())},
        "nnx.State of the model in `model`, and of its optimizer in `optimizer`",
    ),
    "nnx.Optimizer": (nnx.state(optimizer()), "the state of nnx.Optimizer alone"),
    "adam": (ADAM.init(PARAMS), "the state of an optimizer alone"),
    "chain": (
        optax.chain(optax.clip(1.0), optax.adamw(0.1)).init(PARAMS),
        "the state of an optimizer alone",
    ),
    "momentum": (optax.sgd(0.1, momentum=0.9).init(PARAMS), "the state of an optimizer alone"),
    "steps": (optax.MultiSteps(ADAM, 2).init(PARAMS), "the state of an optimizer alone"),
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_is_called_what_it_is(tmp_path, name, capsys):
    tree, called = TREES[name]
    ocp.PyTreeCheckpointer().save(tmp_path / "item", tree)
    assert main(["inspect", str(tmp_path / "item")]) == 0
    assert f"Orbax item: {called}" in capsys.readouterr().out
