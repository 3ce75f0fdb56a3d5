"""A model of several parts, put together by one function that runs under both roots."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import STAGES
from flax import linen as nn
from flax import nnx
from jax import Array
from ladder_twins import WIDTH, rows
from test_ladder import bits

from linen_nnx import Ladder, Part, RuleBook, TwinError
from linen_nnx.book.tree import flatten, unflatten

RNGS = {"dropout": jax.random.key(3)}


class LinenEncoder(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(WIDTH)(x))
        return nn.Dropout(0.4)(x, deterministic=not train)


class NnxEncoder(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.4, rngs=rngs)

    def __call__(self, x: Array, train: bool = False) -> Array:
        x = self.norm(self.dense(x), use_running_average=not train)
        return self.drop(x, deterministic=not train)


class LinenPool(nn.Module):
    """No parameters, but a draw."""

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        return nn.Dropout(0.1)(x, deterministic=not train).reshape(len(x), -1, 2).mean(-1)


class NnxPool(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.drop = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: Array, train: bool = False) -> Array:
        return self.drop(x, deterministic=not train).reshape(len(x), -1, 2).mean(-1)


class LinenHead(nn.Module):
    def setup(self) -> None:
        self.layers = [nn.Dense(4), nn.Dense(3)]
        self.drop = nn.Dropout(0.2)

    def hidden(self, x: Array) -> Array:
        return nn.relu(self.layers[0](x))

    def __call__(self, x: Array, train: bool = False) -> Array:
        return self.layers[1](self.drop(self.hidden(x), deterministic=not train))


class NnxHead(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        sizes = ((WIDTH // 2, 4), (4, 3))
        self.layers = nnx.List([nnx.Linear(*size, rngs=rngs) for size in sizes])
        self.drop = nnx.Dropout(0.2, rngs=rngs)

    def hidden(self, x: Array) -> Array:
        return nnx.relu(self.layers[0](x))

    def __call__(self, x: Array, train: bool = False) -> Array:
        return self.layers[1](self.drop(self.hidden(x), deterministic=not train))


class LinenSpare(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(2)(x)


class Monolith(nn.Module):
    """The Linen model as it was before anybody thought of parts."""

    def setup(self) -> None:
        self.encoder, self.pool, self.head = LinenEncoder(), LinenPool(), LinenHead()
        self.spare = LinenSpare()

    def __call__(self, x: Array, train: bool = False) -> tuple[Array, Array]:
        return forward(self, x, train)

    def embed(self, x: Array) -> Array:
        return embed(self, x)


def forward(parts: Any, x: Array, train: bool = False) -> tuple[Array, Array]:
    first = parts.encoder(x, train=train)
    second = parts.encoder(2 * x, train=train)  # other masks, and statistics of the first call
    return parts.head(parts.pool(first + second, train=train), train=train), first


def embed(parts: Any, x: Array) -> Array:
    return parts.head.hidden(parts.pool(parts.encoder(x)))


RULES = (
    ("params/encoder/Dense_0/{leaf}", "encoder/dense/{leaf}"),
    ("params/encoder/BatchNorm_0/scale", "encoder/norm/scale"),
    ("params/encoder/BatchNorm_0/bias", "encoder/norm/bias"),
    ("batch_stats/encoder/BatchNorm_0/mean", "encoder/norm/mean"),
    ("batch_stats/encoder/BatchNorm_0/var", "encoder/norm/var"),
    ("params/head/layers_{i}/{leaf}", "head/layers/{i}/{leaf}"),
)


def ladder(*ported: str) -> Ladder:
    entries = [{"linen": linen, "nnx": port} for linen, port in RULES]
    return Ladder(
        parts={
            "encoder": Part(LinenEncoder(), lambda rngs: NnxEncoder(rngs=rngs)),
            "pool": Part(LinenPool(), lambda rngs: NnxPool(rngs=rngs)),
            "head": Part(LinenHead, lambda rngs: NnxHead(rngs=rngs)),
            "spare": Part(LinenSpare(), lambda rngs: nnx.Linear(WIDTH, 2, rngs=rngs)),
        },
        forward=forward,
        methods={"embed": embed},
        inputs=lambda: (rows(4, WIDTH),),
        ported=ported,
        rules=RuleBook.from_dict({"version": 1, "rules": entries}),
    )


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "ported",
    [
        ("encoder",),
        pytest.param(("head", "pool"), marks=pytest.mark.long),
        pytest.param(("pool",), marks=pytest.mark.long),
        pytest.param(("encoder", "pool", "spare"), marks=pytest.mark.long),
        pytest.param((), marks=pytest.mark.long),
    ],
    ids=" ".join,
)
def test_any_choice_of_ported_parts_gives_the_bits_of_the_unmodified_model(
    ported: tuple[str, ...],
) -> None:
    x, key = rows(4, WIDTH), jax.random.key(0)
    start = Monolith().init(key, x)

    def results(model: Any, variables: Any) -> Any:
        call = jax.jit(
            lambda variables, x, rngs: (
                model.apply(variables, x, train=True, rngs=rngs, mutable=["batch_stats"]),
                model.apply(variables, x, method="embed"),
            )
        )
        (outputs, updates), embedded = call(variables, x, RNGS)
        return bits((outputs, embedded)), updates

    due, updates = results(Monolith(), start)
    climb = ladder(*ported)
    for stage in STAGES:
        model = climb.at(stage)
        variables = model.init(key, x)
        assert bits(unflatten(climb.translate(flatten(variables), stage, "linen"))) == bits(start)
        own, after = results(model, variables)
        assert own == due, stage
        assert bits(unflatten(climb.translate(flatten(after), stage, "linen"))) == bits(updates)


def test_a_part_that_is_never_called_needs_no_variables_at_any_stage() -> None:
    climb = ladder("spare")

    for stage in STAGES:
        assert "spare" not in climb.at(stage).abstract()["params"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_method_that_is_none_is_refused(stage: str) -> None:
    model = ladder("encoder").at(stage)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.abstract())

    with pytest.raises(TwinError, match=r"no method 'decode'.*has: embed"):
        model.apply(zeros, rows(4, WIDTH), method="decode")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "takes a twin, or parts"),
        ({"parts": {"a": Part(LinenPool(), NnxPool)}}, "parts need `forward` and `inputs`"),
        (
            {
                "parts": {"a": Part(LinenPool(), NnxPool)},
                "forward": forward,
                "inputs": tuple,
                "ported": ("b",),
            },
            "`ported` names 'b'; the parts are a",
        ),
    ],
)
def test_a_ladder_that_is_not_told_enough_is_refused(options: Any, words: str) -> None:
    with pytest.raises(TwinError, match=words):
        Ladder(**options)
