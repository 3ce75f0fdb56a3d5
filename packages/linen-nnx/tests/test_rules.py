"""The rule book: its laws over random trees and books, and each of its errors."""

import contextlib
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from linen_nnx import RuleBook, RuleError
from linen_nnx.book.grammar import parse_rule
from linen_nnx.book.index import Index
from linen_nnx.book.packing import packed
from linen_nnx.book.patterns import Pattern
from linen_nnx.book.rules import Unassigned
from linen_nnx.book.specs import Mismatch
from linen_nnx.book.tree import flatten, unflatten

DTYPES = [
    np.float32, np.float16, np.int32, np.uint8, np.bool_, np.complex64,
    ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.int4,
]  # fmt: skip
JAX_DTYPES = [np.float32, ml_dtypes.bfloat16, np.int32]


def book(*rules):
    return RuleBook.from_dict({"version": 1, "rules": list(rules)})


def same_bits(left, right):
    assert set(left) == set(right)
    for path, leaf in left.items():
        one, two = np.asarray(leaf), np.asarray(right[path])
        assert one.dtype == two.dtype and one.shape == two.shape, path
        assert one.tobytes() == two.tobytes(), path
    return True


def zeros(*shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def numbers(*shape, start=0):
    return np.arange(start, start + np.prod(shape), dtype=np.float32).reshape(shape)


def problems(call, *args, **kwargs):
    """The problems of the one RuleError that a call raises, as text."""
    with pytest.raises(RuleError) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, ValueError)
    for problem in caught.value.problems:
        assert problem in str(caught.value)
    return "\n".join(caught.value.problems)


# Laws


@st.composite
def rule_and_leaves(draw, number, dtypes):
    """One random invertible rule and Linen leaves that it matches."""
    dtype = draw(st.sampled_from(dtypes))
    rank = draw(st.integers(1, 3))
    layers = draw(st.integers(1, 12))
    stacked = draw(st.sampled_from(["neither", "linen", "nnx", "both list"]))
    parts = draw(st.sampled_from(["neither", "linen", "nnx"]))
    sizes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))
    shape = draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank))
    split = draw(st.integers(0, rank - 1))
    ops, cut = [], {}
    if parts == "nnx":
        shape[split] = sum(sizes)
    shapes = [tuple(shape)]
    if parts == "linen":
        shapes = [(*shape[:split], size, *shape[split + 1 :]) for size in sizes]
    if stacked == "linen":
        axis = draw(st.integers(-rank - 1, rank))
        ops.append({"op": "stack", "capture": "i", "axis": axis})
        where = axis % (rank + 1)
        shapes = [(*s[:where], layers, *s[where:]) for s in shapes]
    if parts != "neither":
        cut = {"op": "concat", "axis": draw(st.sampled_from([split, split - rank]))}
        if len(set(sizes)) > 1 or draw(st.booleans()):
            cut["sizes"] = sizes
    if parts == "linen":
        ops.append(cut)
        shape[split] = sum(sizes)
    if parts == "nnx":
        ops.append(cut)
    elif draw(st.booleans()):
        whole = [int(np.prod(shape))] if draw(st.booleans()) else [-1]
        ops.append({"op": "reshape", "linen": shape, "nnx": whole})
        rank = 1
    if draw(st.booleans()):
        ops.append({"op": "transpose", "perm": draw(st.permutations(range(rank)))})
    if stacked == "nnx":
        ops.append({"op": "stack", "capture": "i", "axis": draw(st.integers(0, rank))})
    letters = {"linen": "abcd", "nnx": "wxyz"}
    many = {"linen": stacked in ("nnx", "both list"), "nnx": stacked in ("linen", "both list")}
    pattern = {}
    for side in ("linen", "nnx"):
        stem = ("params/" if side == "linen" else "") + f"r{number}"
        layer = "/Block_{i}" if many[side] else ""
        pattern[side] = f"{stem}{layer}/kernel"
        if parts == side:
            names = letters[side][: len(sizes)]
            pattern[side] = [f"{stem}{layer}/{name}/kernel" for name in names]
    rule = {**pattern, **({"ops": ops} if ops else {})}
    linen = pattern["linen"] if parts == "linen" else [pattern["linen"]]
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    leaves = {}
    for text, size in zip(linen, shapes, strict=True):
        for i in range(layers if many["linen"] else 1):
            values = random.integers(0, 2, size) if dtype == np.bool_ else random.normal(size=size)
            leaves[text.replace("{i}", str(i))] = np.asarray(values * 3).astype(dtype)
    return rule, leaves


@st.composite
def books_and_leaves(draw, dtypes=tuple(DTYPES)):
    pairs = [draw(rule_and_leaves(k, dtypes)) for k in range(draw(st.integers(1, 4)))]
    leaves = {path: leaf for _, some in pairs for path, leaf in some.items()}
    return book(*(rule for rule, _ in pairs)), leaves


@settings(deadline=None, max_examples=200)
@given(books_and_leaves())
def test_to_linen_inverts_to_nnx_bit_for_bit(pair):
    rules, leaves = pair
    assert rules.invertible
    there = rules.to_nnx(leaves)
    same_bits(rules.to_linen(there, target=leaves), leaves)
    same_bits(rules.to_nnx(rules.to_linen(there), target=there), there)


