"""Twins in the styles of public ports: one function written in two ways, each with its true rules.

Beside `pairs.py`, whose two sides compute step by step the same. Here rotations, scales, products
and sums stand elsewhere, leaves are kept twice or by one side alone, and the sides are called, and
return, in different ways. The rules are written by hand from reading the two models.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from pairs import SEQ, TOKENS, D, Pair, X, linear, same

from linen_nnx import Twin

PORTED: dict[str, Callable[[], Pair]] = {}
HEADS, SIZE = 2, 4  # of attention: 2 heads of 4 columns
WIDE = HEADS * SIZE


def ported(make: Callable[[], Pair]) -> Callable[[], Pair]:
    PORTED[make.__name__] = make
    return make


def only_nnx(*paths: str) -> list[dict[str, Any]]:
    """Leaves of nnx alone. Their values are the constructor's, which the tests look at."""
    return [{"nnx": path, "ops": [{"op": "drop"}]} for path in paths]


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """(batch, length, heads, size) of each to the same; heads of k and v may be fewer."""
    k, v = (jnp.repeat(a, q.shape[2] // a.shape[2], axis=2) for a in (k, v))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / SIZE**0.5, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def angles(length: int) -> tuple[jax.Array, jax.Array]:
    at = jnp.arange(length)[:, None] * 10.0 ** -jnp.arange(SIZE // 2)
    return jnp.cos(at)[:, None], jnp.sin(at)[:, None]


def turned_whole(x: jax.Array) -> jax.Array:
    """Rotary embedding as Hugging Face writes it."""
    cos, sin = (jnp.concatenate([a, a], -1) for a in angles(x.shape[1]))
    a, b = x[..., : SIZE // 2], x[..., SIZE // 2 :]
    return x * cos + jnp.concatenate([-b, a], -1) * sin


def turned_halves(x: jax.Array) -> jax.Array:
    """Rotary embedding as Gemma and MaxText write it."""
    cos, sin = angles(x.shape[1])
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def turned_pairs(x: jax.Array) -> jax.Array:
    """Rotary embedding as a product of complex numbers."""
    cos, sin = angles(x.shape[1])
    a, b = x[..., : SIZE // 2], x[..., SIZE // 2 :]
    turned = (a + 1j * b) * (cos + 1j * sin)
    return jnp.concatenate([turned.real, turned.imag], -1)


def heads(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-1], -1, SIZE)


def flat(x: jax.Array) -> jax.Array:
    return x.reshape(*x.shape[:-2], -1)


@ported
def llama() -> Pair:
    """Grouped queries, rotary embeddings in two styles, one gated product against two."""

    class LinenBlock(nn.Module):
        @nn.compact
        def __call__(self, x):
            def dense(width, name):
                return nn.Dense(width, use_bias=False, name=name)

            h = nn.RMSNorm(name="input_layernorm")(x)
            q, k, v = (
                heads(dense(width, name)(h))
                for width, name in ((WIDE, "q_proj"), (SIZE, "k_proj"), (SIZE, "v_proj"))
            )
            x = x + dense(WIDE, "o_proj")(flat(attend(turned_whole(q), turned_whole(k), v)))
            h = nn.RMSNorm(name="post_attention_layernorm")(x)
            h = nn.silu(dense(12, "gate_proj")(h)) * dense(12, "up_proj")(h)
            return x + dense(WIDE, "down_proj")(h)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            x = nn.Embed(11, WIDE, name="embed_tokens")(tokens)
            for k in range(2):
                x = LinenBlock(name=f"layers_{k}")(x)
            return nn.Dense(11, use_bias=False, name="lm_head")(nn.RMSNorm(name="norm")(x))

    class Block(nnx.Module):
        def __init__(self, rngs):
            def dense(a, b):
                return nnx.Linear(a, b, use_bias=False, rngs=rngs)

            self.before, self.between = (nnx.RMSNorm(WIDE, rngs=rngs) for _ in range(2))
            self.q, self.k, self.v = dense(WIDE, WIDE), dense(WIDE, SIZE), dense(WIDE, SIZE)
            self.o, self.up, self.down = dense(WIDE, WIDE), dense(WIDE, 24), dense(12, WIDE)

        def __call__(self, x):
            h = self.before(x)
            q, k, v = (heads(layer(h)) for layer in (self.q, self.k, self.v))
            x = self.o(flat(attend(turned_halves(q), turned_halves(k), v))) + x
            gate, value = jnp.split(self.up(self.between(x)), 2, axis=-1)
            return self.down(value * nnx.silu(gate)) + x

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, WIDE, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in range(2)])
            self.norm = nnx.RMSNorm(WIDE, rngs=rngs)
            self.head = nnx.Linear(WIDE, 11, use_bias=False, rngs=rngs)

        def __call__(self, tokens):
            x = self.embed(tokens)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    names = [(f"{name}_proj", name) for name in "qkvo"] + [("down_proj", "down")]
    rules = [same(f"params/layers_{{i}}/{a}/kernel", f"blocks/{{i}}/{b}/kernel") for a, b in names]
    norms = [("input_layernorm", "before"), ("post_attention_layernorm", "between")]
    rules += [same(f"params/layers_{{i}}/{a}/scale", f"blocks/{{i}}/{b}/scale") for a, b in norms]
    gates = [f"params/layers_{{i}}/{name}_proj/kernel" for name in ("gate", "up")]
    joined = [{"op": "concat", "axis": -1}]
    rules.append({"linen": gates, "nnx": "blocks/{i}/up/kernel", "ops": joined})
    rules.append(same("params/embed_tokens/embedding", "embed/embedding"))
    rules.append(same("params/norm/scale", "norm/scale"))
    rules.append(same("params/lm_head/kernel", "head/kernel"))
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (TOKENS,)), rules)


