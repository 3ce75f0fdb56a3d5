"""bisect: each planted fault is named at the right layer, and clean pairs are exact."""

import itertools
import json
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from convert_helpers import save
from faults import DEPTH, SCANNED, NnxConvs, X, book, convs, net, sharp_attention
from flax import nnx
from flax.traverse_util import unflatten_dict
from hypothesis import given
from hypothesis import strategies as st
from pairs import PAIRS
from random_twins import random_twin

from linen_nnx import RuleBook, RuleError, Twin, TwinError, bisect
from linen_nnx.cli import main
from linen_nnx.infer.sides import in_order
from linen_nnx.infer.trace import trace_linen
from linen_nnx.proof.compare import Value, difference, judge
from linen_nnx.proof.mates import side_of
from linen_nnx.proof.show import conclusion
from linen_nnx.proof.weights import random_leaves

PARTS = (("LayerNorm_0", "norm", "scale"), ("up", "up", "kernel"), ("down", "down", "kernel"))


def verdicts(found):
    return Counter(line.verdict for line in found.layers)


def assert_named(found, linen, nnx_, leaf):
    """The first divergence is there, all layers before it are exact, and so is what feeds it."""
    first = found.first
    assert (first.linen, first.nnx, first.leaf.split("/")[-1]) == (linen, nnx_, leaf)
    assert all(line.verdict == "exact" for line in found.layers[: found.layers.index(first)])
    assert first.before is None or first.before.exact
    assert not first.after.exact


# Pairs without a fault


@pytest.mark.long
def test_clean_twins_are_exact_in_every_layer_and_output():
    found = bisect(net(), book())

    assert found.first is None
    assert verdicts(found) == {"exact": 3 * DEPTH + 2}
    assert not found.findings and not found.notes


@pytest.mark.long
def test_scanned_blocks_equal_a_list_of_blocks_but_for_rounding():
    found = bisect(net(scan=True), SCANNED)

    assert found.first is None and set(verdicts(found)) <= {"exact", "rounding"}
    assert "blocks/up[11]" in {line.linen for line in found.layers}
    assert len(found.layers) == 3 * DEPTH + 2


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", sorted(set(PAIRS) - {"gru_cells"}))
def test_twins_that_compute_the_same_never_diverge(name):
    pair = PAIRS[name]()

    assert bisect(pair.twin, pair.truth).first is None


@pytest.mark.long
def test_a_leaf_without_a_home_on_the_other_side_is_noted():
    pair = PAIRS["gru_cells"]()
    found = bisect(pair.twin, pair.truth)

    assert found.first is not None
    assert any("without a mate in nnx" in note and "hn/bias" in note for note in found.notes)


def test_leaves_of_the_root_are_shown_as_such():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return x * self.param("scale", nn.initializers.ones, (3,))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(3))

        def __call__(self, x):
            return x * self.scale

    first = bisect(Twin(Linen, Nnx, lambda: (jnp.arange(3.0),))).layers[0]

    assert (first.linen, first.nnx, first.leaf) == ("(root)", "(root)", "params/scale")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("seed", range(4))
def test_random_twins_never_diverge(seed):
    assert bisect(random_twin(seed)[0]).first is None


@pytest.mark.long
def test_the_same_attention_in_another_form_is_rounding():
    found = bisect(net(depth=2, attention=nnx.dot_product_attention))

    assert found.first is None
    assert any("`attention_fn`" in finding for finding in found.findings)


# Planted faults


@pytest.mark.long
def test_a_wrong_epsilon_is_named():
    found = bisect(net(at=7, epsilon=1e-5), book())

    assert_named(found, "block_7/LayerNorm_0", "blocks/7/norm", "scale")
    assert len(found.findings) == 1
    assert "`epsilon` of LayerNorm: Linen 1e-06, nnx 1e-05" in found.findings[0]
    assert "block_7/LayerNorm_0 (nnx blocks/7/norm)" in found.findings[0]
    (function,) = found.functions
    assert "epsilon 1e-06 inside the root" in function and "epsilon 1e-05 inside" in function