@pytest.mark.long
@settings(deadline=None, max_examples=15)
@given(books_and_leaves(dtypes=tuple(JAX_DTYPES)))
def test_the_inverse_holds_for_jax_arrays_and_under_jit(pair):
    rules, leaves = pair
    arrays = {path: jnp.asarray(leaf) for path, leaf in leaves.items()}
    there = jax.jit(rules.to_nnx)(arrays)
    same_bits(there, rules.to_nnx(leaves))
    same_bits(jax.jit(rules.to_linen)(there), leaves)
    assert all(isinstance(leaf, jax.Array) for leaf in rules.to_nnx(arrays).values())


@settings(deadline=None, max_examples=100)
@given(books_and_leaves())
def test_a_plan_foretells_shapes_and_dtypes(pair):
    rules, leaves = pair
    plan = rules.plan(leaves, to="nnx")
    result = plan.run(leaves)
    planned = {p: s for move in plan.moves for p, s in zip(move.targets, move.specs, strict=True)}
    assert {p: (x.shape, x.dtype) for p, x in result.items()} == planned


@settings(deadline=None, max_examples=100)
@given(books_and_leaves())
def test_a_book_survives_its_file(tmp_path_factory, pair):
    rules, _ = pair
    path = tmp_path_factory.mktemp("book") / "rules.yaml"
    rules.save(path)
    assert RuleBook.load(path) == rules
    assert RuleBook.from_dict(rules.to_dict()) == rules


elements = st.text("ab01_", min_size=1, max_size=3)


@given(
    st.sampled_from(
        ["a/{i}", "{name}/b", "Block_{i}/{name}_a", "a/{rest...}", "{rest...}/a", "a/{rest...}/b",
         "{rest...}", "{name}_{i}", "{i}_{j}", "{i}/{name}/{i}"]
    ),
    st.lists(elements, min_size=1, max_size=4).map("/".join),
    st.integers(0, 30), st.integers(0, 30), elements,
    st.lists(elements, max_size=3).map("/".join),
)  # fmt: skip
def test_matching_and_formatting_are_inverses(text, path, i, j, name, rest):
    pattern = Pattern(text)
    found = pattern.match(path)
    if found is not None:
        assert pattern.format(found) == path
    values = {"i": str(i), "j": str(j), "name": name, "rest": rest}
    made = pattern.format(values)
    if made and not (text == "{name}_{i}" and "_" in name):
        assert pattern.match(made) == {c: values[c] for c in pattern.captures}


nested = st.recursive(
    st.integers(),
    lambda children: st.dictionaries(elements, children, min_size=1, max_size=3),
    max_leaves=8,
).filter(lambda tree: isinstance(tree, dict))


@given(nested)
def test_unflatten_inverts_flatten(tree):
    assert unflatten(flatten(tree)) == tree


# What the ops mean


def test_a_scanned_kernel_becomes_a_list_in_the_order_of_the_numbers():
    rules = book(
        {
            "linen": "params/Scan/kernel",
            "nnx": "blocks/{i}/kernel",
            "ops": [{"op": "stack", "capture": "i", "axis": 0}],
        }
    )
    stacked = numbers(13, 2)
    nnx_leaves = rules.to_nnx({"params/Scan/kernel": stacked})
    assert list(nnx_leaves) == [f"blocks/{i}/kernel" for i in range(13)]
    assert all((nnx_leaves[f"blocks/{i}/kernel"] == stacked[i]).all() for i in range(13))
    shuffled = dict(sorted(nnx_leaves.items()))  # 0, 1, 10, 11, 12, 2, ...
    same_bits(rules.to_linen(shuffled), {"params/Scan/kernel": stacked})


def test_one_rule_turns_scanned_q_k_v_into_fused_layers():
    rules = book(
        {
            "linen": [f"params/Scan/{name}/kernel" for name in "qkv"],
            "nnx": "blocks/{i}/qkv/kernel",
            "ops": [
                {"op": "stack", "capture": "i", "axis": 0},
                {"op": "concat", "axis": 1},
                {"op": "reshape", "linen": [-1, 6, 4], "nnx": [-1, 24]},
            ],
        }
    )
    parts = {f"params/Scan/{n}/kernel": numbers(3, 5, 2, 4, start=k) for k, n in enumerate("qkv")}
    fused = rules.to_nnx(parts)
    expected = [np.concatenate([p[i] for p in parts.values()], 1).reshape(5, 24) for i in range(3)]
    same_bits(fused, {f"blocks/{i}/qkv/kernel": e for i, e in enumerate(expected)})
    same_bits(rules.to_linen(fused), parts)


def test_layers_and_experts_stack_in_one_rule():
    rules = book(
        {
            "linen": "params/Moe/kernel",
            "nnx": "blocks/{i}/experts/{e}/kernel",
            "ops": [
                {"op": "stack", "capture": "i", "axis": 0},
                {"op": "stack", "capture": "e", "axis": 0},
            ],
        }
    )
    stacked = numbers(2, 3, 4)
    leaves = rules.to_nnx({"params/Moe/kernel": stacked})
    assert (leaves["blocks/1/experts/2/kernel"] == stacked[1, 2]).all()
    same_bits(rules.to_linen(leaves), {"params/Moe/kernel": stacked})