@ported
def complex_rotation() -> Pair:
    """Rotary embeddings as a product of complex numbers, heads split by the kernel's shape."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k, v = (
                nn.DenseGeneral((HEADS, SIZE), use_bias=False, name=name)(x) for name in "qkv"
            )
            y = attend(turned_whole(q), turned_whole(k), v)
            return nn.DenseGeneral(D, axis=(-2, -1), use_bias=False, name="o")(y)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            def dense(a, b):
                return nnx.Linear(a, b, use_bias=False, rngs=rngs)

            self.key, self.query, self.value = (dense(D, WIDE) for _ in range(3))
            self.out = dense(WIDE, D)

        def __call__(self, x):
            q, k, v = (heads(layer(x)) for layer in (self.query, self.key, self.value))
            return self.out(flat(attend(turned_pairs(q), turned_pairs(k), v)))

    merge = {"op": "reshape", "linen": [D, HEADS, SIZE], "nnx": [D, WIDE]}
    rules = [
        same(f"params/{a}/kernel", f"{b}/kernel", merge)
        for a, b in (("q", "query"), ("k", "key"), ("v", "value"))
    ]
    back = {"op": "reshape", "linen": [HEADS, SIZE, D], "nnx": [WIDE, D]}
    rules.append(same("params/o/kernel", "out/kernel", back))
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (SEQ,)), rules)


@ported
def mixture_of_experts() -> Pair:
    """Experts stacked in one leaf and an einsum against a list that is looped over."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            normal = nn.initializers.normal()
            up = self.param("wi", normal, (3, D, 8))
            down = self.param("wo", normal, (3, 8, D))
            gates = jax.nn.softmax(nn.Dense(3, use_bias=False, name="router")(x))
            h = nn.gelu(jnp.einsum("btd,edh->bteh", x, up))
            return x + jnp.einsum("bteh,ehd,bte->btd", h, down, gates)

    class Expert(nnx.Module):
        def __init__(self, rngs):
            self.into = nnx.Linear(D, 8, use_bias=False, rngs=rngs)
            self.out = nnx.Linear(8, D, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.gelu(self.into(x)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.experts = nnx.List([Expert(rngs) for _ in range(3)])
            self.gate = nnx.Linear(D, 3, use_bias=False, rngs=rngs)

        def __call__(self, x):
            gates = jax.nn.softmax(self.gate(x))
            each = [gates[..., k : k + 1] * expert(x) for k, expert in enumerate(self.experts)]
            return each[2] + (each[0] + each[1]) + x

    stacked = [{"op": "stack", "capture": "i", "axis": 0}]
    rules = [
        {"linen": f"params/{a}", "nnx": f"experts/{{i}}/{b}/kernel", "ops": stacked}
        for a, b in (("wi", "into"), ("wo", "out"))
    ]
    rules.append(same("params/router/kernel", "gate/kernel"))
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (SEQ,)), rules)


