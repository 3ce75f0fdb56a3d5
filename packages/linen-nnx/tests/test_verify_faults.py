"""Each planted fault is found and named by `verify`: in the bytes, or by running the models."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from convert_helpers import save
from verify_helpers import DEPTH, book, port, rename, trained, twin

from linen_nnx import verify
from linen_nnx.disk.convert import convert

BITS, MEANING = "every bit, through the rule book", "the rule book, against the models' code"
FORWARD = {"forward pass, the checkpoint's weights", "forward pass, randomised weights"}
STEP = "one optimizer step from the carried state"


@pytest.fixture(scope="module")
def linen(tmp_path_factory):
    return save(tmp_path_factory.mktemp("faults") / "linen", trained())


@pytest.fixture(scope="module")
def nnx(linen):
    """The converted checkpoint, as a tree that a test may damage."""
    convert(linen, linen.parent / "nnx", "nnx", rules=book())
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(linen.parent / "nnx")


def failures(linen, out, using=twin, **options):
    """What fails, by name, with what is said of it."""
    checks = verify(linen, out, twin=using, **options)
    return {c.name: " ".join(c.details) for c in checks if c.passed is False}


def damaged(linen, tmp_path, tree):
    save(tmp_path / "damaged", tree)
    return failures(linen, tmp_path / "damaged", to="nnx", rules=book())


def changed(tree, path, change):
    """The tree with one leaf changed."""
    head, _, rest = path.partition("/")
    value = tree[head]
    return {**tree, head: changed(value, rest, change) if rest else change(value)}


def test_the_right_conversion_passes_in_every_bit(linen, nnx):
    checks = verify(linen, linen.parent / "nnx", twin=twin)

    assert all(check.passed for check in checks if check.name != "digests of the source")
    assert not any(check.close for check in checks)
    assert {*FORWARD, STEP, "exact inverse"} < {check.name for check in checks}


# Rule books: the bytes agree with them, and so only the models can tell.

BY_NAME = sorted(range(DEPTH), key=str)  # 0, 1, 10, 11, 2, ...
WRONG_BOOKS = {
    "two leaves of one shape swapped": (
        {
            "block_3": [
                rename("params/blk_3/kernel", "blocks/5/kernel"),
                rename("params/blk_3/bias", "blocks/3/bias"),
            ],
            "block_5": [
                rename("params/blk_5/kernel", "blocks/3/kernel"),
                rename("params/blk_5/bias", "blocks/5/bias"),
            ],
        },
        ["`blocks/3/kernel` comes from `params/blk_5/kernel`, and must come from `params/blk_3/",
         "`blocks/5/kernel` comes from `params/blk_3/kernel`, and must come from `params/blk_5/"],
    ),
    "a square kernel transposed": (
        {
            "block_7": [
                rename("params/blk_7/kernel", "blocks/7/kernel",
                       ops=[{"op": "transpose", "perm": [1, 0]}]),
                rename("params/blk_7/bias", "blocks/7/bias"),
            ],
        },
        ["`blocks/7/kernel` comes from `params/blk_7/kernel`, with its elements in the wrong"],
    ),
    "mean and variance swapped": (
        {
            "mean": rename("batch_stats/bn/mean", "norm/var"),
            "var": rename("batch_stats/bn/var", "norm/mean"),
        },
        ["`norm/mean` comes from `batch_stats/bn/var`, and must come from `batch_stats/bn/mean`"],
    ),
    "blocks in the order of their names as text": (
        {
            f"block_{i}": rename(f"params/blk_{i}/{{leaf}}", f"blocks/{BY_NAME.index(i)}/{{leaf}}")
            for i in range(DEPTH)
        },
        ["`blocks/2/kernel` comes from `params/blk_10/kernel`, and must come from `params/blk_2/"],
    ),
}  # fmt: skip


@pytest.mark.sampled(2)
@pytest.mark.parametrize("fault", WRONG_BOOKS)
def test_a_wrong_rule_is_found_by_the_models_and_named(linen, tmp_path, fault):
    changes, named = WRONG_BOOKS[fault]
    convert(linen, tmp_path / "out", "nnx", rules=book(**changes))
    failed = failures(linen, tmp_path / "out")

    assert failed.keys() >= {*FORWARD, MEANING} and BITS not in failed
    assert all(text in failed[MEANING] for text in named)
    assert "blocks/0/kernel" not in failed[MEANING]


def test_a_dropped_bias_is_found_by_the_forward_pass_on_the_checkpoints_weights(linen, tmp_path):
    gone = [
        {"linen": "params/out/bias", "ops": [{"op": "drop"}]},
        {
            "nnx": "out/bias",
            "ops": [{"op": "init", "fill": "zeros", "shape": [3], "dtype": "float32"}],
        },
    ]
    rules = book(out_bias=gone)
    convert(linen, tmp_path / "out", "nnx", rules=rules, reset_optimizer=True)
    checks = {c.name: c for c in verify(linen, tmp_path / "out", twin=twin)}

    assert checks["forward pass, the checkpoint's weights"].passed is False
    assert "params/out/bias" in checks["exact inverse"].details[0]


def test_a_wrong_epsilon_is_found_and_the_rule_book_cleared(linen, nnx):
    failed = failures(linen, linen.parent / "nnx", using=port(epsilon=1e-5))

    assert failed.keys() >= FORWARD and MEANING not in failed
    assert "not equal: in float64" in failed["forward pass, randomised weights"]


# Checkpoints: what the bytes show.


def test_one_element_changed_by_one_ulp_is_named(linen, nnx, tmp_path):
    def nudge(kernel):
        kernel = np.array(kernel)
        kernel[2, 3] = np.nextafter(kernel[2, 3], np.float32(np.inf))
        return kernel

    failed = damaged(linen, tmp_path, changed(nnx, "model/blocks/4/kernel/value", nudge))

    assert "`model/blocks/4/kernel/value` differs from ['params/blk_4/kernel']" in failed[BITS]


def test_a_cast_to_bfloat16_is_named(linen, nnx, tmp_path):
    cast = changed(nnx, "model/blocks/4/kernel/value", lambda x: jnp.asarray(x, jnp.bfloat16))
    failed = damaged(linen, tmp_path, cast)

    said = failed["coverage, shapes, dtypes"]
    assert "`blocks/4/kernel` would be float32[8,8]" in said and "bfloat16[8,8]" in said


def test_a_missing_bias_is_named(linen, nnx, tmp_path):
    failed = damaged(
        linen, tmp_path, changed(nnx, "model/out", lambda out: {"kernel": out["kernel"]})
    )

    assert "out/bias" in failed["coverage, shapes, dtypes"]


def test_a_moment_left_behind_is_named_and_changes_the_step(linen, nnx, tmp_path):
    moment = "optimizer/opt_state/1/0/nu/blocks/6/kernel/value"
    failed = damaged(linen, tmp_path, changed(nnx, moment, jnp.zeros_like))

    assert f"`{moment}` differs" in failed[BITS]
    assert "blocks/6/kernel" in failed[STEP]
    assert not failed.keys() & FORWARD


def test_a_nan_fails_whoever_has_it(tmp_path):
    state = trained()
    bad = changed(state.params, "blk_2/bias", lambda x: x.at[0].set(jnp.nan))
    save(tmp_path / "linen", state.replace(params=bad))
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=book())
    failed = failures(tmp_path / "linen", tmp_path / "nnx")

    assert BITS not in failed
    assert "not finite before" in failed["forward pass, the checkpoint's weights"]


def test_a_checkpoint_of_another_model_is_refused_leaf_by_leaf(linen, nnx):
    other = dataclasses.replace(twin, linen=lambda: nn.Dense(4))
    said = failures(linen, linen.parent / "nnx", using=other)[
        "leaves, as the models' code has them"
    ]

    assert "`params/kernel` is missing, the linen model has float32[8,4]" in said
    assert "`params/blk_0/kernel` is float32[8,8], the linen model has none" in said