@pytest.mark.long
def test_a_wrong_epsilon_is_named_without_a_rule_book_and_under_scan():
    assert bisect(net(at=7, epsilon=1e-5)).first.linen == "block_7/LayerNorm_0"
    found = bisect(net(scan=True, at=7, epsilon=1e-5), SCANNED)
    assert (found.first.linen, found.first.nnx) == ("blocks/LayerNorm_0[7]", "blocks/7/norm")


@pytest.mark.long
def test_a_dropped_bias_is_named():
    found = bisect(net(at=5, bias=False))

    assert_named(found, "block_5/up", "blocks/5/up", "bias")
    assert found.notes == ("Linen leaves without a mate in nnx: params/block_5/up/bias",)
    assert "`use_bias` of Dense: Linen True, nnx False, at block_5/up" in found.findings[0]


def test_a_cast_to_bfloat16_is_named():
    found = bisect(net(at=4, dtype=jnp.bfloat16), book())

    assert_named(found, "block_4/up", "blocks/4/up", "kernel")
    assert found.first.shape == "float32[2,5,8] / bfloat16[2,5,8]"
    assert "`dtype` of Dense: Linen None, nnx bfloat16" in found.findings[0]


def test_a_transposed_square_kernel_is_named_and_its_input_agrees():
    found = bisect(net(), book(transposed="params/block_3/up/kernel"))

    assert_named(found, "block_3/up", "blocks/3/up", "kernel")
    assert found.first.inside is True and not found.findings


def test_two_swapped_leaves_are_named_at_the_earlier_one():
    early, late = ("block_2/up", "blocks/2/up"), ("block_9/up", "blocks/9/up")
    wrong = {
        f"params/{one[0]}/kernel": f"{two[1]}/kernel" for one, two in ((early, late), (late, early))
    }

    first = bisect(net(), book(wrong)).first

    assert (first.linen, first.nnx) == ("block_2/up", "blocks/9/up")


def test_layers_in_the_order_of_their_names_part_at_the_first_that_moved():
    order = sorted(range(DEPTH), key=str)  # 0, 1, 10, 11, 2, ...
    wrong = {
        f"params/block_{k}/{one}/{leaf}": f"blocks/{order[k]}/{two}/{leaf}"
        for k in range(DEPTH)
        for one, two, weight in PARTS
        for leaf in (weight, "bias")
    }

    assert_named(bisect(net(), book(wrong)), "block_2/LayerNorm_0", "blocks/10/norm", "scale")


def test_swapped_mean_and_variance_are_named():
    rules = [
        {"linen": f"params/{one}_{{i}}/{leaf}", "nnx": f"{two}/{{i}}/{leaf}"}
        for one, two, weight in (("Conv", "convs", "kernel"), ("BatchNorm", "norms", "scale"))
        for leaf in (weight, "bias")
    ]
    rules.append({"linen": "params/Dense_0/{leaf}", "nnx": "out/{leaf}"})
    for k, (mean, var) in enumerate((("mean", "var"), ("var", "mean"), ("mean", "var"))):
        rules.append({"linen": f"batch_stats/BatchNorm_{k}/mean", "nnx": f"norms/{k}/{mean}"})
        rules.append({"linen": f"batch_stats/BatchNorm_{k}/var", "nnx": f"norms/{k}/{var}"})

    found = bisect(convs(), RuleBook.from_dict({"version": 1, "rules": rules}))

    assert_named(found, "BatchNorm_1", "norms/1", "mean")


@pytest.mark.sampled(1)
@pytest.mark.parametrize("train", ["linen", "nnx"])
def test_batch_norm_in_train_mode_on_one_side_is_named(train):
    twin = convs(train=train == "linen")
    twin = replace(twin, nnx=lambda rngs: NnxConvs(rngs, train=train == "nnx"))
    found = bisect(replace(twin, call_nnx=lambda model, x: model(x)))  # in the mode it is in

    assert (found.first.linen, found.first.nnx) == ("BatchNorm_0", "norms/0")
    assert "`use_running_average` of BatchNorm" in found.findings[0]
    assert "train mode in one of them" in found.findings[0]