@ported
def diffusion_unet() -> Pair:
    """Skips by concatenation, time embedded with a table that nnx keeps in a Variable."""

    def table(width: int) -> jax.Array:
        return 100.0 ** (-jnp.arange(width // 2) / (width // 2))

    def embedded(t: jax.Array, rates: jax.Array) -> jax.Array:
        at = t[:, None] * rates
        return jnp.concatenate([jnp.sin(at), jnp.cos(at)], -1)

    class LinenRes(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x, t):
            h = nn.Conv(self.width, (3, 3))(nn.swish(nn.GroupNorm(2)(x)))
            h = h + nn.Dense(self.width)(nn.swish(t))[:, None, None]
            h = nn.Conv(self.width, (3, 3))(nn.swish(nn.GroupNorm(2)(h)))
            skip = x if x.shape[-1] == self.width else nn.Conv(self.width, (1, 1), name="skip")(x)
            return h + skip

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x, t):
            t = nn.Dense(8)(embedded(t, table(8)))
            first = nn.Conv(4, (3, 3), name="into")(x)
            down = LinenRes(4, name="down")(first, t)
            low = LinenRes(4, name="middle")(nn.avg_pool(down, (2, 2), (2, 2)), t)
            up = jax.image.resize(low, down.shape, "nearest")
            up = LinenRes(4, name="up")(jnp.concatenate([up, down], -1), t)
            return nn.Conv(1, (3, 3), name="out")(up)

    class Res(nnx.Module):
        def __init__(self, a, b, rngs):
            self.norms = nnx.List([nnx.GroupNorm(n, num_groups=2, rngs=rngs) for n in (a, b)])
            self.time = linear(rngs, 8, b)
            self.conv2 = nnx.Conv(b, b, (3, 3), rngs=rngs)
            self.conv1 = nnx.Conv(a, b, (3, 3), rngs=rngs)
            self.skip = nnx.Conv(a, b, (1, 1), rngs=rngs) if a != b else None

        def __call__(self, x, t):
            skip = x if self.skip is None else self.skip(x)
            h = self.conv1(nnx.swish(self.norms[0](x)))
            h = self.time(nnx.swish(t))[:, None, None] + h
            return skip + self.conv2(nnx.swish(self.norms[1](h)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.rates = nnx.Variable(table(8))
            self.time = linear(rngs, 8, 8)
            self.last, self.first = (nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in ((4, 1), (1, 4)))
            self.up, self.middle, self.down = Res(8, 4, rngs), Res(4, 4, rngs), Res(4, 4, rngs)

        def __call__(self, x, t):
            t = self.time(embedded(t, self.rates[...]))
            down = self.down(self.first(x), t)
            low = self.middle(nnx.avg_pool(down, (2, 2), (2, 2)), t)
            up = jax.image.resize(low, down.shape, "nearest")
            return self.last(self.up(jnp.concatenate([up, down], -1), t))

    rules = [same("params/Dense_0/{leaf}", "time/{leaf}")]
    rules += [
        same(f"params/{a}/{{leaf}}", f"{b}/{{leaf}}")
        for a, b in (("into", "first"), ("out", "last"))
    ]
    for name in ("down", "middle", "up"):
        rules.append(
            same(f"params/{name}/GroupNorm_{{i}}/{{leaf}}", f"{name}/norms/{{i}}/{{leaf}}")
        )
        rules.append(same(f"params/{name}/Dense_0/{{leaf}}", f"{name}/time/{{leaf}}"))
        rules += [
            same(f"params/{name}/Conv_{k}/{{leaf}}", f"{name}/conv{k + 1}/{{leaf}}") for k in (0, 1)
        ]
    rules.append(same("params/up/skip/{leaf}", "up/skip/{leaf}"))
    image, time = jnp.linspace(-1, 1, 2 * 16).reshape(2, 4, 4, 1), jnp.array([0.3, 0.7])
    return Pair(
        Twin(Linen, lambda rngs: Nnx(rngs), lambda: (image, time)), [*rules, *only_nnx("rates")]
    )


class Ema(nnx.Variable):
    """A type of one's own, which Flax does not know by name."""


@ported
def vq_vae() -> Pair:
    """A codebook with counts, straight through; its Variables have types of their own."""

    def nearest(z: jax.Array, codes: jax.Array) -> jax.Array:
        return jnp.argmin(((z[..., None, :] - codes) ** 2).sum(-1), axis=-1)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            codes = self.variable(
                "vq", "codebook", nn.initializers.normal(), jax.random.key(1), (7, 3)
            )
            self.variable("vq", "counts", jnp.zeros, (7,))
            z = nn.Dense(3, name="into")(x)
            q = codes.value[nearest(z, codes.value)]
            return nn.Dense(D, name="out")(z + jax.lax.stop_gradient(q - z)), q

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.counts = Ema(jnp.zeros(7))
            self.codes = Ema(jax.random.normal(jax.random.key(2), (7, 3)))
            self.encoder, self.decoder = linear(rngs, D, 3), linear(rngs, 3, D)

        def __call__(self, x):
            z = self.encoder(x)
            q = self.codes[...][nearest(z, self.codes[...])]
            return self.decoder(z + jax.lax.stop_gradient(q - z)), q

    rules = [
        same("vq/codebook", "codes"),
        same("vq/counts", "counts"),
        same("params/into/{leaf}", "encoder/{leaf}"),
        same("params/out/{leaf}", "decoder/{leaf}"),
    ]
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (SEQ,)), rules)


@ported
def recurrent_with_attention() -> Pair:
    """A cell under nn.scan against a loop; one product of a concatenation against two added."""

    class Cell(nn.Module):
        @nn.compact
        def __call__(self, h, x):
            h = nn.tanh(nn.Dense(D, name="joint")(jnp.concatenate([x, h], -1)))
            return h, h

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            cell = nn.scan(
                Cell,
                variable_broadcast="params",
                split_rngs={"params": False},
                in_axes=1,
                out_axes=1,
            )(name="cell")
            last, states = cell(jnp.zeros_like(x[:, 0]), x)
            score = nn.Dense(1, use_bias=False, name="score")(
                nn.tanh(nn.Dense(5, name="mix")(jnp.concatenate(
                    [states, jnp.broadcast_to(last[:, None], states.shape)], -1))))  # fmt: skip
            return (jax.nn.softmax(score, axis=1) * states).sum(1)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.of_state = nnx.Linear(D, D, use_bias=False, rngs=rngs)
            self.of_input = linear(rngs)
            self.query, self.key = linear(rngs, D, 5), nnx.Linear(D, 5, use_bias=False, rngs=rngs)
            self.score = nnx.Linear(5, 1, use_bias=False, rngs=rngs)

        def __call__(self, x):
            h, states = jnp.zeros_like(x[:, 0]), []
            for step in range(x.shape[1]):
                h = nnx.tanh(self.of_input(x[:, step]) + self.of_state(h))
                states.append(h)
            states = jnp.stack(states, 1)
            score = self.score(nnx.tanh(self.key(states) + self.query(h)[:, None]))
            return (jax.nn.softmax(score, axis=1) * states).sum(1)

    joined = [{"op": "concat", "axis": 0}]
    rules = [
        {"linen": "params/cell/joint/kernel", "nnx": ["of_input/kernel", "of_state/kernel"],
         "ops": joined},
        same("params/cell/joint/bias", "of_input/bias"),
        {"linen": "params/mix/kernel", "nnx": ["key/kernel", "query/kernel"], "ops": joined},
        same("params/mix/bias", "query/bias"),
        same("params/score/kernel", "score/kernel"),
    ]  # fmt: skip
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (SEQ,)), rules)


