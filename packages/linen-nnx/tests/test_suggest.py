"""`suggest` against pairs of models with known answers: nothing wrong, little left open."""

import dataclasses
import functools
import re
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pairs
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pairs import PAIRS, stack_of
from random_twins import random_twin

from linen_nnx import Ladder, Part, RuleBook, RuleError, Twin, TwinError, bisect, suggest
from linen_nnx.infer.dataflow import flow
from linen_nnx.infer.trace import LeafSpec, Trace, trace_linen, trace_nnx


@functools.cache
def pair(name):
    return PAIRS[name]()


@functools.cache
def book_of(name):
    return suggest(pair(name).twin)


def numbered(leaves):
    """Leaves in which every element has a number of its own."""
    sizes = np.cumsum([0, *(int(np.prod(leaf.shape)) for leaf in leaves.values())])
    return {
        path: np.arange(start, start + np.prod(leaf.shape, dtype=int)).reshape(leaf.shape)
        for (path, leaf), start in zip(leaves.items(), sizes, strict=False)
    }


def outcome(twin, book, truth):
    """The leaves that a book translates, to what they become, and those that it gets wrong."""
    given = numbered(trace_linen(twin).leaves)
    due = truth.to_nnx(given)
    got = book.to_nnx(given, partial=True)
    wrong = {path for path in got if path not in due or not np.array_equal(got[path], due[path])}
    return due, got, wrong


def same_leaves(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[p], right[p]) for p in left)


# The answers


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", PAIRS)
def test_no_rule_is_wrong_and_what_the_evidence_leaves_open_stays_open(name):
    due, got, wrong = outcome(pair(name).twin, book_of(name), pair(name).truth)

    assert not wrong
    assert set(book_of(name).unassigned) == set(pair(name).open)
    assert set(due) - set(got) == set(due) & set(pair(name).open)


@pytest.mark.long
def test_nearly_all_renames_and_most_leaves_that_need_an_op_are_assigned():
    assigned, all_leaves = {True: 0, False: 0}, {True: 0, False: 0}
    for name in PAIRS:
        if name == "unused_parameters":
            continue  # no evidence can tell its leaves apart; see the test of its own
        truth, got = pair(name).truth, outcome(pair(name).twin, book_of(name), pair(name).truth)[1]
        for move in truth.plan(trace_linen(pair(name).twin).leaves, "nnx").moves:
            renamed = not move.rule.ops
            for path in move.targets:
                all_leaves[renamed] += 1
                assigned[renamed] += path in got

    assert assigned[True] >= 0.98 * all_leaves[True] > 100
    assert assigned[False] >= 0.9 * all_leaves[False] > 50


@pytest.mark.parametrize("name", [name for name in PAIRS if PAIRS[name]().blind])
def test_leaves_that_no_output_sees_are_named_as_such(name):
    notes = " ".join(rule.note for rule in book_of(name).rules)
    named = re.findall(r"no output sees ([^:]*):", notes)
    shown = {path for text in named for path in text.split(", ")}

    assert shown == {
        path if path in shown else re.sub(r"\d+", "*", path) for path in pair(name).blind
    }


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.integers(0, 10**6))
def test_what_is_assigned_never_changes_what_a_random_model_computes(seed):
    assert_sound(seed, rewritten=False)


REWRITTEN = [0, 2, 3, 10, 111]
LATER = [pytest.param(seed, marks=pytest.mark.long) for seed in {*range(200)} - {*REWRITTEN}]


@pytest.mark.parametrize("seed", [*REWRITTEN, *LATER])
def test_nor_where_its_nodes_are_written_in_another_way(seed):
    assert_sound(seed, rewritten=True)


def assert_sound(seed, rewritten):
    """Random leaves, translated by the suggested book, give what they give in Linen."""
    twin, truth, call_linen, call_nnx = random_twin(seed, rewritten)
    book = suggest(twin)
    random = np.random.default_rng(seed)
    leaves = {
        path: random.normal(size=leaf.shape) for path, leaf in trace_linen(twin).leaves.items()
    }

    translated = {**truth(leaves), **book.to_nnx(leaves, partial=True)}

    with jax.enable_x64(True):
        inputs = [random.normal(size=array.shape) for array in twin.inputs()]
        for one, two in zip(
            call_linen(leaves, *inputs), call_nnx(translated, *inputs), strict=True
        ):
            np.testing.assert_allclose(one, two, rtol=1e-6, atol=1e-9)


