"""The keys of an nnx model are those of its Linen twin; what cannot be so is said or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.errors
import jax
import jax.numpy as jnp
import pytest
from conftest import STAGES
from flax import linen as nn
from flax import nnx
from jax import Array
from ladder_twins import CASES, WIDTH, rows
from test_ladder import bits

from linen_nnx import DrawError, Ladder, Refusal, RuleBook, RuleError, Twin, suggest
from linen_nnx.book.draws import Draw
from linen_nnx.ladder.training import check_draws

X = rows(4, WIDTH)
KEY = jax.random.key(3)
BRIDGED = STAGES[1:]


def zeros(model: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), model.abstract())


def call(model: Any, variables: Any, rngs: Any, *args: Any, **kwargs: Any) -> list[bytes]:
    """The bits of one compiled call."""
    run = jax.jit(lambda variables, rngs: model.apply(variables, *args, rngs=rngs, **kwargs))
    return bits(run(variables, rngs))


class Plain:
    """Models of dropout alone, whose keys are all that there is."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x: Array, train: bool = True) -> Array:
            for rate in (0.2, 0.4):
                x = nn.Dropout(rate)(x, deterministic=not train)
            return x

    class Nnx(nnx.Module):
        def __init__(self, count: int = 2, *, rngs: nnx.Rngs) -> None:
            rates = (0.2, 0.4, 0.6)[:count]
            self.drops = nnx.List([nnx.Dropout(rate, rngs=rngs) for rate in rates])

        def __call__(self, x: Array, train: bool = True) -> Array:
            for drop in self.drops:
                x = drop(x, deterministic=not train)
            return x


def plain(said: Callable[[str], None] = print, count: int = 2, rules: Any = None) -> Ladder:
    twin = Twin(Plain.Linen, lambda rngs: Plain.Nnx(count, rngs=rngs), lambda: (X,))
    return Ladder(twin, rules or RuleBook([]), say=said)


@pytest.mark.parametrize(
    "rngs",
    [
        {"dropout": jax.random.key(3)},
        {"params": jax.random.key(3)},  # to which Linen falls back
        {"dropout": jax.random.PRNGKey(3)},  # a raw key
        {"dropout": jax.random.key(3), "other": jax.random.key(4)},
    ],
    ids=["typed", "fallback", "raw", "more"],
)
def test_keys_of_any_form_give_linens_masks_with_one_pairing(rngs: Any) -> None:
    due = call(Plain.Linen(), {}, rngs, X)
    said: list[str] = []
    climb = plain(said.append)

    for stage in STAGES:
        assert call(climb.at(stage), {}, rngs, X) == due, stage
    assert len(said) == 1
    assert said[0].startswith("__call__(train=True): 2 draws of the nnx model get Linen's keys (")


def test_another_batch_size_needs_no_other_pairing() -> None:
    said: list[str] = []
    climb = plain(said.append)
    for size in (4, 7):
        x = rows(size, WIDTH)
        due = call(Plain.Linen(), {}, {"dropout": KEY}, x)
        assert call(climb.at("nnx"), {}, {"dropout": KEY}, x) == due
    assert len(said) == 1


def test_pairs_are_saved_with_the_rules_and_found_no_second_time(tmp_path: Path) -> None:
    book = plain().pair(X)
    book.save(tmp_path / "rules.yaml")

    text = (tmp_path / "rules.yaml").read_text()
    assert "- {linen: dropout/Dropout_1, nnx: drops/1/rngs}" in text
    assert "given: {train: true}" in text
    assert RuleBook.load(tmp_path / "rules.yaml") == book
    said: list[str] = []
    climb = plain(said.append, rules=tmp_path / "rules.yaml")
    due = call(Plain.Linen(), {}, {"dropout": KEY}, X)
    assert call(climb.at("nnx"), {}, {"dropout": KEY}, X) == due
    assert said == []


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (3, "expected a mapping with call, given, pairs, idle, own, got 3"),
        ({"call": 3}, "`call` is a text and `given` a mapping"),
        ({"call": "f", "extra": 1}, "expected a mapping with"),
        ({"call": "f", "pairs": {}}, None),
        ({"call": "f", "pairs": "ab"}, "`pairs` is a list, got 'ab'"),
        ({"call": "f", "pairs": [{"linen": "a"}]}, "a pair is a mapping such as"),
        ({"call": "f", "own": ["a#"]}, "a draw is a text such as `drop/rngs#1[2]`, got 'a#'"),
        ({"call": "f", "own": ["a"], "idle": ["a"]}, "nnx draws that stand there twice: a"),
    ],
)
def test_a_section_of_draws_that_cannot_be_read_says_what_it_must_be(
    entry: Any, words: str | None
) -> None:
    content = {"version": 1, "rules": [], "draws": [entry]}
    if words is None:
        assert RuleBook.from_dict(content).draws[0].pairs == ()
        return
    with pytest.raises(RuleError) as caught:
        RuleBook.from_dict(content)
    assert f"entry 1 of `draws`: {words}" in str(caught.value)