@pytest.mark.long
def test_dropout_that_is_active_on_one_side_is_named_at_what_reads_it():
    twin = replace(net(at=6, dropping=True), call_nnx=lambda model, x: model(x))
    found = bisect(twin, book())

    assert_named(found, "block_6/down", "blocks/6/down", "kernel")
    assert found.first.inside is False
    assert "`deterministic` of Dropout: Linen True, nnx False" in found.findings[0]
    assert "block_6/Dropout_0 (nnx blocks/6/dropout)" in found.findings[0]


def test_same_padding_against_numbers_is_named():
    found = bisect(convs(padding="SAME"))

    assert (found.first.linen, found.first.inside) == ("Conv_0", True)
    assert "`padding` of Conv: Linen 'SAME', nnx ((1, 1), (1, 1))" in found.findings[0]


def test_momentum_is_named_by_the_lint_alone_until_statistics_are_updated():
    found = bisect(convs(momentum=0.99))
    training = replace(
        convs(train=True), nnx=lambda rngs: NnxConvs(rngs, train=True, momentum=0.99)
    )

    assert found.first is None
    assert "`momentum` of BatchNorm: Linen 0.9, nnx 0.99" in found.findings[0]
    updated = bisect(training)
    assert updated.first.linen == "BatchNorm_0"
    diverged = {line.linen for line in updated.layers if line.verdict == "DIVERGES"}
    assert "update of batch_stats/BatchNorm_2/var" in diverged and "output 0" not in diverged


def test_an_attention_function_of_another_scale_is_named():
    found = bisect(net(depth=2, attention=sharp_attention, at=1))

    name = "MultiHeadDotProductAttention_0"
    assert_named(found, f"block_1/{name}/out", "blocks/1/attention/out", "kernel")
    assert "faults.plain_attention, nnx faults.sharp_attention" in found.findings[0]
    assert found.first.inside is False
    assert found.functions == ("softmax: Linen its input times 0.5, nnx its input times 1",)


def test_another_activation_is_named_where_its_result_is_used():
    found = bisect(net(depth=2, at=1, activation=partial(nnx.gelu, approximate=False)))

    assert (found.first.linen, found.first.leaf) == ("block_1/down", "params/block_1/down/kernel")
    assert found.functions == ("gelu: Linen the tanh approximation, nnx exact, by erf",)
    assert "function gelu: Linen the tanh approximation" in "\n".join(conclusion(found))


def test_a_function_behind_the_last_layer_is_named_at_the_output():
    twin = net(depth=1)

    found = bisect(replace(twin, call_nnx=lambda model, x: jax.nn.relu(model(x))))

    assert found.first.linen == "output 0" and found.functions == ("relu, in nnx alone",)


def test_nan_is_a_failure_also_where_both_sides_have_it():
    twin = net(depth=1)

    found = bisect(replace(twin, inputs=lambda: (X.at[0, 0, 0].set(jnp.nan),)))

    assert (found.first.linen, found.first.verdict) == ("block_0/LayerNorm_0", "NaN")


def test_outputs_of_another_shape_diverge_and_one_more_is_left_out_aloud():
    twin = net(depth=1)

    more = bisect(replace(twin, call_nnx=lambda model, x: (model(x), x)))
    other = bisect(replace(twin, call_nnx=lambda model, x: model(x)[0]))

    assert more.first is None
    assert any("outputs that only nnx has are not compared: `1`" in note for note in more.notes)
    assert other.first.shape == "float32[2,5,8] / float32[5,8]"


# Weights