@ported
def actor_and_critic() -> Pair:
    """A torso for both, and outputs in a dict against a tuple in another order."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.Dense(D, name="torso")(x))
            value = nn.Dense(1, name="critic")(h)
            scale = jnp.exp(self.param("log_std", nn.initializers.zeros, (2,)))
            return {"value": value, "mean": nn.Dense(2, name="actor")(h), "scale": scale}

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.torso, self.pi, self.v = linear(rngs), linear(rngs, D, 2), linear(rngs, D, 1)
            self.log_std = nnx.Param(jnp.zeros(2))

        def __call__(self, x):
            h = nnx.tanh(self.torso(x))
            return self.pi(h), jnp.exp(self.log_std[...]), self.v(h)

    names = [("torso", "torso"), ("critic", "v"), ("actor", "pi")]
    rules = [same(f"params/{a}/{{leaf}}", f"{b}/{{leaf}}") for a, b in names]
    rules.append(same("params/log_std", "log_std"))
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)), rules)


@ported
def graph_network() -> Pair:
    """Messages from a concatenation of both ends against a product of each, summed over edges."""
    senders, receivers = jnp.array([0, 1, 2, 0]), jnp.array([1, 2, 0, 2])

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, nodes):
            for k in range(2):
                ends = jnp.concatenate([nodes[senders], nodes[receivers]], -1)
                messages = nn.relu(nn.Dense(D, name=f"edge_{k}")(ends))
                total = jax.ops.segment_sum(messages, receivers, 3)
                nodes = nodes + nn.Dense(D, name=f"node_{k}")(total)
            return nodes.mean(0)

    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.node = linear(rngs)
            self.receive, self.send = linear(rngs), nnx.Linear(D, D, use_bias=False, rngs=rngs)

        def __call__(self, nodes):
            messages = nnx.relu(self.send(nodes)[senders] + self.receive(nodes)[receivers])
            return self.node(jnp.zeros_like(nodes).at[receivers].add(messages)) + nodes

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([Layer(rngs) for _ in range(2)])

        def __call__(self, nodes):
            for layer in self.layers:
                nodes = layer(nodes)
            return nodes.mean(0)

    ends = ["layers/{i}/send/kernel", "layers/{i}/receive/kernel"]
    rules = [
        {"linen": "params/edge_{i}/kernel", "nnx": ends, "ops": [{"op": "concat", "axis": 0}]},
        same("params/edge_{i}/bias", "layers/{i}/receive/bias"),
        same("params/node_{i}/{leaf}", "layers/{i}/node/{leaf}"),
    ]
    nodes = jnp.linspace(-1, 1, 3 * D).reshape(3, D) ** 3
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (nodes,)), rules)


@ported
def wavenet() -> Pair:
    """Dilated causal convolutions; the two gates in one convolution against two."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x, skips = nn.Conv(4, (1,), name="into")(x), 0.0
            for k in range(3):

                def conv(width, name, k=k):
                    return nn.Conv(width, (2,), kernel_dilation=2**k, padding="CAUSAL", name=name)

                h = nn.tanh(conv(4, f"filter_{k}")(x)) * nn.sigmoid(conv(4, f"gate_{k}")(x))
                skips = skips + nn.Conv(5, (1,), name=f"skip_{k}")(h)
                x = x + nn.Conv(4, (1,), name=f"res_{k}")(h)
            return nn.relu(skips) + x.mean(-1, keepdims=True)

    class Layer(nnx.Module):
        def __init__(self, k, rngs):
            self.both = nnx.Conv(4, 8, (2,), kernel_dilation=2**k, padding="CAUSAL", rngs=rngs)
            self.res, self.skip = (nnx.Linear(4, n, rngs=rngs) for n in (4, 5))

        def __call__(self, x):
            a, b = jnp.split(self.both(x), 2, axis=-1)
            h = nnx.sigmoid(b) * nnx.tanh(a)
            return self.res(h) + x, self.skip(h)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.into = nnx.Linear(D, 4, rngs=rngs)
            self.layers = nnx.List([Layer(k, rngs) for k in range(3)])

        def __call__(self, x):
            x, skips = self.into(x), []
            for layer in self.layers:
                x, skip = layer(x)
                skips.append(skip)
            return x.mean(-1, keepdims=True) + nnx.relu(skips[2] + (skips[0] + skips[1]))

    def plain(linen, nnx_, shape):
        merge = {"op": "reshape", "linen": [1, *shape], "nnx": list(shape)}
        return [same(f"params/{linen}/kernel", f"{nnx_}/kernel", merge),
                same(f"params/{linen}/bias", f"{nnx_}/bias")]  # fmt: skip

    joined = [{"op": "concat", "axis": -1}]
    gates = [f"params/{name}_{{i}}/{{leaf}}" for name in ("filter", "gate")]
    rules = plain("into", "into", (D, 4))
    rules += plain("skip_{i}", "layers/{i}/skip", (4, 5)) + plain(
        "res_{i}", "layers/{i}/res", (4, 4)
    )
    rules.append({"linen": gates, "nnx": "layers/{i}/both/{leaf}", "ops": joined})
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (SEQ,)), rules)


