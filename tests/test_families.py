"""The families of the template: the same bits at every stage, and one array used by both parts."""

import re
import sys
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import STAGES
from flax import nnx
from linen_nnx import Part, RuleBook, Stage
from linen_nnx.book.tree import flatten, unflatten

import model
from configs.build import ConfigError
from model.shared import linen_attention
from training import compose
from training.assemble import Setup, load_rules
from training.runtime.mesh import OneDevice

OPTIONS: dict[str, dict[str, Any]] = {
    "transformer": {
        "family": "transformer", "depth": 2, "width": 8, "heads": 2, "mlp_factor": 2, "vocab": 11,
        "length": 6, "dropout": 0.5, "dtype": "float32", "remat": False, "scan": False,
    },
    "convnet": {
        "family": "convnet", "depth": 1, "width": 4, "channels": 1, "classes": 3, "dropout": 0.5,
        "dtype": "float32", "remat": False,
    },
    "mlp": {
        "family": "mlp", "features": 5, "hidden": 4, "outputs": 2, "dropout": 0.5,
        "dtype": "float32",
    },
}  # fmt: skip
INPUTS = {
    "transformer": jnp.arange(18).reshape(3, 6) % 11,
    "convnet": jnp.linspace(0, 1, 3 * 8 * 8).reshape(3, 8, 8, 1),
    "mlp": jnp.linspace(-1, 1, 15).reshape(3, 5),
}
RNGS = {"dropout": jax.random.key(3)}


def staged(name: str, stage: str, **options: Any) -> tuple[Stage, dict[str, Any]]:
    """A stage, and variables that are alike at every stage."""
    family = model.create(OPTIONS[name] | options)
    made = family.ladder({"inputs": INPUTS[name]}, load_rules(family)).at(stage)
    return made, made.init(jax.random.key(0), INPUTS[name])


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", [*reversed(OPTIONS)])
def test_outputs_are_the_same_bits_at_every_stage_with_dropout_on(name: str) -> None:
    found = []
    for stage_name in STAGES:
        stage, variables = staged(name, stage_name)

        def run(variables: Any, stage: Stage = stage) -> Any:
            return stage.apply(
                variables, INPUTS[name], train=True, rngs=RNGS, mutable=stage.mutable
            )

        outputs, updates = jax.jit(run)(variables)
        found.append((bits(outputs), sorted(bits(updates))))
    assert found == [found[0]] * len(STAGES)


TABLE = ("Embed_0/embedding", "token_embed/embedding")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("stage_name", STAGES)
def test_the_gradient_of_the_shared_table_is_the_sum_over_its_two_uses(
    monkeypatch: pytest.MonkeyPatch, stage_name: str
) -> None:
    """The table embeds the bytes, and the head scores with it: one leaf, two paths of gradient.

    Each byte occurs once, so that every entry is a sum of two numbers, in whatever order; and
    nothing is jitted, so that the three gradients are made of the same operations, fused nowhere.
    """
    tokens = jnp.array([[7, 2, 9, 0, 4, 5]])
    weights = jnp.linspace(-1, 1, 6 * 11).reshape(1, 6, 11)

    def gradient() -> np.ndarray:
        stage, variables = staged("transformer", stage_name, dropout=0.0)
        leaves = flatten(variables)
        (path,) = [path for path in leaves if path.endswith(TABLE)]

        def loss(table: Any) -> Any:
            full = unflatten({**leaves, path: table})
            return (stage.apply(full, tokens, train=False) * weights).sum()

        return np.asarray(jax.grad(loss)(leaves[path]))

    whole = gradient()
    with monkeypatch.context() as patch:
        cut_head(patch, features=False, shared=True)
        embedding = gradient()
    with monkeypatch.context() as patch:
        cut_head(patch, features=True, shared=False)
        scoring = gradient()
    assert np.abs(embedding).max() > 0
    assert np.abs(scoring).max() > 0
    np.testing.assert_array_equal(whole, embedding + scoring)


def cut_head(patch: pytest.MonkeyPatch, *, features: bool, shared: bool) -> None:
    """Lets no gradient through one of the head's two inputs."""
    from model import transformer

    def forward(parts: Any, tokens: Any, *, train: bool = False) -> Any:
        x, lent = parts.encoder(tokens, train=train)
        x = jax.lax.stop_gradient(x) if features else x
        lent = jax.lax.stop_gradient(lent) if shared else lent
        return parts.head(x, lent, train=train)

    patch.setattr(transformer, "forward", forward)