def test_each_side_may_stack_what_the_other_lists():
    rules = book(
        {
            "linen": "params/Scan/expert_{e}/kernel",
            "nnx": "blocks/{i}/kernel",
            "ops": [
                {"op": "stack", "capture": "i", "axis": 0},
                {"op": "stack", "capture": "e", "axis": 1},
            ],
        }
    )
    leaves = {f"params/Scan/expert_{e}/kernel": numbers(2, 4, start=e) for e in range(3)}
    there = rules.to_nnx(leaves)
    assert there["blocks/1/kernel"].shape == (4, 3)
    same_bits(rules.to_linen(there), leaves)


def test_perm_lists_linen_axes_in_the_nnx_order():
    rules = book({"linen": "params/k", "nnx": "k", "ops": [{"op": "transpose", "perm": [2, 0, 1]}]})
    leaf = numbers(2, 3, 4)
    same_bits(rules.to_nnx({"params/k": leaf}), {"k": leaf.transpose(2, 0, 1)})


def test_scale_multiplies_in_the_own_dtype_and_is_not_invertible():
    rules = book({"linen": "params/s", "nnx": "s", "ops": [{"op": "scale", "factor": 0.5}]})
    leaf = np.ones(3, ml_dtypes.bfloat16)
    assert not rules.invertible
    scaled = rules.to_nnx({"params/s": leaf})
    same_bits(scaled, {"s": np.full(3, 0.5, ml_dtypes.bfloat16)})
    same_bits(rules.to_linen(scaled), {"params/s": leaf})


def test_drop_and_init_act_one_way_and_are_listed():
    rules = book(
        {"linen": "params/w", "nnx": "w"},
        {"linen": "params/hn/bias", "ops": [{"op": "drop"}], "note": "always zero"},
        {"nnx": "lora/{name}", "ops": [{"op": "init", "fill": "normal", "stddev": 0.02}]},
    )
    linen = {"params/w": zeros(2), "params/hn/bias": zeros(3)}
    target = {"w": zeros(2), "lora/aa": zeros(64), "lora/bb": zeros(64)}
    moves = rules.plan(linen, "nnx", target).moves
    assert [move.sources for move in moves if not move.targets] == [("params/hn/bias",)]
    assert [move.targets for move in moves if not move.sources] == [("lora/aa",), ("lora/bb",)]
    there = rules.to_nnx(linen, target)
    same_bits(there, rules.to_nnx(linen, target))
    assert (there["lora/aa"] != there["lora/bb"]).all()
    assert 0.01 < there["lora/aa"].std() < 0.03
    same_bits(rules.to_linen(there), {"params/w": zeros(2)})
    assert not rules.invertible


def test_init_without_a_target_needs_a_shape_of_its_own():
    init = {"op": "init", "fill": "ones", "shape": [2], "dtype": "bfloat16"}
    stated = book({"nnx": "gate", "ops": [init]})
    same_bits(stated.to_nnx({}), {"gate": np.ones(2, ml_dtypes.bfloat16)})
    bare = book({"nnx": "gate", "ops": [{"op": "init", "fill": "ones"}]})
    assert "give a target tree" in problems(bare.to_nnx, {})
    assert "states bfloat16[2]" in problems(stated.to_nnx, {}, target={"gate": zeros(3)})


def test_within_keeps_the_rules_of_one_half():
    encoder = {"linen": "params/encoder/{rest...}", "nnx": "encoder/{rest...}"}
    stats = {"linen": "batch_stats/encoder/bn/mean", "nnx": "encoder/bn/mean"}
    head = {"linen": "params/head/kernel", "nnx": "head/kernel"}
    rules = book(encoder, stats, head)
    assert rules.within("encoder") == book(encoder, stats)
    assert rules.within("head") == book(head)


def test_rest_stands_for_no_element_too():
    rules = book({"linen": "params/{rest...}/kernel", "nnx": "{rest...}/kernel"})
    leaves = {"params/kernel": zeros(1), "params/a/b/kernel": zeros(2)}
    there = rules.to_nnx(leaves)
    assert set(there) == {"kernel", "a/b/kernel"}
    same_bits(rules.to_linen(there), leaves)