class Dropping:
    """Dropout and BatchNorm, which show in training alone."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dropout(0.3)(nn.Dense(8, name="first")(x), deterministic=not train)
            return nn.Dense(2, name="last")(nn.BatchNorm(use_running_average=not train)(x))

    class Nnx(nnx.Module):
        def __init__(self, rate, *, rngs):
            self.first, self.last = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
            self.dropout, self.norm = nnx.Dropout(rate, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)

        def __call__(self, x):
            return self.last(self.norm(self.dropout(self.first(x))))

    @classmethod
    def twin(cls, rate=0.3):
        x = jnp.linspace(-1, 1, 32).reshape(4, 8) ** 3
        return Twin(cls.Linen, lambda rngs: cls.Nnx(rate, rngs=rngs), lambda: (x,))


def test_in_training_masks_and_statistics_are_compared_too():
    right = bisect(Dropping.twin(), training=True)
    assert right.first is None
    assert "both models are called in training" in right.notes[0]

    assert bisect(Dropping.twin(0.5)).first is None
    wrong = bisect(Dropping.twin(0.5), training=True)
    assert wrong.first.linen != "first"
    assert "`rate` of Dropout: Linen 0.3, nnx 0.5" in "".join(wrong.findings)


def test_a_twin_that_says_how_it_is_called_is_not_called_otherwise():
    with pytest.raises(TwinError, match="call_linen, call_nnx"):
        bisect(replace(Dropping.twin(), call_nnx=lambda model, x: model(x)), training=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same weights in both forms, and nnx ones with one element changed in block 8."""
    folder = tmp_path_factory.mktemp("saved")
    linen = random_leaves(side_of(trace_linen(net())))
    nnx_ = book().to_nnx(linen)
    save(folder / "linen", tree(linen))
    save(folder / "nnx", tree(nnx_))
    bits = nnx_["blocks/8/up/kernel"].view(np.uint32).copy()
    bits[2, 3] ^= 1 << 14
    save(folder / "flipped", tree({**nnx_, "blocks/8/up/kernel": bits.view(np.float32)}))
    book().save(folder / "rules.yaml")
    return folder


def tree(leaves):
    return unflatten_dict({tuple(path.split("/")): leaf for path, leaf in leaves.items()})


def test_one_checkpoint_of_either_form_serves_both_sides(saved):
    for name in ("linen", "nnx"):
        assert verdicts(bisect(net(), book(), [saved / name])) == {"exact": 3 * DEPTH + 2}


def test_one_changed_element_of_one_checkpoint_is_found_in_its_layer(saved):
    found = bisect(net(), book(), [saved / "linen", saved / "flipped"])

    assert_named(found, "block_8/up", "blocks/8/up", "kernel")
    assert found.first.inside is True
    assert found.notes == ("the checkpoints' weights differ, in nnx leaves blocks/8/up/kernel",)
    assert bisect(net(), book(), [saved / "nnx", saved / "linen"]).first is None


def test_checkpoints_that_do_not_fit_are_refused_with_every_reason(saved):
    with pytest.raises(RuleError, match="one of each form"):
        bisect(net(), book(), [saved / "nnx", saved / "flipped"])
    with pytest.raises(RuleError, match=r"6 problems[^$]*block_12/up/kernel` is not in"):
        bisect(net(depth=13), None, [saved / "linen"])


def test_an_even_input_gets_noise_and_says_so():
    found = bisect(replace(net(depth=1), inputs=lambda: (jnp.zeros((2, 5, 8)),)))

    assert found.notes == ("input 0 was all one value, which hides much: it got noise",)


def test_a_key_among_the_inputs_and_a_leaf_without_elements_are_taken_as_they_are():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x, key):
            self.param("none", nn.initializers.zeros, (0, 4))
            return nn.Dense(3, name="out")(nn.Dropout(0.5)(x, deterministic=False, rng=key))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.none, self.dropout = nnx.Param(jnp.zeros((0, 4))), nnx.Dropout(0.5)
            self.out = nnx.Linear(4, 3, rngs=rngs)

        def __call__(self, x, key):
            return self.out(self.dropout(x, deterministic=False, rngs=key))

    inputs = jnp.arange(8.0).reshape(2, 4), jax.random.key(0)
    found = bisect(Twin(Linen, lambda rngs: Nnx(rngs), lambda: inputs))

    assert verdicts(found) == {"exact": 3} and not found.notes


# Comparing