def test_an_unknown_family_or_option_is_named() -> None:
    with pytest.raises(ConfigError, match=r"did you mean.*transformer"):
        model.create({"family": "transfomer"})
    options = OPTIONS["convnet"].copy()
    options["widht"] = options.pop("width")
    with pytest.raises(ConfigError, match=r"(?s)model\.widht.*model\.width.*missing"):
        model.create(options)


class LinenDense(nn.Module):
    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        return nn.Dropout(0.5)(nn.Dense(4)(x), deterministic=not train)


class NnxDense(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Any, train: bool = False) -> Any:
        return self.dropout(self.dense(x), deterministic=not train)


class LinenMask(nn.Module):
    """No parameters."""

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        return nn.Dropout(0.2)(jnp.tanh(x), deterministic=not train)


class NnxMask(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x: Any, train: bool = False) -> Any:
        return self.dropout(jnp.tanh(x), deterministic=not train)


ONE = Part(LinenDense, lambda rngs: NnxDense(rngs=rngs))
BARE = Part(LinenMask, lambda rngs: NnxMask(rngs=rngs))


@dataclass(frozen=True)
class Plain:
    """The options of a family without any."""

    family: str


def twice(parts: Any, x: Any, train: bool = False) -> Any:
    """One part is called twice, one has no parameters."""
    return parts.head(parts.bare(parts.head(x, train=train), train=train), train=train)


SHAPES: dict[str, tuple[Any, Any, str, str]] = {
    "one part": (ONE, None, "params/Dense_0/{leaf}", "dense/{leaf}"),
    "several": (
        {"bare": BARE, "head": ONE}, twice, "params/head/Dense_0/{leaf}", "head/dense/{leaf}",
    ),
}  # fmt: skip


@pytest.mark.sampled(1)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_family_may_be_one_part_or_have_parts_of_any_kind(
    monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    """A part without parameters, one that is called twice: trained at all stages alike."""
    parts, forward, linen, port = SHAPES[shape]

    def loss(model: Any, batch: Any, rngs: Any) -> Any:
        out = model(batch["inputs"], train=model.train)
        return {"loss": jnp.square(out - batch["targets"]).mean(-1)}

    family = {
        "Options": Plain, "parts": lambda cfg: parts, "forward": forward, "loss": loss,
        "inputs": lambda batch: (batch["inputs"],), "__path__": [],
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "made", ModuleType("made"))
    monkeypatch.setitem(sys.modules, "made.up", ModuleType("made.up"))
    vars(sys.modules["made.up"]).update(family)
    rules = RuleBook.from_dict({"version": 1, "rules": [{"linen": linen, "nnx": port}]})
    batch = {"inputs": np.linspace(-1, 1, 12, dtype="f").reshape(3, 4), "targets": np.eye(3, 4)}

    found = []
    for stage in STAGES:
        cfg = compose("experiment=diabetes", f"stage={stage}", "optimizer.warmup=0")
        setup = Setup(replace(cfg, model={"family": "made.up"}), None, batch, rules, OneDevice())
        state, values = setup.program.init(), []
        for _ in range(2):
            state, metrics = setup.program.train_step(state, batch)
            values.append({name: float(value) for name, value in metrics.items()})
        found.append((values, sorted(bits(state["params"]))))
    assert found == [found[0]] * len(STAGES)
    assert f"grad_norm_{'model' if forward is None else 'head'}" in values[0]


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("examples.vea", "there is no module examples.vea: give its path from the root"),
        ("no.such", "there is no module no: "),
        ("../vae", "expected the name of a module"),
        (3, "got 3; expected the name of a module"),
    ],
)
def test_a_family_elsewhere_that_is_not_there_is_named(family: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=rf"model\.family: .*{re.escape(message)}"):
        model.create({"family": family})


@pytest.mark.parametrize("is_causal", [False, True])
def test_a_port_with_the_attention_of_linen_computes_its_bits(is_causal: bool) -> None:
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))
    mask = jnp.tril(jnp.ones((1, 1, 5, 5), bool)) if is_causal else None
    layer = nn.MultiHeadDotProductAttention(num_heads=2)
    params = layer.init(jax.random.key(1), x)["params"]
    port = nnx.MultiHeadAttention(
        2, 8, decode=False, attention_fn=linen_attention, rngs=nnx.Rngs(0)
    )
    for name, leaves in params.items():
        for leaf, value in leaves.items():
            getattr(getattr(port, name), leaf).set_value(value)

    due = jax.jit(lambda x: layer.apply({"params": params}, x, mask=mask))(x)
    assert (nnx.jit(lambda port, x: port(x, is_causal=is_causal))(port, x) == due).all()