def test_translation_imports_no_jax():
    code = (
        "import sys, numpy as np; from linen_nnx import RuleBook;"
        "b = RuleBook.from_dict({'version': 1, 'rules': [{'linen': 'params/{i}', 'nnx': 'x',"
        "'ops': [{'op': 'stack', 'capture': 'i', 'axis': 0}]}]});"
        "b.to_nnx({'params/0': np.zeros(2), 'params/1': np.zeros(2)});"
        "assert not {'jax', 'flax', 'orbax'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_five_thousand_literal_rules_are_indexed(monkeypatch):
    rules = book(*({"linen": f"params/a{k}/w", "nnx": f"b{k}/w"} for k in range(5000)))
    calls = []
    monkeypatch.setattr(Pattern, "match", lambda self, path: calls.append(path))
    plan = rules.plan({f"params/a{k}/w": zeros(1) for k in range(5000)}, to="nnx")
    assert len(plan.moves) == 5000 and not calls


# Errors: all of them in one message


RENAME = {"linen": "params/dense/kernel", "nnx": "dense/kernel"}


def test_every_kind_of_problem_is_raised_together():
    rules = book(RENAME, {"linen": "params/dense/bias", "nnx": "dense/bias"})
    text = problems(
        rules.to_nnx,
        {"params/dense/kernel": zeros(2, 3), "params/Dense/bias": zeros(3)},
        target={"dense/kernel": zeros(3, 2), "dense/bias": zeros(3)},
    )
    assert "`dense/kernel` would be float32[2,3]" in text and "wants float32[3,2]" in text
    assert "no rule matches the linen leaf `params/Dense/bias`" in text
    assert "nearest idle pattern is `params/dense/bias`" in text
    assert "rule 2 (`params/dense/bias` <-> `dense/bias`) matches no linen leaf" in text
    assert "nothing fills the nnx leaf `dense/bias`" in text
    assert "the source has no `params/dense/bias`" in text


def test_a_dtype_is_never_cast():
    text = problems(
        book(RENAME).to_nnx,
        {"params/dense/kernel": zeros(2)},
        target={"dense/kernel": zeros(2, dtype=ml_dtypes.bfloat16)},
    )
    assert "would be float32[2]" in text and "wants bfloat16[2]" in text


def test_a_missing_params_level_is_named():
    assert "level `params` in front" in problems(book(RENAME).to_nnx, {"dense/kernel": zeros(2)})
    text = problems(book(RENAME).to_nnx, {"params/params/dense/kernel": zeros(2)})
    assert "without its first level" in text


def test_a_bias_on_one_side_only_is_named():
    rules = book(RENAME, {"linen": "params/dense/bias", "nnx": "dense/bias"})
    both = {"params/dense/kernel": zeros(2), "params/dense/bias": zeros(2)}
    text = problems(rules.to_nnx, both, target={"dense/kernel": zeros(2)})
    assert "`params/dense/bias` becomes `dense/bias`, which the target lacks" in text
    text = problems(book(RENAME).to_nnx, both)
    assert "no rule matches the linen leaf `params/dense/bias`" in text


@pytest.mark.parametrize(
    ("wrapped", "advice"),
    [
        (nnx.Param(jnp.zeros(2)), "get_value"),
        (nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), "flatten"),
        (nn.LogicallyPartitioned(jnp.zeros(2), names=("a",)), "unbox"),
        ({"value": zeros(2)}, "flatten"),
        (1.0, "without shape and dtype"),
        (None, "without shape and dtype"),
    ],
)
def test_a_wrapper_in_place_of_an_array_is_named_with_its_remedy(wrapped, advice):
    text = problems(book(RENAME).to_nnx, {"params/dense/kernel": wrapped})
    assert "`params/dense/kernel` is a" in text and advice in text
    assert type(wrapped).__name__ in text


def test_leaves_and_paths_of_a_wrong_kind_are_refused():
    assert "got ndarray" in problems(book(RENAME).to_nnx, zeros(2))
    assert "('a', 'b')" in problems(book(RENAME).to_nnx, {("a", "b"): zeros(2)})
    with pytest.raises(ValueError, match="`to` is linen or nnx, got 'NNX'"):
        book(RENAME).plan({}, to="NNX")


def test_partial_translates_what_fits():
    rules = book(RENAME, {"linen": "params/other", "nnx": "other"})
    leaves = {"params/dense/kernel": zeros(2), "params/more": zeros(3)}
    target = {"dense/kernel": zeros(2), "open": zeros(1)}
    assert set(rules.to_nnx(leaves, target, partial=True)) == {"dense/kernel"}
    assert len(problems(rules.to_nnx, leaves, target).splitlines()) == 3


def test_a_leaf_of_two_rules_is_ambiguous_on_either_side():
    rules = book(RENAME, {"linen": "params/{rest...}", "nnx": "other/{rest...}"})
    text = problems(rules.to_nnx, {"params/dense/kernel": zeros(2)})
    assert "`params/dense/kernel` is matched by rule 1" in text and "and rule 2" in text
    rules = book(RENAME, {"linen": "params/b/{rest...}", "nnx": "{rest...}"})
    text = problems(rules.to_nnx, {"params/dense/kernel": zeros(2), "params/b/c": zeros(2)})
    assert "the nnx leaf `dense/kernel` is matched by rule 1" in text


def test_leaves_that_the_same_rules_match_share_a_line():
    rules = book(RENAME, {"linen": "params/{rest...}", "nnx": "{rest...}"},
                 {"linen": "params/{name}/bias", "nnx": "{name}/bias"})  # fmt: skip
    leaves = {f"params/{k}/bias": zeros(2) for k in "abcde"} | {"params/dense/kernel": zeros(2)}
    with pytest.raises(RuleError) as caught:
        rules.to_nnx(leaves)
    many, one = sorted(caught.value.problems)
    assert many.startswith("5 linen leaves are matched by rule 2 (`params/{rest...}`")
    assert many.endswith("`{name}/bias`): `params/a/bias`, `params/b/bias`, `params/c/bias`, ...")
    assert one.startswith("the linen leaf `params/dense/kernel` is matched by rule 1 ")


def test_two_sources_for_one_target_are_refused():
    rules = book(RENAME, {"linen": "params/other/kernel", "nnx": "dense/kernel"})
    leaves = {"params/dense/kernel": zeros(2), "params/other/kernel": zeros(2)}
    assert "two sources for `dense/kernel`" in problems(rules.to_nnx, leaves)