# What is refused


@pytest.mark.parametrize(
    ("twin", "reason"),
    [
        (lambda: pairs.standard_deviation_for_variance(), "outputs of the twins differ"),
        (lambda: stack_of(2, 3).twin, "the sides use different leaves"),
    ],
    ids=["value-changing port", "another layer"],
)
def test_models_that_compute_something_else_get_no_rules_but_candidates(twin, reason):
    book = suggest(twin())

    assert not book.rules
    assert [note for note in book.notes if reason in note]
    assert all("`notes` say why" in known.reason for known in book.unassigned.values())
    assert any(known.candidates for known in book.unassigned.values())


class OnePlus(nn.Module):
    """A norm that starts with zeros; its port multiplies by the scale alone."""

    @nn.compact
    def __call__(self, x):
        scale = self.param("scale", nn.initializers.zeros, (4,))
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * (1 + scale)


class Kept(nn.Module):
    """Statistics that this call does not use, and its port holds in another form."""

    @nn.compact
    def __call__(self, x):
        self.variable("ema", "sums", jnp.zeros, (4, 3))
        return nn.Dense(3, name="out")(OnePlus(name="norm")(x))


class KeptPort(nnx.Module):
    def __init__(self, rngs):
        self.norm, self.out = nnx.RMSNorm(4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)
        self.totals = nnx.Variable(jnp.zeros((3, 4)))

    def __call__(self, x):
        return self.out(self.norm(x))


def test_what_holds_the_same_in_another_form_stays_open_and_the_rest_is_assigned():
    book = suggest(Twin(Kept, KeptPort, lambda: (jnp.ones((2, 4)),)))

    assert [str(rule) for rule in book.rules] == ["`params/out/{leaf}` <-> `out/{leaf}`"]
    why = {path: known.reason for path, known in book.unassigned.items()}
    assert set(why) == {"params/norm/scale", "norm/scale", "ema/sums", "totals"}
    assert "`norm/scale` holds the same in another form" in why["params/norm/scale"]
    assert "where this is 0 and that is 1" in why["params/norm/scale"]
    assert book.unassigned["params/norm/scale"].likely is None
    assert str(book.unassigned["ema/sums"].likely) == "`ema/sums` <-> `totals`"


class Flattened(nn.Module):
    """Two tables, and a product of features that are flattened place by place."""

    @nn.compact
    def __call__(self, i):
        x = jnp.concatenate(
            [nn.Embed(5, 3, name="a")(i[:, :2]), nn.Embed(4, 3, name="b")(i[:, 2:])], 1
        )
        return nn.Dense(2, name="out")(nn.Dense(3, name="mix")(x).reshape(len(i), -1))


class FlattenedPort(nnx.Module):
    """One table of both, and a product of features that are flattened channel by channel."""

    def __init__(self, rngs):
        self.table = nnx.Embed(9, 3, rngs=rngs)
        self.mix, self.out = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(12, 2, rngs=rngs)

    def __call__(self, i):
        x = self.mix(self.table(i + jnp.array([0, 0, 5, 5])))
        return self.out(x.swapaxes(1, 2).reshape(len(i), -1))


def test_an_order_that_the_constants_of_open_leaves_hide_stays_open():
    tokens = jnp.array([[3, 1, 2, 1], [4, 0, 3, 0]])
    book = suggest(Twin(Flattened, FlattenedPort, lambda: (tokens,)))

    assert "params/out/kernel" not in [rule.linen[0].text for rule in book.rules]
    assert "the order of its elements is not proven" in book.unassigned["params/out/kernel"].reason


class Quarters(nn.Module):
    """Four kernels, which the port has as one: two joined by columns, both of these by rows."""

    @nn.compact
    def __call__(self, x, h):
        return [
            nn.Dense(2, use_bias=False, name=a)(x) + nn.Dense(2, use_bias=False, name=b)(h)
            for a, b in ("ab", "cd")
        ]


class QuartersPort(nnx.Module):
    def __init__(self, rngs):
        self.joint = nnx.Linear(7, 4, use_bias=False, rngs=rngs)

    def __call__(self, x, h):
        return jnp.split(self.joint(jnp.concatenate([x, h], -1)), 2, axis=-1)