@pytest.mark.parametrize("draw", [Draw("a/b"), Draw("a", 2), Draw("a/0", 0, (1, 2))])
def test_a_draw_is_read_back_from_its_text(draw: Draw) -> None:
    assert Draw.parse(str(draw)) == draw


@pytest.mark.long
def test_a_stream_that_has_changed_since_it_was_paired_is_paired_anew_and_that_is_said() -> None:
    book = plain().pair(X).to_dict()
    book["draws"][0]["pairs"][0]["linen"] = "dropout/Dropout_7"
    said: list[str] = []

    found = call(
        plain(said.append, rules=RuleBook.from_dict(book)).at("nnx"), {}, {"dropout": KEY}, X
    )
    assert found == call(plain().at("linen"), {}, {"dropout": KEY}, X)
    assert len(said) == 1


def test_a_pair_may_stand_for_many() -> None:
    content = plain().pair(X).to_dict()
    assert len(content["draws"][0]["pairs"]) == 2
    content["draws"][0]["pairs"] = [{"linen": "dropout/Dropout_{i}", "nnx": "drops/{i}/rngs"}]
    book = RuleBook.from_dict(content)
    assert RuleBook.from_dict(book.to_dict()) == book
    said: list[str] = []

    found = call(plain(said.append, rules=book).at("nnx"), {}, {"dropout": KEY}, X)
    assert found == call(plain().at("linen"), {}, {"dropout": KEY}, X)
    assert not said


@pytest.mark.sampled(1)
@pytest.mark.parametrize("rate", [0.05, 0.1, 0.2])
def test_a_draw_that_two_keys_do_not_show_is_not_taken_for_idle(rate: float) -> None:
    """A mask of few elements and a low rate is often the same mask under another key."""
    x = rows(1, 4)
    twin = Twin(
        lambda: nn.Dropout(rate, deterministic=False),
        lambda rngs: nnx.Dropout(rate, deterministic=False, rngs=rngs),
        lambda: (x,),
    )
    (pairing,) = Ladder(twin, RuleBook([]), say=lambda text: None).pair(x).draws
    assert len(pairing.pairs) == 1
    assert pairing.idle == ()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("count", [3, 1, 0])
def test_draws_of_a_model_of_another_depth_are_not_those_in_the_rule_book(count: int) -> None:
    """One stream is drawn from once a layer: for a third layer the book has no key."""

    def ladder(count: int, rules: RuleBook) -> Ladder:
        class Linen(nn.Module):
            @nn.compact
            def __call__(self, x: Array) -> Array:
                for _ in range(count):
                    x = nn.Dropout(0.5, deterministic=False)(x) + 1
                return x

        class Port(nnx.Module):
            def __init__(self, *, rngs: nnx.Rngs) -> None:
                self.drop = nnx.Dropout(0.5, deterministic=False, rngs=rngs)

            def __call__(self, x: Array) -> Array:
                for _ in range(count):
                    x = self.drop(x) + 1
                return x

        twin = Twin(Linen, lambda rngs: Port(rngs=rngs), lambda: (X,))
        return Ladder(twin, rules, say=said.append)

    said: list[str] = []
    other = ladder(count, ladder(2, RuleBook([])).pair(X))
    due = call(other.linen, {}, {"dropout": KEY}, X)
    assert call(other.at("nnx"), {}, {"dropout": KEY}, X) == due
    assert len(said) == (2 if count else 1)