def test_two_parts_that_match_one_leaf_are_refused():
    rules = book({"linen": ["params/{name}", "params/b{name}"], "nnx": "x/{name}",
                  "ops": [{"op": "concat", "axis": 0}]})  # fmt: skip
    text = problems(rules.to_nnx, {"params/bb": zeros(2), "params/cc": zeros(2)})
    assert "`params/bb` is matched by rule 1" in text and "twice" in text


STACK = {
    "linen": "params/Block_{i}/kernel",
    "nnx": "blocks/kernel",
    "ops": [{"op": "stack", "capture": "i", "axis": 0}],
}


def test_layers_must_run_from_zero_without_gaps():
    leaves = {f"params/Block_{i}/kernel": zeros(2) for i in (1, 3)}
    text = problems(book(STACK).to_nnx, leaves)
    assert "`{i}` in `params/Block_{i}/kernel` must run 0..3 without gaps, missing: 0, 2" in text


def test_layers_and_experts_must_fill_their_grid():
    rule = {
        "linen": "params/{i}/{e}",
        "nnx": "x",
        "ops": [{"op": "stack", "capture": c, "axis": 0} for c in "ie"],
    }
    leaves = {f"params/{place}": zeros(2) for place in ("0/0", "0/1", "1/0")}
    assert "fill 3 of 4 places" in problems(book(rule).to_nnx, leaves)


def test_layers_must_be_equal_in_shape_and_dtype():
    leaves = {"params/Block_0/kernel": zeros(2), "params/Block_1/kernel": zeros(3)}
    assert "float32[2], float32[3]" in problems(book(STACK).to_nnx, leaves)
    leaves["params/Block_1/kernel"] = zeros(2, dtype=np.int32)
    assert "float32[2], int32[2]" in problems(book(STACK).to_nnx, leaves)


def test_a_stack_of_no_layer_is_refused():
    assert "must hold equally many layers" in problems(
        book(STACK).to_linen, {"blocks/kernel": zeros(0, 2)}
    )


def test_layer_numbers_have_no_leading_zeros():
    text = problems(book(STACK).to_nnx, {"params/Block_00/kernel": zeros(2)})
    assert "no rule matches" in text


def test_an_axis_out_of_range_is_named():
    rule = {**STACK, "ops": [{"op": "stack", "capture": "i", "axis": 3}]}
    assert "axis 3 is out of range" in problems(
        book(rule).to_nnx, {"params/Block_0/kernel": zeros(2)}
    )


def concat(**more):
    return book(
        {"linen": ["params/aa", "params/bb"], "nnx": "x",
         "ops": [{"op": "concat", "axis": 0, **more}]}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("left", "right", "sizes", "reason"),
    [
        (zeros(2), zeros(3), None, "give the op its `sizes`"),
        (zeros(2), zeros(3), [3, 2], "other sizes than [3, 2]"),
        (zeros(2, 2), zeros(2, 3), None, "without axis 0 must be equal"),
        (zeros(2), zeros(2, 1), None, "number of axes"),
        (zeros(2), zeros(2, dtype=np.int32), None, "must be equal in shape and dtype"),
    ],
)
def test_parts_that_cannot_be_joined_are_named(left, right, sizes, reason):
    rules = concat(**({"sizes": sizes} if sizes else {}))
    assert reason in problems(rules.to_nnx, {"params/aa": left, "params/bb": right})


def test_an_indivisible_concat_is_named():
    assert "length 3, which is not 2 equal parts" in problems(concat().to_linen, {"x": zeros(3)})
    assert "not sizes [1, 3]" in problems(concat(sizes=[1, 3]).to_linen, {"x": zeros(3)})


def test_a_missing_part_is_named():
    assert "no leaf matches its part `params/bb`" in problems(
        concat().to_nnx, {"params/aa": zeros(1)}
    )


@pytest.mark.parametrize(
    ("op", "leaf", "reason"),
    [
        ({"op": "transpose", "perm": [1, 0]}, zeros(2), "1 axes, perm [1, 0] 2"),
        ({"op": "reshape", "linen": [2, 3], "nnx": [6]}, zeros(3, 2), "cannot be reshaped"),
        ({"op": "reshape", "linen": [-1], "nnx": [-1, 4]}, zeros(6), "cannot be reshaped"),
        ({"op": "reshape", "linen": [2, -1], "nnx": [4]}, zeros(2, 3), "cannot be reshaped"),
        ({"op": "scale", "factor": 2}, zeros(2, dtype=np.int32), "holds no fractions"),
    ],
)
def test_an_op_that_does_not_fit_its_array_is_named(op, leaf, reason):
    rules = book({"linen": "params/k", "nnx": "k", "ops": [op]})
    assert reason in problems(rules.to_nnx, {"params/k": leaf})


def test_typed_keys_are_renamed_only():
    key = {"params/Block_0/kernel": jax.random.key(0)}
    assert "renamed only" in problems(book(STACK).to_nnx, key)
    renamed = book({"linen": "params/Block_{i}/kernel", "nnx": "key/{i}"}).to_nnx(key)
    assert renamed["key/0"] is key["params/Block_0/kernel"]