@ported
def scan_over_remat() -> Pair:
    """nn.scan over nn.remat against a list; a residual summed in another order; a learned scale."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            scale = self.param("scale", nn.initializers.ones, ())
            return x + scale * nn.Dense(D)(nn.relu(nn.Dense(8)(nn.LayerNorm()(x)))), None

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(
                nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
            )
            return layers(name="blocks")(x, None)[0]

    class NnxBlock(nnx.Module):
        def __init__(self, rngs):
            self.scale = nnx.Param(jnp.ones(()))
            self.down, self.up = linear(rngs, 8, D), linear(rngs, D, 8)
            self.norm = nnx.LayerNorm(D, rngs=rngs)

        def __call__(self, x):
            h = nnx.relu(self.up(self.norm(x)))
            return (self.scale[...] * h) @ self.down.kernel + self.scale[...] * self.down.bias + x

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([NnxBlock(rngs) for _ in range(3)])

        def __call__(self, x):
            for layer in self.layers:
                x = nnx.remat(lambda block, x: block(x))(layer, x)
            return x

    stacked = [{"op": "stack", "capture": "i", "axis": 0}]
    names = [("Dense_0/{leaf}", "down/{leaf}"), ("Dense_1/{leaf}", "up/{leaf}"),
             ("LayerNorm_0/{leaf}", "norm/{leaf}"), ("scale", "scale")]  # fmt: skip
    rules = [
        {"linen": f"params/blocks/{a}", "nnx": f"layers/{{i}}/{b}", "ops": stacked}
        for a, b in names
    ]
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)), rules)


@ported
def parts_without_a_gradient() -> Pair:
    """Rows that no example looks up, biases that softmax cancels, pixels flattened by channels."""
    places = jnp.sin(jnp.arange(4.0 * D)).reshape(4, D)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            first, second = nn.Embed(11, D, name="early"), nn.Embed(7, D, name="late")
            x = jnp.concatenate([first(tokens[:, :2]), second(tokens[:, 2:])], 1) + places
            q, k, v = (nn.Dense(D, name=name)(x) for name in "qkv")
            y = x + nn.softmax(q @ k.swapaxes(1, 2)) @ v
            return nn.Dense(3, name="out")(y.reshape(len(y), -1))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(18, D, rngs=rngs)
            self.qkv, self.out = linear(rngs, D, 3 * D), linear(rngs, 4 * D, 3)

        def __call__(self, tokens):
            x = self.table(tokens + jnp.array([0, 0, 11, 11])) + places
            q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
            y = jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v + x
            return self.out(y.swapaxes(1, 2).reshape(len(y), -1))

    tables = ["params/early/embedding", "params/late/embedding"]
    after = {"op": "concat", "axis": 0, "sizes": [11, 7]}
    rules = [{"linen": tables, "nnx": "table/embedding", "ops": [after]}]
    fused = [f"params/{name}/{{leaf}}" for name in "qkv"]
    rules.append({"linen": fused, "nnx": "qkv/{leaf}", "ops": [{"op": "concat", "axis": -1}]})
    cut = {"op": "reshape", "linen": [4 * D, 3], "nnx": [4, D, 3]}
    merged = {"op": "reshape", "linen": [D, 4, 3], "nnx": [4 * D, 3]}
    turned = {"op": "transpose", "perm": [1, 0, 2]}
    rules.append(same("params/out/kernel", "out/kernel", cut, turned, merged))
    rules.append(same("params/out/bias", "out/bias"))
    tokens = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (tokens,)), rules)


# One source, two homes


@ported
def tied_head_that_the_port_unties() -> Pair:
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(11, D, name="shared")
            return embed.attend(nn.tanh(nn.Dense(D, name="mix")(embed(tokens))))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.embed, self.mix = nnx.Embed(11, D, rngs=rngs), linear(rngs)
            self.head = nnx.Linear(D, 11, use_bias=False, rngs=rngs)

        def __call__(self, tokens):
            return self.head(nnx.tanh(self.mix(self.embed(tokens))))

    homes = ["embed/embedding", "head/kernel"]
    copy = [{"op": "copy", "perms": [None, [1, 0]]}]
    rules = [{"linen": "params/shared/embedding", "nnx": homes, "ops": copy}]
    rules.append(same("params/mix/{leaf}", "mix/{leaf}"))
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (TOKENS,)), rules)


@ported
def two_tables_that_the_port_ties() -> Pair:
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, i, j):
            x = nn.Dense(D, name="mix")(nn.Embed(11, D, name="encoder")(i)).mean(1, keepdims=True)
            return nn.Dense(3, name="out")(nn.Embed(11, D, name="decoder")(j) + x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.table = nnx.Embed(11, D, rngs=rngs)
            self.out, self.mix = linear(rngs, D, 3), linear(rngs)

        def __call__(self, i, j):
            return self.out(self.mix(self.table(i)).mean(1, keepdims=True) + self.table(j))

    homes = ["params/decoder/embedding", "params/encoder/embedding"]
    rules = [{"linen": homes, "nnx": "table/embedding", "ops": [{"op": "copy"}]}]
    rules += [same(f"params/{name}/{{leaf}}", f"{name}/{{leaf}}") for name in ("mix", "out")]
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (TOKENS, TOKENS[:, :2])), rules)


# Leaves of one side alone


@ported
def key_biases_and_a_mask() -> Pair:
    """nnx's attention has a bias for keys, which changes nothing, a causal mask, and positions."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = x + jnp.sin(jnp.arange(x.shape[1])[:, None] * jnp.arange(1, D + 1))
            q = nn.Dense(D, name="q")(x)
            k = nn.Dense(D, use_bias=False, name="k")(x)
            scores = q @ k.swapaxes(1, 2)
            allowed = jnp.tril(jnp.ones(scores.shape[1:], bool))
            weights = jax.nn.softmax(jnp.where(allowed, scores, -jnp.inf))
            return nn.Dense(D, name="o")(weights @ nn.Dense(D, name="v")(x))

    class Constant(nnx.Variable):
        pass

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.query, self.key, self.value, self.out = (linear(rngs) for _ in range(4))
            self.mask = Constant(jnp.tril(jnp.ones((5, 5), bool)))
            self.places = jnp.sin(jnp.arange(5)[:, None] * jnp.arange(1, D + 1))

        def __call__(self, x):
            x = x + self.places
            scores = self.query(x) @ self.key(x).swapaxes(1, 2)
            weights = jax.nn.softmax(jnp.where(self.mask[...], scores, -jnp.inf))
            return self.out(weights @ self.value(x))

    names = [("q", "query"), ("v", "value"), ("o", "out")]
    rules = [same(f"params/{a}/{{leaf}}", f"{b}/{{leaf}}") for a, b in names]
    rules.append(same("params/k/kernel", "key/kernel"))
    twin = Twin(Linen, lambda rngs: Nnx(rngs), lambda: (SEQ,))
    return Pair(twin, [*rules, *only_nnx("key/bias", "mask")])


