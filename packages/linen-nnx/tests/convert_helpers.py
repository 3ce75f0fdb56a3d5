"""A Linen model, its nnx port, and stock Flax and Orbax around them: what a stranger would have."""

import json
import os
import socket
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

from linen_nnx import RuleBook

WIDTH = 8


class LinenNet(nn.Module):
    depth: int = 3
    stacked: bool = False
    width: int = WIDTH

    @nn.compact
    def __call__(self, x, train=True):
        if self.stacked:
            body = nn.scan(
                _Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.depth
            )
            x, _ = body(name="blk")(x, None)
        else:
            for i in range(self.depth):
                x = nn.relu(nn.Dense(self.width, name=f"blk_{i}")(x))
        x = nn.BatchNorm(use_running_average=not train, name="bn")(x)
        return nn.Dense(1, name="out")(x)


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.relu(nn.Dense(WIDTH, name="fc")(x)), None


class NnxNet(nnx.Module):
    def __init__(self, rngs, depth=3):
        self.blocks = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.out = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x):
        for block in self.blocks:
            x = nnx.relu(block(x))
        return self.out(self.norm(x))


def _book(blocks: list[dict[str, Any]]) -> RuleBook:
    rules = [
        *blocks,
        {"linen": "params/bn/scale", "nnx": "norm/scale"},
        {"linen": "params/bn/bias", "nnx": "norm/bias"},
        {"linen": "batch_stats/bn/{name}", "nnx": "norm/{name}"},
        {"linen": "params/out/{name}", "nnx": "out/{name}"},
    ]
    rules[-2:-1] = [
        {"linen": f"batch_stats/bn/{name}", "nnx": f"norm/{name}"} for name in ("mean", "var")
    ]
    return RuleBook.from_dict({"version": 1, "rules": rules})


RENAMES = _book([{"linen": "params/blk_{i}/{name}", "nnx": "blocks/{i}/{name}"}])
STACKS = _book(
    [
        {
            "linen": "params/blk/fc/{name}",
            "nnx": "blocks/{i}/{name}",
            "ops": [{"op": "stack", "capture": "i", "axis": 0}],
        }
    ]
)


class State(TrainState):
    batch_stats: Any
    ema: Any


def inputs(step=0, batch=4):
    rng = np.random.default_rng(step)
    x = rng.standard_normal((batch, WIDTH)).astype(np.float32)
    return jnp.asarray(x), jnp.asarray(x[:, :1] ** 2)


def linen_state(tx, **kwargs):
    """A fresh Linen training state."""
    model = LinenNet(**kwargs)
    variables = model.init(jax.random.key(0), inputs()[0])
    return State.create(
        apply_fn=model.apply,
        params=variables["params"],
        tx=tx,
        batch_stats=variables["batch_stats"],
        ema=variables["params"],
    )


@jax.jit
def linen_step(state, x, y):
    def loss_of(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        out, updates = state.apply_fn(variables, x, mutable=["batch_stats"])
        return jnp.mean((out - y) ** 2), updates["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    state = state.apply_gradients(grads=grads)
    ema = optax.incremental_update(state.params, state.ema, 0.1)
    return state.replace(batch_stats=stats, ema=ema), loss


def linen_train(state, steps):
    """Trains over the given step numbers; the state after them, and every loss."""
    losses = []
    for step in steps:
        state, loss = linen_step(state, *inputs(step))
        losses.append(np.asarray(loss))
    return state, losses


def nnx_state(tx, depth=3):
    """A fresh nnx model, its optimizer, and an EMA of its parameters."""
    model = NnxNet(nnx.Rngs(1), depth)
    model.train()
    return model, nnx.Optimizer(model, tx, wrt=nnx.Param), nnx.state(model, nnx.Param)


@nnx.jit
def nnx_step(model, optimizer, x, y):
    loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
    optimizer.update(model, grads)
    return loss


@partial(jax.jit)
def _average(new, old):
    return optax.incremental_update(new, old, 0.1)


def nnx_train(model, optimizer, ema, steps):
    """Trains in place over the given step numbers; the EMA after them, and every loss."""
    losses = []
    for step in steps:
        losses.append(np.asarray(nnx_step(model, optimizer, *inputs(step))))
        ema = _average(nnx.state(model, nnx.Param), ema)
    return ema, losses


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
    return path


def restore(path, like=None):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


def nnx_tree(model, optimizer, ema):
    """What a converted TrainState restores into."""
    return {"model": nnx.state(model), "optimizer": nnx.state(optimizer), "ema": ema}


def bits(tree):
    """Every leaf of a tree as (path, dtype, shape, bytes), paths as text."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]

    def raw(leaf):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return str(leaf.dtype), np.asarray(jax.random.key_data(leaf)).tobytes()
        array = np.asarray(leaf)
        return str(array.dtype), array.shape, array.tobytes()

    return {jax.tree_util.keystr(path): raw(leaf) for path, leaf in leaves}


SMALL = RuleBook.from_dict(
    {"version": 1, "rules": [{"linen": "params/a/{leaf}", "nnx": "b/{leaf}"}]}
)


def save_small(path):
    """A checkpoint of one array in a data file and one in the tree, and its rule book."""
    save(path, {"params": {"a": {"kernel": jnp.arange(4096.0), "bias": jnp.arange(4.0)}}})
    SMALL.save(path / "rules.yaml")
    return path


def save_zarr(path, compressor, **more):
    """The same as Orbax saves it with a folder for each array, by hand; `more` is metadata."""
    tree = {}
    for name, array in (("kernel", np.arange(4096, dtype=np.float32)), ("bias", np.ones(4, "<f4"))):
        metadata = {"shape": list(array.shape), "chunks": [min(array.size, 1024)], "dtype": "<f4"}
        metadata |= {"compressor": compressor, "fill_value": None, **more}
        base = {"driver": "file", "path": f"{path}/params.a.{name}/"}
        spec = {"driver": "zarr", "kvstore": base, "metadata": metadata}
        ts.open(spec, create=True).result().write(array).result()
        keys = [{"key": key, "key_type": 2} for key in ("params", "a", name)]
        value = {"value_type": "np.ndarray", "skip_deserialize": False}
        tree[str(("params", "a", name))] = {"key_metadata": keys, "value_metadata": value}
    header = {"tree_metadata": tree, "use_ocdbt": False, "use_zarr3": False}
    (path / "_METADATA").write_text(json.dumps(header))
    SMALL.save(path / "rules.yaml")
    return path


def make_socket(path):
    """A socket in the place of a file."""
    before = os.getcwd()
    os.chdir(path.parent)  # its whole path may be longer than a socket's can be
    try:
        with socket.socket(socket.AF_UNIX) as one:
            one.bind(path.name)
    finally:
        os.chdir(before)