def test_a_dropped_leaf_cannot_be_asked_for_on_the_way_back():
    rules = book(RENAME, {"linen": "params/extra", "ops": [{"op": "drop"}]})
    target = {"params/dense/kernel": zeros(2), "params/extra": zeros(2)}
    text = problems(rules.to_linen, {"dense/kernel": zeros(2)}, target)
    assert "drops it; use `init`" in text


def test_an_unwanted_init_is_idle():
    rules = book(RENAME, {"nnx": "gate", "ops": [{"op": "init", "fill": "ones"}]})
    text = problems(rules.to_nnx, {"params/dense/kernel": zeros(2)}, {"dense/kernel": zeros(2)})
    assert "rule 2 (`gate`) matches no nnx leaf" in text


def test_an_empty_path_is_refused():
    rules = book({"linen": "params/{rest...}", "nnx": "{rest...}"})
    assert "empty path" in problems(rules.to_nnx, {"params": zeros(2)})


def test_a_long_list_of_problems_is_cut_in_the_text_but_not_in_the_error():
    with pytest.raises(RuleError) as caught:
        book().to_nnx({f"params/{k}": zeros(1) for k in range(300)})
    assert len(caught.value.problems) == 300
    assert "... and 200 more" in str(caught.value)


# Errors of the book itself


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ({"linnen": "a", "nnx": "b"}, "unknown key `linnen`; did you mean `linen`?"),
        ("a: b", "must be a mapping with `linen`"),
        ({}, "needs `linen` or `nnx`"),
        ({"linen": 3, "nnx": "b"}, "`linen`: must be a text, got 3"),
        ({"linen": "a"}, "exactly one op, `drop` or `init`"),
        ({"linen": ["a", "b"], "ops": [{"op": "drop"}]}, "one pattern, no list"),
        ({"linen": "a", "nnx": "b", "ops": [{"op": "drop"}]}, "one side only"),
        ({"linen": "a", "nnx": "b", "ops": {"op": "drop"}}, "expected a list"),
        ({"linen": "a", "nnx": "b", "ops": ["drop"]}, "an op is a mapping"),
        ({"linen": "a", "nnx": "b", "ops": [{"op": "stak"}]}, "did you mean `stack`?"),
        ({"linen": "a/{i}", "nnx": "b"}, "`{i}` is missing on the nnx side: needs one `stack`"),
        ({"linen": "a", "nnx": "b/{name}"}, "`{name}` is missing on the linen side: needs it on"),
        ({**STACK, "linen": "a"}, "`stack` of `i` needs `{i}` on exactly one side"),
        ({"linen": ["a", "b"], "nnx": "x"}, "belong together"),
        ({"linen": "a", "nnx": "x", "ops": [{"op": "concat", "axis": 0}]}, "belong together"),
        ({"linen": ["a/{i}", "b"], "nnx": "x/{i}", "ops": [{"op": "concat", "axis": 0}]},
         "must name the same captures"),
        ({"linen": ["a", "a"], "nnx": "x", "ops": [{"op": "concat", "axis": 0}]}, "different"),
        ({"linen": ["a", "b"], "nnx": "x",
          "ops": [{"op": "concat", "axis": 0, "sizes": [1, 2, 3]}]}, "3 sizes for 2 parts"),
    ],
)  # fmt: skip
def test_a_rule_that_makes_no_sense_is_refused(rule, reason):
    assert reason in problems(book, RENAME, rule)
    assert "rule 2:" in problems(book, RENAME, rule)


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ({"op": "transpose", "prem": [0]}, "`prem`; did you mean `perm`?"),
        ({"op": "transpose"}, "needs `perm`"),
        ({"op": "transpose", "perm": [0, 2]}, "a permutation"),
        ({"op": "reshape", "linen": [-1, -1], "nnx": [4]}, "at most one -1"),
        ({"op": "scale", "factor": 0}, "other than 0"),
        ({"op": "scale", "factor": "1e-3"}, "got '1e-3'"),
        ({"op": "stack", "capture": "name", "axis": 0}, "the letter of an integer capture"),
        ({"op": "stack", "capture": "i", "axis": True}, "an integer"),
        ({"op": "concat", "axis": 0, "sizes": [0, 1]}, "two or more lengths"),
        ({"op": "init", "fill": "twos"}, "zeros or ones or normal or constructor"),
        ({"op": "init", "fill": "normal", "stddev": -1}, "0 or more"),
        ({"op": "init", "fill": "normal", "seed": -1}, "0 or more"),
        ({"op": "init", "fill": "ones", "shape": [2]}, "both, or neither"),
        ({"op": "init", "fill": "ones", "shape": [2], "dtype": "float31"}, "name of a dtype"),
        ({"op": "init", "fill": "ones", "shape": [-2], "dtype": "float32"}, "list of lengths"),
    ],
)
def test_an_op_with_wrong_arguments_is_refused(op, reason):
    assert reason in problems(book, {"linen": "a", "nnx": "b", "ops": [op]})


@pytest.mark.parametrize(
    "text",
    ["", "a//b", "/a", "{", "a}", "{I}", "{}", "{a b}", "{i}{j}", "{i}0{j}", "{aa}_{bb}",
     "x{rest...}", "{rest...}/{rest...}", "{rest}/{rest...}", "{i...}", "{re...}/{ot...}",
     "a/./b", "../b", "a/\0", "a/\ud800"],
)  # fmt: skip
def test_a_malformed_or_ambiguous_pattern_is_refused(text):
    with pytest.raises(ValueError, match="pattern"):
        Pattern(text)


