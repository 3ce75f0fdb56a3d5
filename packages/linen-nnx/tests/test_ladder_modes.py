"""Ports in the usual styles: with the same flag, with another one, or with nnx's own modes."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from conftest import STAGES
from flax import linen as nn
from flax import nnx
from jax import Array
from ladder_twins import CASES, WIDTH, rows
from test_ladder import bits

from linen_nnx import Ladder, RuleBook, Twin, cli, suggest

X = rows(4, WIDTH)
KEY = jax.random.key(3)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dropout(0.5)(x, deterministic=not train)


class Port(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm, self.drop = nnx.BatchNorm(WIDTH, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)


class SameWord(Port):
    def __call__(self, x: Array, train: bool = False) -> Array:
        return self.drop(self.norm(x, use_running_average=not train), deterministic=not train)


class OtherWord(Port):
    def __call__(self, x: Array, *, deterministic: bool) -> Array:
        x = self.norm(x, use_running_average=deterministic)
        return self.drop(x, deterministic=deterministic)


class OwnModes(Port):
    def __call__(self, x: Array) -> Array:
        return self.drop(self.norm(x))


BOOK = RuleBook.from_dict(
    {
        "version": 1,
        "rules": [
            {"linen": f"{collection}/BatchNorm_0/{leaf}", "nnx": f"norm/{leaf}"}
            for collection, leaf in (
                ("params", "scale"), ("params", "bias"),
                ("batch_stats", "mean"), ("batch_stats", "var"),
            )
        ],
    }
)  # fmt: skip


def run(model: Any, variables: Any, *args: Any, **kwargs: Any) -> list[bytes]:
    call = jax.jit(
        lambda variables, x, key: model.apply(
            variables, x, *args, rngs={"dropout": key}, mutable=["batch_stats"], **kwargs
        )
    )
    return bits(call(variables, X, KEY))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("port", [SameWord, OtherWord, OwnModes])
def test_a_port_is_in_the_mode_that_the_linen_call_says(port: Any) -> None:
    climb = Ladder(Twin(Linen, lambda rngs: port(rngs=rngs), lambda: (X,)), BOOK)
    start = Linen().init(jax.random.key(0), X)

    for args, kwargs in (((), {}), ((True,), {}), ((), {"train": False})):
        due = run(Linen(), start, *args, **kwargs)
        for stage in STAGES:
            model = climb.at(stage)
            assert run(model, model.translate(start), *args, **kwargs) == due, (stage, args)


class OwnInit(nn.Module):
    """A module for a script of its author's: `init` makes the inputs, and the flag has no value."""

    deterministic: bool | None = None

    @nn.compact
    def __call__(self, x: Array, deterministic: bool | None = None) -> Array:
        flag = nn.merge_param("deterministic", self.deterministic, deterministic)
        return nn.Dropout(0.5)(nn.Dense(2)(x), deterministic=flag)

    def init(self, rng: Array) -> Any:  # pyrefly: ignore[bad-override]
        return super().init(rng, X, True)


def test_a_class_with_an_init_of_its_own_and_a_flag_without_a_value_starts_at_every_stage() -> None:
    twin = Twin(OwnInit, lambda rngs: nnx.Linear(WIDTH, 2, rngs=rngs), lambda: (X,))
    rules = [{"linen": "params/Dense_0/{leaf}", "nnx": "{leaf}"}]
    climb = Ladder(twin, RuleBook.from_dict({"version": 1, "rules": rules}))
    due = bits(OwnInit().init(KEY))

    for stage in STAGES:
        assert bits(climb.at(stage).initial(KEY)) == due, stage
        assert bits(climb.at(stage).init(KEY, X, deterministic=True)) == due, stage


def test_a_twins_own_call_is_used_for_the_calls_that_it_takes() -> None:
    twin = Twin(
        lambda: nn.Dense(2),
        lambda rngs: nnx.Linear(WIDTH, 2, rngs=rngs),
        lambda: (X,),
        call_nnx=lambda model, x: 0 * model(x) + 7,
    )
    rules = [{"linen": "params/{leaf}", "nnx": "{leaf}"}]
    book = RuleBook.from_dict({"version": 1, "rules": rules})
    model = Ladder(twin, book).at("nnx")

    assert (model.apply(model.init(KEY, X), X) == jnp.full((4, 2), 7)).all()


@pytest.mark.long
def test_suggest_proposes_the_pairs_of_draws_in_training() -> None:
    book = suggest(CASES["vae"].twin)

    assert [pairing.kind for pairing in book.draws] == ["__call__(train=True)"]
    pairs = {str(pair.nnx): str(pair.linen) for pair in book.draws[0].pairs}
    assert pairs == {"rngs/default": "noise", "rngs/default#1": "dropout/drop"}
    assert any("2 draws of the nnx model get Linen's keys" in note for note in book.notes)


def test_the_command_writes_the_pairs_beside_the_rules(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "twin.py").write_text(
        "import jax.numpy as jnp\n"
        "from flax import linen as nn, nnx\n"
        "from linen_nnx import Twin\n"
        "class Linen(nn.Module):\n"
        "    @nn.compact\n"
        "    def __call__(self, x, train: bool):\n"
        "        return nn.Dropout(0.5)(nn.Dense(2)(x), deterministic=not train)\n"
        "class Port(nnx.Module):\n"
        "    def __init__(self, *, rngs):\n"
        "        self.dense = nnx.Linear(3, 2, rngs=rngs)\n"
        "        self.drop = nnx.Dropout(0.5, rngs=rngs)\n"
        "    def __call__(self, x):\n"
        "        return self.drop(self.dense(x))\n"
        "TWIN = Twin(Linen, lambda rngs: Port(rngs=rngs), lambda: (jnp.ones((4, 3)),))\n"
    )

    code = cli.main(["suggest", f"{tmp_path}/twin.py:TWIN", "-o", f"{tmp_path}/rules.yaml"])

    assert code == 0
    shown = capsys.readouterr().out
    assert "draw dropout/Dropout_0  ->  drop/rngs\n    in __call__(train=True)" in shown
    assert RuleBook.load(tmp_path / "rules.yaml").draws[0].given == {"train": True}