@ported
def adapters() -> Pair:
    """Low-rank additions of Flax's own kind, and one written by hand as plain parameters."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="out")(nn.relu(nn.Dense(8, name="up")(x)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.LoRALinear(D, 8, lora_rank=2, rngs=rngs)
            self.out = linear(rngs, 8, 3)
            self.narrow = nnx.Param(jax.random.normal(rngs.params(), (8, 1)))
            self.wide = nnx.Param(jnp.zeros((1, 3)))

        def __call__(self, x):
            h = nnx.relu(self.up(x))
            return self.out(h) + h @ self.narrow[...] @ self.wide[...]

    rules = [same("params/up/{leaf}", "up/{leaf}"), same("params/out/{leaf}", "out/{leaf}")]
    added = only_nnx("up/lora/lora_a", "up/lora/lora_b", "narrow", "wide")
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)), [*rules, *added])


@ported
def frozen_backbone() -> Pair:
    """Linen stops the gradient behind its backbone, nnx freezes by the optimizer's filter."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.tanh(nn.Dense(D, name="one")(x)) + nn.tanh(nn.Dense(D, name="two")(x))
            return nn.Dense(3, name="head")(jax.lax.stop_gradient(h))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.two, self.one = linear(rngs), linear(rngs)
            self.head = linear(rngs, D, 3)

        def __call__(self, x):
            return self.head(nnx.tanh(self.one(x)) + nnx.tanh(self.two(x)))

    rules = [same(f"params/{name}/{{leaf}}", f"{name}/{{leaf}}") for name in ("one", "two", "head")]
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)), rules)