def test_a_leaf_that_no_ops_make_of_its_parts_names_them():
    book = suggest(Twin(Quarters, QuartersPort, lambda: (jnp.ones((5, 3)), jnp.ones((5, 4)))))

    parts = tuple(f"params/{name}/kernel" for name in "abcd")
    assert set(book.unassigned) == {*parts, "joint/kernel"}
    assert book.unassigned["joint/kernel"].candidates == parts
    assert all("no ops say how" in known.reason for known in book.unassigned.values())
    assert not any(known.likely for known in book.unassigned.values())


class Averages(nn.Module):
    """Two averages that no output reads and training updates."""

    @nn.compact
    def __call__(self, x, train=False):
        mean = self.variable("ema", "mean", jnp.zeros, (4, 3))
        most = self.variable("ema", "most", jnp.zeros, (4, 3))
        y = nn.Dense(3, name="out")(x)
        if train:
            mean.value = 0.9 * mean.value + 0.1 * x.T @ y
            most.value = 0.8 * most.value + 0.1 * x.T @ y
        return y


class AveragesPort(nnx.Module):
    def __init__(self, rngs):
        self.out = nnx.Linear(4, 3, rngs=rngs)
        self.one, self.two = (nnx.Variable(jnp.zeros((3, 4))) for _ in range(2))
        self.deterministic = False

    def __call__(self, x):
        y = self.out(x)
        if not self.deterministic:
            self.two[...] = 0.9 * self.two[...] + 0.1 * y.T @ x
            self.one[...] = 0.8 * self.one[...] + 0.1 * y.T @ x
        return y


def test_what_training_updates_tells_averages_apart():
    book = suggest(Twin(Averages, AveragesPort, lambda: (jnp.ones((2, 4)),)))

    found = {rule.linen[0].text: rule.nnx[0].text for rule in book.rules}
    assert not book.unassigned
    assert (found["ema/mean"], found["ema/most"]) == ("two", "one")


def test_another_activation_leaves_open_what_it_hides():
    pair = stack_of(2, 2, act=nnx.sigmoid)

    assert not outcome(pair.twin, suggest(pair.twin), pair.truth)[2]


def test_a_bias_that_the_port_lacks_stays_open_and_the_rest_is_assigned():
    pair = stack_of(2, 2, bias=False)
    book = suggest(pair.twin)

    due, got, wrong = outcome(pair.twin, book, pair.truth)

    assert not wrong and got.keys() == due.keys()
    assert set(book.unassigned) == {"params/Dense_1/bias", "params/Dense_3/bias"}
    assert "no leaf for it" in book.unassigned["params/Dense_1/bias"].reason


def test_a_slightly_different_epsilon_does_not_hide_the_mapping():
    pair = stack_of(2, 2, epsilon=1e-5)
    due, got, wrong = outcome(pair.twin, suggest(pair.twin), pair.truth)

    assert not wrong and got.keys() == due.keys()


def test_where_order_and_names_disagree_neither_decides():
    book = suggest(pairs.names_that_disagree_with_the_order())

    assert not book.rules
    assert "disagree" in book.unassigned["params/left/kernel"].reason


@pytest.mark.parametrize(
    ("linen", "nnx_", "options", "issue"),
    [
        (nn.WeightNorm, nnx.WeightNorm, {}, "#5577"),
        (nn.SpectralNorm, nnx.SpectralNorm, {"update_stats": False}, "#5576"),
    ],
    ids=["WeightNorm", "SpectralNorm"],
)
def test_lossy_wrappers_are_refused_with_the_reason(linen, nnx_, options, issue):
    book = suggest(pairs.wrapped(linen, nnx_, **options))

    assert [str(rule) for rule in book.rules] == ["`params/out/{leaf}` <-> `out/{leaf}`"]
    assert {path for path, known in book.unassigned.items() if issue in known.reason} == set(
        book.unassigned
    )
    assert {"params/into/kernel", "wrapped/layer_instance/kernel"} <= set(book.unassigned)


def test_the_gru_bias_without_a_home_is_refused_with_the_reason():
    known = book_of("gru_cells").unassigned["params/GRUCell_0/hn/bias"]

    assert "#5594" in known.reason and known.side == "linen"


# The book


def test_rules_carry_their_evidence_and_its_margin():
    for rule in book_of("stacked_experts").rules:
        assert re.search(r"\d+ uses? in the same dataflow, \d+ in the same order", rule.note)
        assert re.search(r"fingerprints equal \((exactly|to \de-\d+)\)", rule.note)
        assert re.search(r", the nearest other 0\.\d+ away", rule.note) or "router" in str(rule)