@given(st.lists(st.integers(0, 3), max_size=8), st.lists(st.integers(0, 3), max_size=8))
def test_places_in_order_pair_equal_items_as_many_as_can_be(one, two):
    pairs = in_order(one, two)

    assert all(one[a] == two[b] for a, b in pairs)
    assert all(a < c and b < d for (a, b), (c, d) in itertools.pairwise(pairs))
    most = max(
        (
            bin(mask).count("1")
            for mask in range(1 << len(one))
            if is_part([x for k, x in enumerate(one) if mask >> k & 1], two)
        ),
        default=0,
    )
    assert len(pairs) == most


def is_part(items, whole):
    rest = iter(whole)
    return all(item in rest for item in items)


def test_errors_are_counted_in_units_in_the_last_place_of_the_coarser_dtype():
    one = np.array([1.0, -3.0], np.float32)
    error = difference(one, np.nextafter(one, np.float32(9)))

    assert (error.exact, error.ulps) == (False, 1.0)
    assert error.absolute == 2.0**-22 and error.relative == 2.0**-22 / 3
    assert difference(one, one.astype(jnp.bfloat16)) == (False, 0.0, 0.0, 0.0)
    assert difference(one, one.copy()) == (True, 0.0, 0.0, 0.0)
    assert not difference(np.zeros(1), -np.zeros(1)).exact


def test_errors_of_integers_are_counted_in_ones():
    assert difference(np.array([7, 9]), np.array([7, 6])) == (False, 3.0, 3.0, 3 / 9)


def test_what_float64_keeps_apart_is_no_rounding_however_small():
    wide = np.linspace(1.0, 2.0, 9)
    own = wide.astype(np.float32)
    near = Value(np.nextafter(own, np.float32(9)), wide, wide)

    assert judge(Value(own, wide, wide), near)[1] == "rounding"
    apart = near._replace(wide=wide * (1 + 1e-7), nudged=wide * (1 + 1e-7))
    assert judge(Value(own, wide, wide), apart)[1] == "DIVERGES"
    # The same, but moving the constants moves it as far: one was rounded.
    assert judge(Value(own, wide, wide), apart._replace(nudged=wide))[1] == "rounding"


# The command


def twin_file(tmp_path, options):
    path = tmp_path / "twins.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"from faults import net\ntwin = net({options})\n"
    )
    return f"{path}:twin"


def test_the_command_prints_a_table_and_exits_with_one_if_twins_diverge(tmp_path, saved, capsys):
    png = tmp_path / "errors.png"
    rules = ["--rules", str(saved / "rules.yaml")]
    wrong = twin_file(tmp_path, "at=7, epsilon=1e-5")

    assert main(["bisect", wrong, str(saved / "nnx"), *rules, "--png", str(png)]) == 1

    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["Linen", "nnx"] and lines[1].split()[-1] == "verdict"
    marked = [line for line in lines if line.startswith("->")]
    assert len(marked) == 1 and marked[0].split()[1:3] == ["block_7/LayerNorm_0", "blocks/7/norm"]
    assert any(line.startswith("First divergence: block_7/LayerNorm_0") for line in lines)
    assert any(line.startswith("finding  `epsilon`") for line in lines)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_the_command_exits_with_zero_if_they_do_not_and_prints_json(tmp_path, capsys):
    assert main(["bisect", twin_file(tmp_path, "depth=2"), "--json"]) == 0

    content = json.loads(capsys.readouterr().out)
    assert content["diverged"] is False and content["first"] is None
    assert [line["linen"] for line in content["layers"]][:2] == [
        "block_0/LayerNorm_0",
        "block_0/up",
    ]
    assert content["layers"][1]["before"] == {
        "exact": True, "ulps": 0.0, "absolute": 0.0, "relative": 0.0,
    }  # fmt: skip


def test_the_command_refuses_a_twin_that_is_not_there(tmp_path, capsys):
    assert main(["bisect", str(tmp_path / "no.py:twin")]) == 1
    assert "there is no file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["bisect"])
    assert caught.value.code == 2