# How they are called, and what they return


@dataclasses.dataclass
class Output:
    """What a model of the `transformers` kind returns; no pytree."""

    logits: Any
    hidden: Any


@ported
def evaluation_and_a_model_output() -> Pair:
    """Linen wants `train`, nnx starts in train mode; an array against a dataclass of two."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x, train: bool):
            h = nn.BatchNorm(use_running_average=not train, name="norm")(nn.Dense(D, name="up")(x))
            return nn.Dense(3, name="out")(nn.Dropout(0.5)(h, deterministic=not train))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.up, self.out = linear(rngs), linear(rngs, D, 3)
            self.norm = nnx.BatchNorm(D, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x):
            h = self.norm(self.up(x))
            return Output(logits=self.out(self.drop(h)), hidden=h)

    rules = [same(f"params/{name}/{{leaf}}", f"{name}/{{leaf}}") for name in ("up", "out")]
    rules += [same(f"params/norm/{leaf}", f"norm/{leaf}") for leaf in ("scale", "bias")]
    rules += [same(f"batch_stats/norm/{leaf}", f"norm/{leaf}") for leaf in ("mean", "var")]
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)), rules)


@ported
def temperature_before_a_product() -> Pair:
    """A learned scalar multiplied into a kernel, a query, or a result."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            one, two, three = (self.param(f"t{k}", nn.initializers.ones, ()) for k in range(3))
            x = one * nn.Dense(D, use_bias=False, name="a")(x)
            x = nn.Dense(D, use_bias=False, name="b")(nn.tanh(x) * two)
            return nn.tanh(x) + nn.Dense(D, name="c")(nn.tanh(x)) * three

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = (nnx.Linear(D, D, use_bias=False, rngs=rngs) for _ in range(2))
            self.c = linear(rngs)
            self.scales = nnx.List([nnx.Param(jnp.ones(())) for _ in range(3)])

        def __call__(self, x):
            two, three, one = (scale[...] for scale in self.scales)
            x = nnx.tanh(x @ (self.a.kernel[...] * one))
            x = self.b(x) * two
            h = nnx.tanh(x)
            return (three * h) @ self.c.kernel[...] + three * self.c.bias[...] + h

    rules = [same(f"params/{name}/{{leaf}}", f"{name}/{{leaf}}") for name in "abc"]
    rules += [same(f"params/t{k}", f"scales/{place}") for k, place in ((0, 2), (1, 0), (2, 1))]
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)), rules)