def test_ties_say_what_broke_them():
    notes = [rule.note for rule in book_of("interchangeable_towers").rules]
    names = [rule.note for rule in book_of("unused_parameters").rules if "old_scale" in str(rule)]

    assert all("by order of first use and names" in note for note in notes)
    assert names == ["not used in the forward pass: no evidence but the equal name"]


def test_repeated_patterns_are_written_once():
    book = book_of("keys_before_queries")

    assert "`params/LayerNorm_{i}/{leaf}` <-> `norms/{i}/{leaf}`" in map(str, book.rules)
    assert len(book.rules) == 9


def test_an_incomplete_book_raises_naming_each_open_leaf_unless_partial():
    book = book_of("unused_parameters")
    leaves = numbered(trace_linen(pair("unused_parameters").twin).leaves)

    with pytest.raises(RuleError) as caught:
        book.to_nnx(leaves)
    assert len(caught.value.problems) == len(book.unassigned) == 4
    assert "`params/one` is unassigned" in str(caught.value)
    assert "candidates: due, uno" in str(caught.value)
    with pytest.raises(RuleError, match="not complete"):
        book.to_linen({})
    assert set(book.to_nnx(leaves, partial=True)) == {"dense/kernel", "dense/bias", "old_scale"}


def test_a_book_survives_being_written_and_read(tmp_path):
    for name in ("unused_parameters", "fused_qkv_under_scan"):
        book_of(name).save(tmp_path / "rules.yaml")

        assert RuleBook.load(tmp_path / "rules.yaml") == book_of(name)


def test_an_open_leaf_that_cannot_be_read_is_named(tmp_path):
    known = {"leaf": "a", "side": "left", "reason": "", "candidates": []}
    content = {"version": 1, "rules": [], "unassigned": [known, {"leaf": "b"}]}

    with pytest.raises(RuleError) as caught:
        RuleBook.from_dict(content)
    assert "leaf 1: `side` is linen or nnx, got 'left'" in str(caught.value)
    assert "leaf 2: expected a mapping with leaf, side, reason, candidates" in str(caught.value)


def test_suggesting_again_gives_the_same_book():
    assert suggest(pair("unused_parameters").twin) == book_of("unused_parameters")


# The dataflow


def slots_of(function, leaves, *inputs):
    """What `flow` finds: for each slot the leaves it holds and its (N, K)."""
    shapes = {
        name: LeafSpec(shape, np.dtype("float32"), "params") for name, shape in leaves.items()
    }
    specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in shapes.values()]
    jaxpr = jax.make_jaxpr(
        lambda values, *xs: function(dict(zip(leaves, values, strict=True)), *xs)
    )(specs, *inputs)
    found = flow(Trace("linen", jaxpr, shapes, inputs, (), {}))
    names = np.repeat(list(leaves), [int(np.prod(shape)) for shape in leaves.values()])
    return found, [
        (*sorted(set(names[slot.numbers().ravel()])), slot.shape) for slot in found.slots
    ]


def test_first_uses_are_seen_in_order_through_every_transform():
    @jax.custom_jvp
    def bent(x, w):
        return x @ w

    bent.defjvp(lambda primals, tangents: (bent(*primals), bent(tangents[0], primals[1])))

    def forward(p, x):
        x = jax.jit(lambda x: x @ p["f"])(x)
        x = jax.checkpoint(lambda x: x @ p["e"])(x)
        x = bent(x, p["d"])
        x = jax.lax.scan(lambda x, w: (x @ w, None), x, jnp.stack([p["c"], p["b"]]))[0]
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ p["a"], lambda x: x, x)
        x = jax.lax.while_loop(lambda x: (x * p["h"]).sum() < 3, lambda x: x + p["g"], x)
        return jax.lax.fori_loop(0, 2, lambda k, x: x + p["i"][k], x)

    shapes = dict.fromkeys("abcdef", (2, 2)) | {"g": (2,), "h": (2,), "i": (2, 2)}
    _, found = slots_of(forward, shapes, jnp.ones((3, 2)))

    assert [name for name, *_ in found] == [*"fedcba", "h", "g", "i", "i"]
    assert [shape for *_, shape in found] == [(2, 2)] * 6 + [(2, 1)] * 4