def test_a_file_that_is_no_book_is_named(tmp_path):
    path = tmp_path / "rules.yaml"
    for content, reason in [
        ("a: [", "not YAML"),
        ("- linen: a", "expected a mapping"),
        ("version: 2\nrules: []", "`version` must be 1, got 2"),
        ("version: 1\nrules:\n  a: b", "`rules` must be a list"),
        ("version: 1\nrule: []\nrules: []", "unknown key `rule`; did you mean `rules`?"),
        ("version: 1\nrules:\n- {linen: a, nx: b}", "rule 1: unknown key `nx`"),
    ]:
        path.write_text(content)
        with pytest.raises(RuleError) as caught:
            RuleBook.load(path)
        assert reason in str(caught.value) and str(path) in str(caught.value)


# Trees


def test_integer_keys_become_digits():
    assert flatten({"a": {0: 1, 10: 2}}) == {"a/0": 1, "a/10": 2}


@pytest.mark.parametrize(
    ("tree", "reason"),
    [
        ([1], "expected a dict"),
        ({"a/b": 1}, "holds a `/`"),
        ({"": 1}, "is empty"),
        ({"a": {1: 1, "1": 2}}, "occurs twice"),
        ({"a": [1]}, "`a` is a list"),
        ({"a": None}, "`a` is a NoneType"),
        ({("a",): 1}, "is a tuple"),
    ],
)
def test_a_tree_that_would_not_come_back_is_refused(tree, reason):
    with pytest.raises(ValueError, match=reason):
        flatten(tree)


@pytest.mark.parametrize(
    ("leaves", "reason"),
    [
        ({"a": 1, "a/b": 2}, "leaf and a branch"),
        ({"a/b": 2, "a": 1}, "leaf and a branch"),
        ({"a/b": 1, "a/b/c/d": 1}, "leaf and a branch"),
        ({"a//b": 1}, "empty element"),
        ({"": 1}, "empty element"),
        ({"a": {}}, "holds a dict"),
    ],
)
def test_paths_that_form_no_tree_are_refused(leaves, reason):
    with pytest.raises(ValueError, match=reason):
        unflatten(leaves)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefghij", "bcdefghijk", strict=True)
)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (LAUGHS.encode(), "stands for more than 4194304 nodes"),
        (b"a: &a [*a]", "names nothing that ends before it"),
        (b"rules: " + b"[" * 100, "nests more than 32 levels"),
        # Newer versions of libyaml look ahead, and count to 1000 themselves.
        (b"rules: " + b"[" * 100_000, "nests more than 32 levels|exceeded maximum nesting depth"),
        (b'{"rules": ' + b"[" * 100_000, "nests more than 32|exceeded maximum nesting depth"),
        (b"version: !!int ''", "the tag tag:yaml.org,2002:int is not taken"),
        (b"version: " + b"9" * 5000, "Exceeds the limit"),
        (b"version: 2001-99-99", "month must be in 1..12"),
        (b"\xff\xfe\x00", "can't decode byte 0xff"),
        (b"version: 1\nrules: []\nunassigned: 7", "`unassigned` must be a list, got int"),
    ],
)
def test_a_file_that_was_made_to_break_its_reader_is_refused_at_once(tmp_path, content, reason):
    (tmp_path / "rules.yaml").write_bytes(content)
    start = time.process_time()
    with pytest.raises(RuleError, match=reason):
        RuleBook.load(tmp_path / "rules.yaml")
    assert time.process_time() - start < 2


def test_aliases_that_do_not_multiply_are_read(tmp_path):
    (tmp_path / "rules.yaml").write_text(
        "version: 1\nrules:\n"
        "- {linen: params/a, nnx: a, ops: &turn [{op: transpose, perm: [1, 0]}]}\n"
        "- {linen: params/b, nnx: b, ops: *turn}\n"
    )
    one, two = RuleBook.load(tmp_path / "rules.yaml").rules
    assert one.ops == two.ops


def test_a_pipe_is_no_rule_book(tmp_path):
    os.mkfifo(tmp_path / "rules.yaml")
    with pytest.raises(RuleError, match="it is a pipe, expected a regular file"):
        RuleBook.load(tmp_path / "rules.yaml")


# One source, several homes; the numbers of a constructor


def copying(linen, nnx, **arguments):
    return book({"linen": linen, "nnx": nnx, "ops": [{"op": "copy", **arguments}]})


def test_a_copied_leaf_has_equal_homes_and_comes_back_as_one():
    rules = copying("params/e", ["a", "b"], perms=[None, [1, 0]])
    leaves = {"params/e": np.arange(6.0).reshape(2, 3)}

    homes = rules.to_nnx(leaves)

    np.testing.assert_array_equal(homes["a"], leaves["params/e"])
    np.testing.assert_array_equal(homes["b"], leaves["params/e"].T)
    np.testing.assert_array_equal(rules.to_linen(homes)["params/e"], leaves["params/e"])
    assert rules.invertible


def test_two_leaves_become_one_only_if_every_bit_is_equal():
    rules = copying(["params/a", "params/b"], "one")
    equal = {"params/a": np.zeros(3), "params/b": np.zeros(3)}

    assert set(rules.to_nnx(equal)) == {"one"}
    with pytest.raises(Mismatch, match="copy 2 differs from copy 1"):
        rules.to_nnx({**equal, "params/b": -np.zeros(3)})