@ported
def heads_by_einsum() -> Pair:
    """Projections by einsum over heads against one fused product with reshapes."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            normal = nn.initializers.normal(0.3)
            qkv = self.param("qkv", normal, (3, D, HEADS, SIZE))
            out = self.param("out", normal, (HEADS, SIZE, D))
            q, k, v = jnp.einsum("btd,sdhk->sbthk", x, qkv)
            return jnp.einsum("bthk,hkd->btd", attend(q, k, v), out)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.fused = nnx.Linear(D, 3 * WIDE, use_bias=False, rngs=rngs)
            self.out = nnx.Linear(WIDE, D, use_bias=False, rngs=rngs)

        def __call__(self, x):
            q, k, v = (heads(part) for part in jnp.split(self.fused(x), 3, axis=-1))
            return self.out(flat(attend(q, k, v)))

    turned = {"op": "transpose", "perm": [1, 0, 2, 3]}
    merged = {"op": "reshape", "linen": [D, 3, HEADS, SIZE], "nnx": [D, 3 * WIDE]}
    flattened = {"op": "reshape", "linen": [HEADS, SIZE, D], "nnx": [WIDE, D]}
    rules = [same("params/qkv", "fused/kernel", turned, merged)]
    rules.append(same("params/out", "out/kernel", flattened))
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (SEQ,)), rules)