@pytest.mark.parametrize(
    "forward",
    [
        lambda p, x: jnp.split(x @ p["w"] + p["b"], 2, -1),
        lambda p, x: [x @ p["w"][:, :2] + p["b"][:2], x @ p["w"][:, 2:] + p["b"][2:]],
        lambda p, x: list(jnp.moveaxis((x @ p["w"] + p["b"]).reshape(-1, 2, 2), 1, 0)),
        lambda p, x: list(
            jnp.einsum("bi,ijo->jbo", x, p["w"].reshape(3, 2, 2)) + p["b"].reshape(2, 1, 2)),
        lambda p, x: [x.astype("bfloat16") @ w + b for w, b in zip(
            jnp.split(p["w"].astype("bfloat16").T.T, 2, 1), p["b"].reshape(2, 2), strict=True)],
    ],
)  # fmt: skip
def test_a_fused_leaf_is_seen_as_the_parts_that_are_used(forward):
    def pooled(p, x):
        return [part.mean() for part in forward(p, x)]

    found, names = slots_of(pooled, {"w": (3, 4), "b": (4,)}, jnp.ones((5, 3)))

    kernels = [slot.numbers() for slot in found.slots if slot.shape[1] > 1]
    assert sorted(names) == [("b", (2, 1)), ("b", (2, 1)), ("w", (2, 3)), ("w", (2, 3))]
    assert sorted(ids[0, 0] for ids in kernels) == [0, 2]
    assert all((np.diff(ids, axis=1) == 4).all() for ids in kernels)


def test_what_flows_into_a_use_is_known():
    def forward(p, x, y):
        return jnp.tanh(x @ p["a"] + p["b"]) @ p["c"] + y @ p["d"]

    shapes = {"a": (2, 2), "b": (2,), "c": (2, 2), "d": (2, 2)}
    found, names = slots_of(forward, shapes, jnp.ones((3, 2)), jnp.ones((3, 2)))

    above = {
        name: {names[k][0] for k in np.flatnonzero(found.above[number])}
        for number, (name, *_) in enumerate(names)
    }
    assert above == {"a": set(), "b": {"a"}, "c": {"a", "b"}, "d": set()}


# The twin


def test_a_twin_keeps_its_arguments_and_is_loaded_by_file_or_module(tmp_path, monkeypatch):
    twin = pair("unused_parameters").twin
    (tmp_path / "my_twins.py").write_text(
        "from linen_nnx import Twin\nimport neighbour\n"
        "mine = Twin(linen=1, nnx=2, inputs=3, call_linen=4)\nother = 5\n"
    )
    (tmp_path / "neighbour.py").write_text("")
    monkeypatch.chdir(tmp_path)

    by_file, by_module = Twin.load(f"{tmp_path}/my_twins.py:mine"), Twin.load("my_twins:mine")

    assert by_file == by_module == Twin(1, 2, 3, call_linen=4)
    assert (by_file.linen, by_file.inputs, by_file.call_linen, by_file.call_nnx) == (1, 3, 4, None)
    assert twin.call_linen is twin.call_nnx is twin.init_linen is None


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("my_twins.py", "given as `path/to/file.py:NAME` or `package.module:NAME`"),
        ("nowhere.py:mine", "there is no file nowhere.py"),
        ("no.such.module:mine", "No module named 'no'"),
        ("my_twins.py:mime", "did you mean `mine`"),
        ("my_twins.py:other", "`other` in my_twins.py is a int, expected a Twin"),
        ("maker.py:a/b", "maker.py has no `a/b`: it has no twin a/b"),
        ("broken.py:mine", "import of the file broken.py failed: ZeroDivisionError"),
    ],
)
def test_a_twin_that_cannot_be_loaded_says_why(tmp_path, monkeypatch, where, message):
    (tmp_path / "my_twins.py").write_text(
        "from linen_nnx import Twin\nmine = Twin(1, 2, 3)\nother = 5\n"
    )
    (tmp_path / "broken.py").write_text("1 / 0\n")
    (tmp_path / "maker.py").write_text(
        "def __getattr__(name):\n    raise AttributeError(f'it has no twin {name}')\n"
    )
    monkeypatch.chdir(tmp_path)

    with pytest.raises(TwinError, match=re.escape(message)):
        Twin.load(where)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": lambda: pairs.X}, "inputs() must return the tuple of a call's arguments"),
        ({"linen": lambda: 1 / 0}, "linen() of the twin failed: ZeroDivisionError"),
        ({"nnx": lambda rngs: 1 / 0}, "nnx(rngs) of the twin failed: ZeroDivisionError"),
        ({"call_nnx": lambda model, x: model(x, x)}, "the nnx call of the twin failed: TypeError"),
    ],
)
def test_a_twin_that_cannot_be_traced_says_which_part(change, message):
    twin = pair("unused_parameters").twin
    parts = {"linen": twin.linen, "nnx": twin.nnx, "inputs": twin.inputs, **change}

    with pytest.raises(TwinError, match=re.escape(message)):
        suggest(Twin(**parts))


