"""Training goes on from a converted checkpoint as if nothing had happened, bit for bit."""

import jax
import numpy as np
import optax
import pytest
from convert_helpers import (
    RENAMES,
    bits,
    linen_state,
    linen_train,
    nnx_state,
    nnx_train,
    nnx_tree,
    restore,
    save,
)
from flax import nnx

from linen_nnx.disk.convert import convert


def _is_kernel(path, _):
    return "kernel" in jax.tree_util.keystr(path)


def _labels(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: "decayed" if _is_kernel(path, leaf) else "plain", params
    )


def _mask(params):
    return jax.tree_util.tree_map_with_path(_is_kernel, params)


OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "lion": lambda: optax.lion(1e-2),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=4),
    "chain with clip": lambda: optax.chain(
        optax.clip_by_global_norm(0.1), optax.sgd(optax.linear_schedule(0.1, 0.0, 20), momentum=0.9)
    ),
    "multi_transform": lambda: optax.multi_transform(
        {"decayed": optax.adamw(1e-2), "plain": optax.sgd(1e-2, momentum=0.9)}, _labels
    ),
    "masked": lambda: optax.chain(optax.masked(optax.scale_by_adam(), _mask), optax.scale(-1e-2)),
    "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2),
    "ema": lambda: optax.chain(optax.adam(1e-2), optax.ema(0.9)),
}


def load_nnx(path, tx):
    model, optimizer, ema = nnx_state(tx)
    restored = restore(path, nnx_tree(model, optimizer, ema))
    nnx.update(model, restored["model"])
    nnx.update(optimizer, restored["optimizer"])
    return model, optimizer, restored["ema"]


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_linen_training_goes_on_in_nnx(tmp_path, name):
    tx = OPTIMIZERS[name]()
    state, _ = linen_train(linen_state(tx), range(3))
    save(tmp_path / "linen", state)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=RENAMES)
    ema, losses = nnx_train(*load_nnx(tmp_path / "nnx", tx), range(3, 8))
    expected, expected_losses = linen_train(state, range(3, 8))
    assert [x.tobytes() for x in losses] == [x.tobytes() for x in expected_losses]
    nnx_ema = sorted(np.asarray(x).tobytes() for x in jax.tree.leaves(ema))
    assert nnx_ema == sorted(np.asarray(x).tobytes() for x in jax.tree.leaves(expected.ema))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nnx_training_goes_on_in_linen(tmp_path, name):
    tx = OPTIMIZERS[name]()
    model, optimizer, ema = nnx_state(tx)
    ema, _ = nnx_train(model, optimizer, ema, range(3))
    save(tmp_path / "nnx", nnx_tree(model, optimizer, ema))
    fresh = linen_state(tx)
    save(tmp_path / "fresh", fresh)
    convert(tmp_path / "nnx", tmp_path / "linen", "linen", rules=RENAMES, like=tmp_path / "fresh")
    state, losses = linen_train(restore(tmp_path / "linen", fresh), range(3, 8))
    ema, expected = nnx_train(model, optimizer, ema, range(3, 8))
    assert [x.tobytes() for x in losses] == [x.tobytes() for x in expected]
    assert int(state.step) == 8


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_there_and_back_is_identical(tmp_path, name):
    state, _ = linen_train(linen_state(OPTIMIZERS[name]()), range(3))
    save(tmp_path / "linen", state)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=RENAMES)
    convert(tmp_path / "nnx", tmp_path / "back", "linen")
    assert bits(restore(tmp_path / "back")) == bits(restore(tmp_path / "linen"))
    assert bits(restore(tmp_path / "back", state)) == bits(state)
