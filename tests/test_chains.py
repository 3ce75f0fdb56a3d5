"""Optimizers by name: every one of optax from YAML, checked against its own signature."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.build import ConfigError
from configs.earlier import upgraded
from configs.schema import Optimizer, Part
from training import chains, compose, optimizer

PARAMS = {"encoder": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
MASKS = {
    "matrices": lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree),
    "rest": lambda tree: jax.tree.map(lambda leaf: leaf.ndim < 2, tree),
}


def named(names):
    """The mask of the leaves with these names."""
    return lambda tree: jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in names, tree
    )


AROUND = chains.Surroundings(optax.constant_schedule(0.1), MASKS, named, optax.tree.norm)


def updates(transformation, steps=3):
    """What the transformation makes of a few gradients, as bytes."""
    params, state = PARAMS, transformation.init(PARAMS)
    for step in range(steps):
        grads = jax.tree.map(lambda leaf, by=step: jnp.cos(leaf * (1 + by)), params)
        change, state = transformation.update(grads, state, params)
        params = optax.apply_updates(params, change)
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(params)]


@pytest.mark.parametrize(
    ("chain", "by_hand"),
    [
        (["adam"], optax.adam(0.1)),
        ([{"sgd": {"learning_rate": 0.3, "momentum": 0.9}}], optax.sgd(0.3, momentum=0.9)),
        (
            [{"sgd": {"learning_rate": {"exponential_decay": {
                "init_value": 0.3, "transition_steps": 2, "decay_rate": 0.5}}}}],
            optax.sgd(optax.exponential_decay(0.3, 2, 0.5)),
        ),
        ([{"adamw": {"weight_decay": 0.3}}],
         optax.adamw(0.1, weight_decay=0.3, mask=MASKS["matrices"])),
        ([{"adamw": {"weight_decay": 0.3, "mask": None}}], optax.adamw(0.1, weight_decay=0.3)),
        ([{"adamw": {"weight_decay": 0.3, "mask": "rest"}}],
         optax.adamw(0.1, weight_decay=0.3, mask=MASKS["rest"])),
        ([{"adamw": {"weight_decay": 0.3, "mask": ["bias"]}}],
         optax.adamw(0.1, weight_decay=0.3, mask=named(["bias"]))),
        ([{"clip": {"max_delta": 0.1}}, "scale_by_adam", {"scale": {"step_size": -0.1}}],
         optax.chain(optax.clip(0.1), optax.scale_by_adam(), optax.scale(-0.1))),
        ([{"apply_if_finite": {"inner": ["centralize", "adam"], "max_consecutive_errors": 3}}],
         optax.apply_if_finite(optax.chain(optax.centralize(), optax.adam(0.1)), 3)),
        ([{"clip_by_global_norm": {"max_norm": 0.1}}, "sgd"],
         optax.chain(chains.clip_by_norm(0.1, optax.tree.norm), optax.sgd(0.1))),
        ([{"adam": {"mu_dtype": "bfloat16"}}], optax.adam(0.1, mu_dtype=jnp.bfloat16)),
        ([{"prodigy": {"betas": [0.8, 0.99]}}], optax.contrib.prodigy(0.1, betas=(0.8, 0.99))),
        (["scale_by_adam", {"scale_by_schedule": {"step_size_fn": {"linear_schedule": {
            "init_value": -0.1, "end_value": 0.0, "transition_steps": 9}}}}],
         optax.chain(optax.scale_by_adam(),
                     optax.scale_by_schedule(optax.linear_schedule(-0.1, 0.0, 9)))),
        (["muon"], optax.contrib.muon(0.1, weight_decay_mask=MASKS["matrices"])),
        ([{"masked": {"inner": "adam", "mask": "matrices"}},
          {"masked": {"inner": "sgd", "mask": "rest"}}],
         optax.chain(optax.masked(optax.adam(0.1), MASKS["matrices"]),
                     optax.masked(optax.sgd(0.1), MASKS["rest"]))),
    ],
    ids=lambda value: str(value) if isinstance(value, list) else "by hand",
)  # fmt: skip
def test_a_named_chain_is_the_one_that_python_would_write(chain, by_hand):
    named = optax.chain(*chains.build(chain, AROUND))

    assert updates(named) == updates(by_hand)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", sorted(chains.factories()))
def test_every_factory_is_built_or_refused_by_the_arguments_it_lacks(name):
    """No factory, of this or of a later optax, escapes in another way than a `ConfigError`."""
    problems = {}
    try:
        (made,) = chains.build([name], AROUND)
    except ConfigError as error:
        problems = error.problems

    assert problems or isinstance(made, optax.GradientTransformation)
    assert all(key.startswith(f"optimizer.chain.0.{name}.") for key in problems)
    assert all(text.startswith("missing; expected ") for text in problems.values())


WRONG = {
    "chain.0": [
        (3, "got 3; expected a transformation with its arguments, as {adamw: {b1: 0.8}}"),
        ({"adam": 3}, "got a group of keys (adam); expected a transformation"),
        ({"adam": {}, "clip": {}}, "got a group of keys (adam, clip); expected a transformation"),
        ("adamv", "got 'adamv', which is no transformation of optax or optax.contrib; did you"),
        ("huber_loss", "got 'huber_loss', which is no transformation of optax or optax.contrib"),
        ("qqq", "got 'qqq', which is no transformation of optax or optax.contrib; docs/optimizers"),
    ],
    "chain.0.adamw.bb1": [
        ({"adamw": {"bb1": 0.9}}, "unknown argument; did you mean 'b1'?"),
    ],
    "chain.0.adamw.b1": [
        ({"adamw": {"b1": "fast"}}, "got 'fast'; expected a number"),
        ({"adamw": {"b1": True}}, "got true; expected a number"),
        ({"adamw": {"b1": None}}, "got null; expected a number"),
        ({"adamw": {"b1": [0.9]}}, "got [0.9]; expected a number"),
    ],
    "chain.0.adamw.nesterov": [
        ({"adamw": {"nesterov": 1}}, "got 1; expected true or false"),
    ],
    "chain.0.adamw.mask": [
        ({"adamw": {"mask": "matrix"}},
         "got 'matrix'; expected one of matrices, rest; or a list of names of leaves, as [kernel]"),
    ],
    "chain.0.adam": [
        ({"adam": {"mu_dtype": "float17"}}, "optax refuses it: "),
    ],
    "chain.0.sgd.learning_rate": [
        ({"sgd": {"learning_rate": "1e-3 "}}, "got '1e-3 '; expected a number or a schedule"),
    ],
    "chain.0.sgd.learning_rate.exponential_decay.init_value": [
        ({"sgd": {"learning_rate": {"exponential_decay": {
            "transition_steps": 3, "decay_rate": 0.5}}}}, "missing; expected a number"),
    ],
    "chain.0.sm3.learning_rate": [
        ("sm3", "missing; expected a number, for it takes no schedule: optimizer.lr has no effect"),
    ],
    "chain.0.clip.max_delta": [("clip", "missing; expected a number")],
    "chain.0.scale_by_lion.mode": [
        ({"scale_by_lion": {"mode": "soft"}}, "got 'soft'; expected one of hard, smooth, refined"),
    ],
    "chain.0.adaptive_grad_clip.axis": [
        ({"adaptive_grad_clip": {"clipping": 0.1, "axis": 0.5}}, "got 0.5; expected a whole num"),
    ],
    "chain.0.apply_if_finite.inner": [
        ({"apply_if_finite": {"inner": "adamv", "max_consecutive_errors": 3}}, "got 'adamv'"),
    ],
    "chain.0.apply_if_finite.inner.clip_by_global_norm": [
        ({"apply_if_finite": {"inner": {"clip_by_global_norm": {"max_norm": 1.0}},
                              "max_consecutive_errors": 3}}, "here its norm would depend on the"),
    ],
    "chain.0.stateless.f": [("stateless", "missing; expected what no YAML can hold")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "entry", "words"),
    [(key, entry, words) for key, cases in WRONG.items() for entry, words in cases],
    ids=str,
)
def test_a_wrong_entry_is_told_by_its_key_with_what_is_expected(key, entry, words):
    with pytest.raises(ConfigError) as error:
        chains.build([entry], AROUND)

    assert list(error.value.problems) == [f"optimizer.{key}"]
    assert error.value.problems[f"optimizer.{key}"].startswith(words)


def test_every_problem_of_a_chain_is_in_one_error():
    chain = ["adamv", [{"clip": {"max": 1}}], {"sgd": {"momentum": "high", "nesterov": 3}}]

    with pytest.raises(ConfigError) as error:
        chains.build(chain, AROUND)
    assert list(error.value.problems) == [
        "optimizer.chain.0",
        "optimizer.chain.1.0.clip.max_delta",
        "optimizer.chain.1.0.clip.max",
        "optimizer.chain.2.sgd.momentum",
        "optimizer.chain.2.sgd.nesterov",
    ]


def test_a_learning_rate_applied_twice_is_refused():
    with pytest.raises(ConfigError, match=r"chain\.2: applies the learning rate a second time"):
        chains.build(["adam", "centralize", ["sgd"]], AROUND)


@pytest.mark.parametrize(
    ("changes", "problems"),
    [
        ({"chain": ["adamw"], "weight_decay": 0.1}, ["optimizer.weight_decay"]),
        (
            {"chain": [{"schedule_free_adamw": {"learning_rate": 0.1}}], "ema": 0.9},
            ["optimizer.ema"],
        ),
        ({"chain": ["adamv"]}, ["optimizer.chain.0"]),
        ({"chain": ["scale_by_adam"], "weight_decay": 0.1, "ema": 0.9}, []),
        ({"chain": ["adamw"], "weight_decay": 0.0}, []),
    ],
    ids=str,
)
def test_settings_that_a_chain_has_itself_are_refused_before_anything_is_read(changes, problems):
    try:
        optimizer.check({"weight_decay": 0.0, "ema": None, **changes}, ["encoder", "head"])
        found = []
    except ConfigError as error:
        found = list(error.problems)

    assert found == problems


# --- in a run


def test_a_chain_is_set_and_changed_from_the_command_line():
    changed = compose("optimizer=sgd", "optimizer.chain.0.trace.decay=0.8").optimizer
    chain = "[{clip: {max_delta: 1.0}},{adamw: {b1: 0.8}}]"
    replaced = compose(f"optimizer.chain={chain}", "optimizer.weight_decay=0").optimizer

    assert changed.chain == [{"trace": {"decay": 0.8}}]
    assert replaced.chain == [{"clip": {"max_delta": 1.0}}, {"adamw": {"b1": 0.8}}]


@pytest.mark.parametrize(
    ("chain", "reason"),
    [
        ("[lbfgs]", "lbfgs does without: {lbfgs: {linesearch: null}}"),
        (
            "[{lookahead: {fast_optimizer: sgd, sync_period: 5, slow_step_size: 0.5}}]",
            "no attribute 'fast'",
        ),
    ],
)
def test_what_an_update_cannot_give_is_refused_and_nothing_is_written(
    train, tmp_path, chain, reason
):
    with pytest.raises(ConfigError) as error:
        train("diabetes", "steps=2", f"optimizer.chain={chain}", "optimizer.weight_decay=0",
              f"run_dir={tmp_path / 'run'}")  # fmt: skip

    assert reason in error.value.problems["optimizer.chain"]
    assert not (tmp_path / "run").exists()


def test_the_remedy_for_lbfgs_works(train):
    train("diabetes", "steps=2", "optimizer.chain=[{lbfgs: {linesearch: null}}]",
          "optimizer.weight_decay=0")  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "chain",
    [
        "[polyak_sgd]",
        "[momo]",
        "[adam,reduce_on_plateau]",
        "[{sam: {optimizer: sgd, adv_optimizer: [normalize, sgd]}}]",
    ],
)
def test_an_update_gets_the_loss_where_it_asks_for_it(train, chain):
    train("diabetes", "steps=3", f"optimizer.chain={chain}", "optimizer.weight_decay=0",
          "optimizer.accumulate=2")  # fmt: skip


@pytest.mark.parametrize(
    ("chain", "rate"),
    [
        ("[adam]", None),
        ("[{sgd:{learning_rate:0.5}}]", 0.5),
        ("[[{clip:{max_delta:1.0}},{sgd:{learning_rate:0.5}}]]", 0.5),
        ("[{masked:{inner:{adam:{learning_rate:0.25}},mask:matrices}}]", 0.25),
        ("[{sgd:{learning_rate:{linear_schedule:"
         "{init_value:0,end_value:1,transition_steps:4}}}}]", 0.5),
    ],
)  # fmt: skip
def test_the_metrics_show_the_learning_rate_that_the_chain_gives_itself(chain, rate):
    cfg = compose("experiment=diabetes", f"optimizer.chain={chain}", "optimizer.weight_decay=0")
    own = optimizer.own_rate(cfg.optimizer)
    assert (None if own is None else float(own(2))) == rate
    shown = optimizer.shown_rate(cfg.optimizer, 600)(2)
    assert shown == (own or optimizer.schedule(cfg.optimizer, 600))(2)


def test_a_mask_of_leaf_names_means_those_of_the_nnx_form(train):
    chain = "optimizer.chain=[{adamw:{weight_decay:0.5,mask:[kernel]}}]"
    given = ("diabetes", "steps=2", "stage=linen", "optimizer.weight_decay=0")
    assert train(*given, chain)
    with pytest.raises(ConfigError, match=r"got 'kernels', which no parameter is called; did you"):
        train(*given, chain.replace("kernel", "kernels"))


def test_unknown_parts_and_a_model_that_is_frozen_whole_are_refused(train):
    frozen = ("optimizer.parts.encoder.freeze=true", "optimizer.parts.head.freeze=true")
    with pytest.raises(ConfigError, match="nothing would be trained"):
        train("diabetes", *frozen)
    with pytest.raises(ConfigError, match=r"parts\.torso: the model has no such part; it has enc"):
        train("diabetes", "+optimizer.parts.torso.freeze=true")


def test_without_a_chain_the_family_must_bring_an_optimizer(train):
    with pytest.raises(ConfigError, match="no function `optimizer` to stand in for it"):
        train("diabetes", "steps=2", "optimizer.chain=null", "optimizer.weight_decay=0")


def test_a_function_of_the_family_stands_in_for_the_chain(train, monkeypatch):
    from model import mlp

    options = ("steps=3", "optimizer.weight_decay=0")
    by_name = train("diabetes", *options, "optimizer.chain=[adam]")
    mine = lambda cfg, schedule, view: optax.adam(schedule)  # noqa: E731
    monkeypatch.setattr(mlp, "optimizer", mine, raising=False)
    own = train("diabetes", *options, "optimizer.chain=null")

    metrics = "metrics.jsonl"
    assert (own / metrics).read_bytes() == (by_name / metrics).read_bytes()


def test_evaluation_uses_the_average_that_schedule_free_keeps():
    params = {"encoder": {"w": jnp.ones(3)}, "head": {"w": jnp.ones(3)}}
    free = optax.contrib.schedule_free_sgd(0.1)
    moves = optax.partition(
        {"on": free, "off": optax.set_to_zero()}, {"encoder": "on", "head": "off"}
    )
    state = moves.init(params)
    for _ in range(3):
        change, state = moves.update(params, state, params)
        params = optax.apply_updates(params, change)
    alone = {"w": params["encoder"]["w"]}
    expected = optax.contrib.schedule_free_eval_params(
        state.inner_states["on"].inner_state._replace(
            z={"w": state.inner_states["on"].inner_state.z["encoder"]["w"]}
        ),
        alone,
    )

    evaluated = optimizer.evaluated(state, params)
    np.testing.assert_array_equal(evaluated["encoder"]["w"], expected["w"])
    assert (evaluated["encoder"]["w"] != params["encoder"]["w"]).all()
    assert (evaluated["head"]["w"] == params["head"]["w"]).all()


# --- runs of earlier versions

EARLIER = {
    "adamw": {"b1": 0.9, "b2": 0.99, "eps": 1e-8, "momentum": None, "weight_decay": 0.05},
    "lion": {"b1": 0.9, "b2": 0.99, "eps": None, "momentum": None, "weight_decay": 0.5},
    "sgd": {"b1": None, "b2": None, "eps": None, "momentum": 0.9, "weight_decay": 0.0},
    "adafactor": {"b1": None, "b2": None, "eps": 1e-30, "momentum": None, "weight_decay": 0.0},
}


@pytest.mark.parametrize("name", EARLIER)
def test_an_optimizer_of_an_earlier_run_is_the_one_of_its_name(name):
    now = compose(f"optimizer={name}").optimizer
    rest = {key: getattr(now, key) for key in ("lr", "schedule", "warmup", "end_lr_factor")}
    rest |= {key: getattr(now, key) for key in ("clip_norm", "accumulate", "ema")}
    half = {"lr_factor": 1.0, "freeze": False}
    old = {"name": name, **EARLIER[name], **rest, "encoder": half, "head": half}

    group = upgraded({"optimizer": old})["optimizer"]
    parts = {part: Part(**group["parts"][part]) for part in group["parts"]}
    assert Optimizer(**{**group, "parts": parts}) == now
    assert upgraded({"optimizer": group})["optimizer"] == group