def test_plain_values_may_stand_among_the_inputs_and_arrays_outside_variables_are_constants():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x, double):
            return nn.Dense(2)(x * jnp.arange(3.0)) * (2 if double else 1)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.ramp = jnp.arange(3.0)
            self.dense = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x, double):
            return self.dense(x * self.ramp) * (2 if double else 1)

    twin = Twin(Linen, lambda rngs: Nnx(rngs), lambda: (jnp.ones((2, 3)), True))
    book = suggest(twin)

    assert trace_nnx(twin).bare == ("ramp",)
    assert [str(rule) for rule in book.rules] == ["`params/Dense_0/{leaf}` <-> `dense/{leaf}`"]
    assert not book.unassigned
    assert [note for note in book.notes if "need no rule: ramp" in note]


@pytest.mark.parametrize("small", [1000, 0])  # as one program, and equation by equation
def test_a_model_that_has_no_gradient_is_a_reason_and_no_error(small, monkeypatch):
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y * 2, nn.Dense(2)(x) ** 2)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return jax.lax.while_loop(lambda y: y.sum() < 9, lambda y: y * 2, self.dense(x) ** 2)

    monkeypatch.setattr("linen_nnx.infer.float64._SMALL", small)
    book = suggest(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (jnp.ones((2, 3)),)))

    assert not book.rules
    assert {"params/Dense_0/kernel", "dense/kernel"} <= set(book.unassigned)
    assert [note for note in book.notes if "could not be run in float64" in note]


def test_complex_outputs_tell_equal_shapes_apart():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            one, two = (self.param(name, nn.initializers.ones, (3, 3)) for name in "ab")
            return jnp.exp(1j * (x @ one)) @ two

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.last, self.start = nnx.Param(jnp.ones((3, 3))), nnx.Param(jnp.ones((3, 3)))

        def __call__(self, x):
            return jnp.exp(1j * (x @ self.start[...])) @ self.last[...]

    rules = suggest(Twin(Linen, Nnx, lambda: (jnp.ones((2, 3)),))).rules

    assert [str(rule) for rule in rules] == ["`params/a` <-> `start`", "`params/b` <-> `last`"]
    assert all("the nearest other" in rule.note for rule in rules)


def test_importing_the_library_imports_no_jax():
    code = "import sys, linen_nnx; assert 'jax' not in sys.modules; assert linen_nnx.suggest"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_that_noise_breaks_is_run_on_its_own_inputs():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="a")(jnp.sqrt(-x) + 1 + jnp.arange(4.0))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.b = nnx.Linear(4, 4, rngs=rngs)

        def __call__(self, x):
            return self.b(jnp.sqrt(-x) + 1 + jnp.arange(4.0))

    book = suggest(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (jnp.zeros((2, 4)),)))

    assert not book.unassigned and book.rules[0].linen[0].text == "params/a/{leaf}"