class Unused:
    """A head whose output is not used: its dropout shows in the statistics alone."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x: Array, train: bool = False) -> Array:
            head = nn.Dropout(0.5)(nn.Dense(5)(x), deterministic=not train)
            nn.BatchNorm(use_running_average=not train)(head)
            return nn.Dense(3)(x)

    class Nnx(nnx.Module):
        def __init__(self, *, rngs: nnx.Rngs) -> None:
            self.head, self.drop = nnx.Linear(WIDTH, 5, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
            self.norm, self.out = nnx.BatchNorm(5, rngs=rngs), nnx.Linear(WIDTH, 3, rngs=rngs)

        def __call__(self, x: Array) -> Array:
            self.norm(self.drop(self.head(x)))
            return self.out(x)

    RULES = (
        ("params/Dense_0/{leaf}", "head/{leaf}"),
        ("params/Dense_1/{leaf}", "out/{leaf}"),
        ("params/BatchNorm_0/scale", "norm/scale"),
        ("params/BatchNorm_0/bias", "norm/bias"),
        ("batch_stats/BatchNorm_0/mean", "norm/mean"),
        ("batch_stats/BatchNorm_0/var", "norm/var"),
    )


def test_a_draw_that_statistics_alone_see_has_a_partner() -> None:
    rules = [{"linen": linen, "nnx": port} for linen, port in Unused.RULES]
    book = RuleBook.from_dict({"version": 1, "rules": rules})
    climb = Ladder(Twin(Unused.Linen, lambda rngs: Unused.Nnx(rngs=rngs), lambda: (X,)), book)

    updates = []
    for stage in STAGES:
        model = climb.at(stage)
        variables = model.init(jax.random.key(0), X)
        found = call(model, variables, {"dropout": KEY}, X, train=True, mutable=["batch_stats"])
        updates.append(sorted(found))
    assert updates == [updates[0]] * len(STAGES)


def test_suggest_pairs_the_layers_as_one_and_a_wrong_pair_is_found() -> None:
    twin = Twin(Plain.Linen, lambda rngs: Plain.Nnx(rngs=rngs), lambda: (X,))
    content = suggest(twin).to_dict()
    assert content["draws"][0]["pairs"] == [
        {"linen": "dropout/Dropout_{i}", "nnx": "drops/{i}/rngs"}
    ]
    (check,) = check_draws(twin, RuleBook.from_dict(content))
    assert check.passed

    content["draws"][0]["pairs"] = [
        {"linen": f"dropout/Dropout_{1 - n}", "nnx": f"drops/{n}/rngs"} for n in range(2)
    ]
    (check,) = check_draws(twin, RuleBook.from_dict(content))
    assert check.passed is False
    assert check.notes == tuple(
        f"drops/{n}/rngs is dropout/Dropout_{n}; the rule book says dropout/Dropout_{1 - n}"
        for n in range(2)
    )
    (check,) = check_draws(twin, RuleBook([]))
    assert check.passed is None


@pytest.mark.sampled(1)
@pytest.mark.parametrize("stage", ["nnx_in_linen", "nnx"])
def test_draws_without_a_partner_have_repeatable_streams_of_their_own(stage: str) -> None:
    said: list[str] = []
    model = plain(said.append, count=3).at(stage)

    first = call(model, {}, {"dropout": KEY}, X)
    assert call(model, {}, {"dropout": KEY}, X) == first
    assert call(plain(count=3).at(stage), {}, {"dropout": KEY}, X) == first
    assert call(model, {}, {"dropout": jax.random.key(4)}, X) != first
    assert len(said) == 1
    assert "; 3 have streams of their own: drops/0/rngs, drops/1/rngs, drops/2/rngs: " in said[0]


def test_pairing_what_has_no_partner_is_refused_when_it_is_asked_for() -> None:
    with pytest.raises(DrawError, match=r"no partner: drops/0/rngs.*with one key for all draws"):
        plain(count=3).pair(X)


@pytest.mark.parametrize("stage", STAGES)
def test_a_missing_key_is_linens_own_error_at_every_stage(stage: str) -> None:
    for rngs in (None, {}):
        with pytest.raises(flax.errors.InvalidRngError, match='needs PRNG for "dropout"'):
            plain().at(stage).apply({}, X, rngs=rngs)


def test_a_stream_of_its_own_without_any_key_is_refused() -> None:
    twin = Twin(lambda: nn.Dense(2), lambda rngs: Extra(rngs=rngs), lambda: (X,))
    rules = [{"linen": "params/{leaf}", "nnx": "dense/{leaf}"}]
    model = Ladder(twin, RuleBook.from_dict({"version": 1, "rules": rules})).at("nnx")

    with pytest.raises(DrawError, match="stream drop/rngs needs PRNG"):
        model.apply(zeros(model), X)


class Extra(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.dense, self.drop = nnx.Linear(WIDTH, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.dense(self.drop(x))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("stage", STAGES)
def test_updates_of_collections_that_are_not_mutable_are_linens_own_error(stage: str) -> None:
    model = CASES["mlp"].ladder().at(stage)

    with pytest.raises(flax.errors.ModifyScopeVariableError, match="Cannot update variable"):
        model.apply(zeros(model), X, train=True, rngs={"dropout": KEY})


@pytest.mark.parametrize("stage", BRIDGED)
def test_intermediates_are_refused_where_linen_has_none(stage: str) -> None:
    with pytest.raises(Refusal, match="capture_intermediates works at stage 'linen' alone"):
        plain().at(stage).apply({}, X, train=False, capture_intermediates=True)


class InLoop(nn.Module):
    """Draws for as long as only a run tells."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def body(module: nn.Module, state: Any) -> Any:
            return state[0] + 1, nn.Dropout(0.5, deterministic=False)(state[1])

        split = {"dropout": True, "params": True}
        start = jnp.int32(0), x
        return nn.while_loop(lambda _, s: s[0] < 2, body, self, start, split_rngs=split)[1]