def test_the_remedy_for_copies_that_differ_works():
    kept = book(
        {"linen": "params/e", "nnx": "a"},
        {"nnx": "b", "ops": [{"op": "drop"}]},
    )

    assert set(kept.to_linen({"a": np.zeros(2), "b": np.ones(2)})) == {"params/e"}


def test_copies_are_copied_layer_by_layer_under_a_stack():
    rules = book({
        "linen": "params/e",
        "nnx": ["a/{i}", "b/{i}"],
        "ops": [{"op": "stack", "capture": "i", "axis": 0}, {"op": "copy"}],
    })  # fmt: skip
    leaves = {"params/e": np.arange(6.0).reshape(2, 3)}

    homes = rules.to_nnx(leaves)

    assert set(homes) == {"a/0", "a/1", "b/0", "b/1"}
    np.testing.assert_array_equal(homes["b/1"], [3.0, 4.0, 5.0])
    np.testing.assert_array_equal(rules.to_linen(homes)["params/e"], leaves["params/e"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "bool", "int8"])
def test_the_numbers_of_a_constructor_are_filled_in_bit_for_bit(dtype):
    values = np.arange(6).reshape(2, 3).astype(dtype)
    op = {"op": "init", "fill": "constructor", "shape": [2, 3], "dtype": dtype,
          "data": packed(values.tobytes())}  # fmt: skip

    filled = book({"nnx": "table", "ops": [op]}).to_nnx({})["table"]

    assert filled.dtype == values.dtype and filled.tobytes() == values.tobytes()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"data": "no base64!"}, "holds no packed bytes"),
        ({"data": packed(bytes(8))}, "holds 8 bytes, float32[3] has 12"),
        ({"data": packed(bytes(1 << 20))}, "packed bytes of another length, expected 12 bytes"),
        ({"data": None}, "must be packed bytes"),
        ({"fill": "zeros"}, "`fill: constructor` and `data` belong together"),
    ],
)
def test_numbers_of_a_constructor_that_do_not_fit_are_refused(change, reason):
    op = {"op": "init", "fill": "constructor", "shape": [3], "dtype": "float32",
          "data": packed(bytes(12)), **change}  # fmt: skip

    with pytest.raises(RuleError) as caught:
        book({"nnx": "table", "ops": [op]})
    assert reason in str(caught.value)


def test_a_letter_where_a_name_was_meant_is_explained():
    with pytest.raises(RuleError, match=r"`\{n\}`, one letter, matches integers only"):
        book({"linen": "params/{n}/kernel", "nnx": "{n}/kernel"}).to_nnx(
            {"params/dense/kernel": np.zeros(2)}
        )


def test_likely_rules_are_written_as_comments_that_can_be_uncommented(tmp_path):
    likely = parse_rule({"linen": "params/a", "nnx": "b"})
    known = {side: Unassigned(side, "why", (), likely) for side in ("linen", "nnx")}
    open_ = RuleBook([], {"params/a": known["linen"], "b": known["nnx"]})
    open_.save(tmp_path / "rules.yaml")
    text = (tmp_path / "rules.yaml").read_text()

    assert RuleBook.load(tmp_path / "rules.yaml") == open_
    head = text[: text.index("unassigned:\n")]  # deleted, as the comment says
    (tmp_path / "closed.yaml").write_text(head.replace("# - ", "- ").replace("#   ", "  "))
    assert RuleBook.load(tmp_path / "closed.yaml").rules == (likely,)


PATHS = st.lists(
    st.sampled_from(["a", "a_1", "b_12", "w3_4", "7", "kernel"]), min_size=1, max_size=4
)
PATTERNS = st.lists(
    st.sampled_from(["a", "a_{i}", "{name}", "b_{j}", "w3_{k}", "{l}", "kernel", "{rest...}"]),
    min_size=1,
    max_size=4,
)


@given(st.lists(PATTERNS, max_size=12), st.lists(PATHS, max_size=12))
def test_the_index_finds_what_trying_every_pattern_finds(patterns, paths):
    parsed = []
    for elements in patterns:
        with contextlib.suppress(ValueError):  # more than one `{rest...}`
            parsed.append(Pattern("/".join(elements)))
    index = Index([[pattern] for pattern in parsed])
    for path in map("/".join, paths):
        found = {(hit.rule, tuple(hit.captures.items())) for hit in index.match(path)}
        matches = ((rule, pattern.match(path)) for rule, pattern in enumerate(parsed))
        assert found == {(rule, tuple(m.items())) for rule, m in matches if m is not None}


def test_five_thousand_rules_are_planned_in_seconds():
    entries = [
        {"linen": f"params/{{block}}/d_{n}/{{leaf}}", "nnx": f"m_{{block}}/s{n}/{{leaf}}"}
        for n in range(5000)
    ]
    rules = RuleBook.from_dict({"version": 1, "rules": entries})
    leaf = np.ones(2, np.float32)
    leaves = {f"params/{block}/d_{n}/kernel": leaf for n in range(5000) for block in "ab"}
    start = time.process_time()
    assert len(rules.plan(leaves, "nnx").moves) == 10_000
    assert time.process_time() - start < 5