class Noisy(nn.Module):
    """Draws in evaluation, too."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(nn.relu(nn.Dense(5)(x)))
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


class NoisyPort(nnx.Module):
    def __init__(self, rngs):
        self.first, self.last = nnx.Linear(4, 5, rngs=rngs), nnx.Linear(5, 3, rngs=rngs)
        self.rngs = rngs

    def __call__(self, x):
        x = self.last(nnx.relu(self.first(x)))
        return x + jax.random.normal(self.rngs.noise(), x.shape)


def test_models_that_draw_in_evaluation_draw_the_same():
    twin = Twin(Noisy, NoisyPort, lambda: (jnp.ones((2, 4)),))
    book = suggest(twin)
    assert not book.unassigned
    assert [str(pair.linen) for pairing in book.draws for pair in pairing.pairs] == ["noise"]
    assert any("draws random numbers in this call" in note for note in book.notes)
    assert bisect(twin, book).first is None


def test_the_draws_of_several_parts_are_paired():
    part = Part(lambda: nn.Dropout(0.5), lambda rngs: nnx.Dropout(0.5, rngs=rngs))
    ladder = Ladder(
        parts={"one": part, "two": part},
        forward=lambda parts, x, train=False: parts.one(
            parts.two(x, deterministic=not train) + 1, deterministic=not train
        ),
        inputs=lambda: (jnp.ones((2, 4)),),
    )
    (pairing,) = suggest(ladder.twin).draws
    found = {str(pair.linen): str(pair.nnx) for pair in pairing.pairs}
    assert found == {"dropout/one": "one/rngs", "dropout/two": "two/rngs"}


STAGES = ("linen", "nnx")


@dataclasses.dataclass
class Output:
    """No pytree."""

    logits: jax.Array


class Shifted(nn.Module):
    """Adds a table that it computes, which its port keeps; returns a class of its own."""

    @nn.compact
    def __call__(self, x, train):
        return Output(nn.Dropout(0.5, deterministic=not train)(nn.Dense(3)(x)) + jnp.arange(3.0))


class ShiftedPort(nnx.Module):
    def __init__(self, rngs):
        self.out, self.table = nnx.Linear(4, 3, rngs=rngs), nnx.Variable(jnp.arange(3.0))
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return Output(self.drop(self.out(x)) + self.table[...])


def test_draws_beside_a_table_of_nnx_and_in_an_output_that_is_no_pytree_are_paired():
    book = suggest(Twin(Shifted, ShiftedPort, lambda: (jnp.ones((2, 4)),)))

    (pairing,) = book.draws
    assert [(str(pair.linen), str(pair.nnx)) for pair in pairing.pairs] == [
        ("dropout/Dropout_0", "drop/rngs")
    ]


def test_a_table_that_nnx_alone_keeps_is_among_the_variables_of_its_stage():
    x = jnp.ones((2, 4))
    twin = Twin(Shifted, ShiftedPort, lambda: (x,))
    ladder = Ladder(twin, suggest(twin))
    linen, nnx_ = (ladder.at(name).init(jax.random.key(0), x, train=False) for name in STAGES)

    np.testing.assert_array_equal(nnx_["Variable"]["table"], jnp.arange(3.0))
    one, two = (
        ladder.at(name).apply(variables, x, train=False).logits
        for name, variables in zip(STAGES, (linen, nnx_), strict=True)
    )
    np.testing.assert_array_equal(one, two)


class Unused(nn.Module):
    """A head whose output nobody uses: in training it updates the statistics of its norm."""

    @nn.compact
    def __call__(self, x, train=False):
        aside = nn.Dense(5)(x), nn.Dense(5)(x)
        for head in aside:
            nn.BatchNorm(use_running_average=not train)(nn.silu(head))
        return nn.Dense(3)(x)


class UnusedPort(nnx.Module):
    def __init__(self, *, rngs):
        self.out = nnx.Linear(4, 3, rngs=rngs)
        self.heads = nnx.List([nnx.Linear(4, 5, rngs=rngs) for _ in range(2)])
        self.norms = nnx.List([nnx.BatchNorm(5, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for head, norm in zip(self.heads, self.norms, strict=True):
            norm(nnx.silu(head(x)))
        return self.out(x)


def test_what_only_training_sees_is_proven_there_and_the_rest_is_likely_by_its_module():
    x = jax.random.normal(jax.random.key(0), (6, 4))
    book = suggest(Twin(Unused, lambda rngs: UnusedPort(rngs=rngs), lambda: (x,)))

    found = {pattern.text for rule in book.rules for pattern in rule.linen}
    assert {"batch_stats/BatchNorm_{i}/mean", "batch_stats/BatchNorm_{i}/var"} <= found
    assert any("proven by what training updates" in note for note in book.notes)
    likely = {
        f"{open_.likely.linen[0].text} -> {open_.likely.nnx[0].text}"
        for open_ in book.unassigned.values()
    }
    assert likely == {
        f"params/BatchNorm_{k}/{leaf} -> norms/{k}/{leaf}"
        for k in range(2)
        for leaf in ("scale", "bias")
    }