def test_linen_draws_that_no_trace_counts_are_named() -> None:
    port = lambda rngs: nnx.Dropout(0.5, deterministic=False, rngs=rngs)  # noqa: E731

    with pytest.raises(DrawError, match="drawn inside a while: how many draws there are, only"):
        Ladder(Twin(InLoop, port, lambda: (X,)), RuleBook([])).pair(X)


@pytest.mark.long
def test_norms_and_masks_are_the_same_at_every_stage() -> None:
    case = CASES["scan, list"]
    climb = case.ladder()
    norms, masks = set(), []
    for stage in STAGES:
        model = climb.at(stage)
        params = model.init(jax.random.key(0), *case.inputs())["params"]
        norms.add(bits(jax.jit(model.view.norm)(params))[0])
        masks.append(sum(model.view.mask(lambda _, rank: rank > 1).values()))
    assert len(norms) == 1
    assert masks == [2, 4, 2, 4]  # kernels: the scanned ones are one leaf in Linen
    assert climb.at("linen").view.ranks()["layers/Dense_0/bias"] == 1


def test_explicit_keys_go_on_working() -> None:
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x: Array, key: Array) -> Array:
            return nn.Dropout(0.5, deterministic=False)(x, rng=key)

    class Port(nnx.Module):
        def __init__(self) -> None:
            self.drop = nnx.Dropout(0.5)

        def __call__(self, x: Array, key: Array) -> Array:
            return self.drop(x, rngs=key)

    climb = Ladder(Twin(Linen, lambda rngs: Port(), lambda: (X, KEY)), RuleBook([]))
    masks = {tuple(call(climb.at(stage), {}, None, X, KEY)) for stage in STAGES}
    assert len(masks) == 1


def test_a_train_argument_by_place_or_by_name_is_one_kind_of_call() -> None:
    said: list[str] = []
    climb = plain(said.append)
    for args, kwargs in (((X, True), {}), ((X,), {"train": True}), ((X,), {})):
        call(climb.at("nnx"), {}, {"dropout": KEY}, *args, **kwargs)
    assert len(said) == 1
