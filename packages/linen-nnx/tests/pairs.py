"""Twins for the tests of `suggest`, with misleading names and orders, each with its true rule book.

The rules are written by hand from reading the two models; nothing here uses what `suggest` uses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from linen_nnx import RuleBook
from linen_nnx.infer.twin import Twin

D = 6
X = jnp.linspace(-1.0, 1.0, 2 * D).reshape(2, D)
SEQ = jnp.linspace(-1.0, 1.0, 2 * 5 * D).reshape(2, 5, D)
TOKENS = jnp.array([[3, 1, 4, 1], [5, 9, 2, 6]])


class Pair(NamedTuple):
    """A twin, its true rules, and what `suggest` is to say about its leaves.

    blind: Linen leaves that no output sees; open: leaves, of either side, that stay open.
    """

    twin: Twin
    rules: list[dict[str, Any]]
    blind: tuple[str, ...] = ()
    open: tuple[str, ...] = ()

    @property
    def truth(self) -> RuleBook:
        return RuleBook.from_dict({"version": 1, "rules": self.rules})


PAIRS: dict[str, Callable[[], Pair]] = {}


def pair(make: Callable[[], Pair]) -> Callable[[], Pair]:
    PAIRS[make.__name__] = make
    return make


def same(linen: str, nnx_: str, *ops: dict[str, Any]) -> dict[str, Any]:
    return {"linen": linen, "nnx": nnx_, **({"ops": list(ops)} if ops else {})}


def linear(rngs: nnx.Rngs, a: int = D, b: int = D, **options: Any) -> nnx.Linear:
    return nnx.Linear(a, b, rngs=rngs, **options)


# Names and orders


@pair
def shuffled_definitions() -> Pair:
    """Six equal layers, defined in one order, used in another, with names that mislead."""

    class Linen(nn.Module):
        def setup(self):
            self.last, self.b, self.first = nn.Dense(D), nn.Dense(D), nn.Dense(D)
            self.c, self.a = nn.Dense(D), nn.Dense(D)

        def __call__(self, x):
            for layer in (self.last, self.b, self.c, self.first, self.a):
                x = x + nn.tanh(layer(x))
            return x

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b, self.c, self.first, self.last = (linear(rngs) for _ in range(5))

        def __call__(self, x):
            for layer in (self.first, self.a, self.last, self.c, self.b):
                x = x + nnx.tanh(layer(x))
            return x

    order = [("last", "first"), ("b", "a"), ("c", "last"), ("first", "c"), ("a", "b")]
    return Pair(
        Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)),
        [same(f"params/{one}/{{leaf}}", f"{two}/{{leaf}}") for one, two in order],
    )


@pair
def fourteen_blocks() -> Pair:
    """Past ten, string order and number order differ."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(14):
                x = x + nn.Dense(D)(nn.tanh(nn.Dense(D)(x)))
            return x

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.down, self.up = linear(rngs), linear(rngs)

        def __call__(self, x):
            return x + self.down(nnx.tanh(self.up(x)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([Block(rngs) for _ in range(14)])

        def __call__(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    # The outer Dense of each block is constructed first.
    rules = []
    for k in range(14):
        rules.append(same(f"params/Dense_{2 * k}/{{leaf}}", f"blocks/{k}/down/{{leaf}}"))
        rules.append(same(f"params/Dense_{2 * k + 1}/{{leaf}}", f"blocks/{k}/up/{{leaf}}"))
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)), rules)


class NnxAttention(nnx.Module):
    """Attention written by hand: keys before queries, and a query layer called `key_proj`."""

    def __init__(self, rngs: nnx.Rngs, heads: int = 2) -> None:
        self.heads = heads
        self.key_proj, self.query_proj, self.mix, self.values = (linear(rngs) for _ in range(4))

    def __call__(self, x: jax.Array) -> jax.Array:
        def split(y: jax.Array) -> jax.Array:
            return y.reshape(*y.shape[:-1], self.heads, -1)

        k, v, q = split(self.query_proj(x)), split(self.values(x)), split(self.key_proj(x))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5)
        return self.mix(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class LinenAttention(nn.Module):
    """Linen's own attention, twice, in two residual blocks."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for _ in range(2):
            x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return x


@pair
def keys_before_queries() -> Pair:
    """Equal shapes, another order of use, crossed names, reshaped kernels, blind key biases."""

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.attention = nnx.List([NnxAttention(rngs) for _ in range(2)])
            self.norms = nnx.List([nnx.LayerNorm(D, rngs=rngs) for _ in range(2)])

        def __call__(self, x):
            for attend, norm in zip(self.attention, self.norms, strict=True):
                x = x + attend(norm(x))
            return x

    theirs = "params/MultiHeadDotProductAttention_{i}"
    rules = [same("params/LayerNorm_{i}/{leaf}", "norms/{i}/{leaf}")]
    for one, two in (("query", "key_proj"), ("key", "query_proj"), ("value", "values")):
        split = {"op": "reshape", "linen": [D, 2, D // 2], "nnx": [D, D]}
        rules.append(same(f"{theirs}/{one}/kernel", f"attention/{{i}}/{two}/kernel", split))
        flat = {"op": "reshape", "linen": [2, D // 2], "nnx": [D]}
        rules.append(same(f"{theirs}/{one}/bias", f"attention/{{i}}/{two}/bias", flat))
    joined = {"op": "reshape", "linen": [2, D // 2, D], "nnx": [D, D]}
    rules.append(same(f"{theirs}/out/kernel", "attention/{i}/mix/kernel", joined))
    rules.append(same(f"{theirs}/out/bias", "attention/{i}/mix/bias"))
    blind = tuple(f"params/MultiHeadDotProductAttention_{i}/key/bias" for i in range(2))
    return Pair(Twin(LinenAttention, lambda rngs: Nnx(rngs), lambda: (SEQ,)), rules, blind)


@pair
def two_identical_towers() -> Pair:
    """Two towers of equal shape on two inputs, called in opposite orders."""

    class Tower(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(D)(nn.relu(nn.Dense(D)(x)))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x, y):
            return Tower()(x) * nn.sigmoid(Tower()(y))

    class NnxTower(nnx.Module):
        def __init__(self, rngs):
            self.one, self.two = linear(rngs), linear(rngs)

        def __call__(self, x):
            return self.two(nnx.relu(self.one(x)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.gate, self.main = NnxTower(rngs), NnxTower(rngs)

        def __call__(self, x, y):
            gate = nnx.sigmoid(self.gate(y))
            return self.main(x) * gate

    # In a Tower the outer Dense is constructed first; of the two Towers, x's.
    rules = [
        same(f"params/Tower_{k}/Dense_{1 - n}/{{leaf}}", f"{tower}/{layer}/{{leaf}}")
        for k, tower in enumerate(("main", "gate"))
        for n, layer in enumerate(("one", "two"))
    ]
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X, X[::-1] ** 2)), rules)


@pair
def interchangeable_towers() -> Pair:
    """Two towers that are summed: no output can tell them apart; order and names agree."""

    class Linen(nn.Module):
        def setup(self):
            self.left_in, self.left_out = nn.Dense(D), nn.Dense(D)
            self.right_in, self.right_out = nn.Dense(D), nn.Dense(D)

        def __call__(self, x):
            left = self.left_out(nn.relu(self.left_in(x)))
            return left + self.right_out(nn.relu(self.right_in(x)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.right = nnx.List([linear(rngs) for _ in range(2)])
            self.left = nnx.List([linear(rngs) for _ in range(2)])

        def __call__(self, x):
            left = self.left[1](nnx.relu(self.left[0](x)))
            return left + self.right[1](nnx.relu(self.right[0](x)))

    rules = [
        same(f"params/{tower}_{end}/{{leaf}}", f"{tower}/{n}/{{leaf}}")
        for tower in ("left", "right")
        for n, end in enumerate(("in", "out"))
    ]
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)), rules)


@pair
def unused_parameters() -> Pair:
    """Leaves that the forward pass ignores: one pair of equal name, two that are ambiguous."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            self.param("old_scale", nn.initializers.ones, (D,))
            self.param("one", nn.initializers.ones, (3,))
            self.param("two", nn.initializers.ones, (3,))
            return nn.Dense(D, name="used")(x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.dense = linear(rngs)
            self.old_scale = nnx.Param(jnp.ones(D))
            self.uno, self.due = nnx.Param(jnp.ones(3)), nnx.Param(jnp.ones(3))

        def __call__(self, x):
            return self.dense(x)

    rules = [same("params/used/{leaf}", "dense/{leaf}"), same("params/old_scale", "old_scale")]
    return Pair(
        Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)),
        [*rules, same("params/one", "uno"), same("params/two", "due")],
        open=("params/one", "params/two", "uno", "due"),
    )


# Forms


@pair
def fused_qkv_under_scan() -> Pair:
    """Scanned blocks with separate projections; a list of blocks with one, interleaved by head."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            y = nn.RMSNorm()(x)
            y = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False)(y)
            return x + y, None

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            scan = nn.scan(
                nn.remat(Block), variable_axes={"params": 1}, split_rngs={"params": True}, length=3
            )
            return scan(name="layers")(x, None)[0]

    class NnxBlock(nnx.Module):
        def __init__(self, rngs):
            self.qkv = linear(rngs, D, 3 * D, use_bias=False)
            self.out = linear(rngs, use_bias=False)
            self.norm = nnx.RMSNorm(D, rngs=rngs)

        def __call__(self, x):
            y = self.qkv(self.norm(x)).reshape(*x.shape[:-1], 2, 3, D // 2)
            q, k, v = y[..., 0, :], y[..., 1, :], y[..., 2, :]
            return x + self.out(nnx.dot_product_attention(q, k, v).reshape(x.shape))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.blocks = nnx.List([NnxBlock(rngs) for _ in range(3)])

        def __call__(self, x):
            for block in self.blocks:
                x = nnx.remat(NnxBlock.__call__)(block, x)
            return x

    stack = {"op": "stack", "capture": "i", "axis": 1}
    theirs = "params/layers/MultiHeadDotProductAttention_0"
    qkv = {
        "linen": [f"{theirs}/{name}/kernel" for name in ("query", "key", "value")],
        "nnx": "blocks/{i}/qkv/kernel",
        "ops": [
            stack,
            {"op": "concat", "axis": -1},
            {"op": "reshape", "linen": [D, 2, 3 * D // 2], "nnx": [D, 3 * D]},
        ],
    }
    out = {"op": "reshape", "linen": [2, D // 2, D], "nnx": [D, D]}
    return Pair(
        Twin(Linen, lambda rngs: Nnx(rngs), lambda: (SEQ,)),
        [
            qkv,
            same(f"{theirs}/out/kernel", "blocks/{i}/out/kernel", stack, out),
            same("params/layers/RMSNorm_0/scale", "blocks/{i}/norm/scale", stack),
        ],
    )


@pair
def grouped_query_fusion() -> Pair:
    """One Linen kernel for queries, keys and values of unequal widths; three in nnx, transposed."""
    widths = (6, 2, 2)

    def attend(q, k, v):
        q = q.reshape(*q.shape[:-1], 3, 2)
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkd->bhqk", q, k))
        return jnp.einsum("bhqk,bkd->bqhd", weights, v).reshape(*v.shape[:-1], 6)

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            q, k, v = jnp.split(nn.Dense(sum(widths))(x), (6, 8), axis=-1)
            return nn.Dense(D)(attend(q, k, v))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            for name, width in zip(("value", "query", "key"), (2, 6, 2), strict=True):
                setattr(self, name, nnx.Param(rngs.params.normal((width, D))))
                setattr(self, f"{name}_bias", nnx.Param(jnp.zeros(width)))
            self.out = linear(rngs)

        def __call__(self, x):
            k = x @ self.key[...].T + self.key_bias[...]
            q = x @ self.query[...].T + self.query_bias[...]
            v = jnp.einsum("btd,nd->btn", x, self.value[...]) + self.value_bias[...]
            return self.out(attend(q, k, v))

    cut = {"op": "concat", "axis": 0, "sizes": list(widths)}
    names = ("query", "key", "value")
    kernel = {"linen": "params/Dense_0/kernel", "nnx": list(names)}
    bias = {"linen": "params/Dense_0/bias", "nnx": [f"{name}_bias" for name in names]}
    return Pair(
        Twin(Linen, lambda rngs: Nnx(rngs), lambda: (SEQ,)),
        [
            {**kernel, "ops": [{"op": "transpose", "perm": [1, 0]}, cut]},
            {**bias, "ops": [cut]},
            same("params/Dense_1/{leaf}", "out/{leaf}"),
        ],
    )


@pair
def transposed_square_kernels() -> Pair:
    """Square kernels, some transposed and some not: shapes tell nothing."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(4):
                x = nn.tanh(nn.Dense(D)(x))
            return x

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.List([nnx.Param(rngs.params.normal((D, D))) for _ in range(4)])
            self.b = nnx.List([nnx.Param(jnp.zeros(D)) for _ in range(4)])

        def __call__(self, x):
            for k in range(4):
                w = self.w[k][...]
                x = nnx.tanh(x @ (w.T if k % 2 else w) + self.b[k][...])
            return x

    turn = {"op": "transpose", "perm": [1, 0]}
    rules = [same(f"params/Dense_{k}/bias", f"b/{k}") for k in range(4)]
    rules += [same(f"params/Dense_{k}/kernel", f"w/{k}", *[turn] * (k % 2)) for k in range(4)]
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)), rules)


@pair
def optimized_lstm_cells() -> Pair:
    """Twelve leaves become three, gates fused in the order i, f, g, o; two stacked layers."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.RNN(nn.OptimizedLSTMCell(D), name="first")(x)
            return nn.RNN(nn.OptimizedLSTMCell(D), name="second")(x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.b = nnx.RNN(nnx.OptimizedLSTMCell(D, D, rngs=rngs), rngs=rngs)
            self.a = nnx.RNN(nnx.OptimizedLSTMCell(D, D, rngs=rngs), rngs=rngs)

        def __call__(self, x):
            return self.b(self.a(x))

    join = {"op": "concat", "axis": -1}
    rules = []
    for k, layer in enumerate("ab"):
        for kind, leaf in (("i", "kernel"), ("h", "kernel"), ("h", "bias")):
            cell = f"params/OptimizedLSTMCell_{k}"
            parts = [f"{cell}/{kind}{gate}/{leaf}" for gate in "ifgo"]
            nnx_leaf = f"{layer}/cell/dense_{kind}/{leaf}"
            rules.append({"linen": parts, "nnx": nnx_leaf, "ops": [join]})
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (SEQ,)), rules)


@pair
def gru_cells() -> Pair:
    """Everything but Linen's `hn/bias` has a home."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.GRUCell(D))(x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.rnn = nnx.RNN(nnx.GRUCell(D, D, rngs=rngs), rngs=rngs)

        def __call__(self, x):
            return self.rnn(x)

    rules = [
        {
            "linen": [f"params/GRUCell_0/{kind}{gate}/{leaf}" for gate in "rzn"],
            "nnx": f"rnn/cell/dense_{kind}/{leaf}",
            "ops": [{"op": "concat", "axis": -1}],
        }
        for kind, leaf in (("i", "kernel"), ("i", "bias"), ("h", "kernel"))
    ]
    drop = {"linen": "params/GRUCell_0/hn/bias", "ops": [{"op": "drop"}]}
    return Pair(
        Twin(Linen, lambda rngs: Nnx(rngs), lambda: (SEQ,)),
        [*rules, drop],
        open=("params/GRUCell_0/hn/bias",),
    )


@pair
def stacked_experts() -> Pair:
    """Experts under nn.vmap, with norms; in nnx a list, called one by one in a mixed-up order."""

    class Expert(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(D)(nn.relu(nn.LayerNorm()(nn.Dense(D)(x))))

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            gates = nn.softmax(nn.Dense(3, name="router")(x))
            vmap = nn.vmap(
                Expert, variable_axes={"params": 0}, split_rngs={"params": True},
                in_axes=None, axis_size=3,
            )  # fmt: skip
            return jnp.einsum("be,ebd->bd", gates, vmap(name="experts")(x))

    class NnxExpert(nnx.Module):
        def __init__(self, rngs):
            self.b, self.a = linear(rngs), linear(rngs)
            self.norm = nnx.LayerNorm(D, rngs=rngs)

        def __call__(self, x):
            return self.b(nnx.relu(self.norm(self.a(x))))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.experts = nnx.List([NnxExpert(rngs) for _ in range(3)])
            self.router = linear(rngs, D, 3)

        def __call__(self, x):
            gates = nnx.softmax(self.router(x))
            return sum(self.experts[k](x) * gates[:, k : k + 1] for k in (2, 0, 1))

    stack = {"op": "stack", "capture": "i", "axis": 0}
    names = (("Dense_0", "b"), ("Dense_1", "a"), ("LayerNorm_0", "norm"))
    return Pair(
        Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)),
        [
            same("params/router/{leaf}", "router/{leaf}"),
            *(
                same(f"params/experts/{one}/{{leaf}}", f"experts/{{i}}/{two}/{{leaf}}", stack)
                for one, two in names
            ),
        ],
    )


# Collections, convolutions, sharing


@pair
def batch_norm_in_training() -> Pair:
    """Train mode: statistics are written, not read, and the biases before them are blind."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (4, 4):
                x = nn.Conv(width, (3, 3))(x)
                x = nn.relu(nn.BatchNorm(use_running_average=False)(x))
            return x.mean((1, 2))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs) for _ in range(2)])
            self.convs = nnx.List([nnx.Conv(n, 4, (3, 3), rngs=rngs) for n in (4, 4)])

        def __call__(self, x):
            for conv, norm in zip(self.convs, self.norms, strict=True):
                x = nnx.relu(norm(conv(x)))
            return x.mean((1, 2))

    images = jnp.linspace(-1, 1, 2 * 5 * 5 * 4).reshape(2, 5, 5, 4) ** 3
    rules = [
        same("params/Conv_{i}/{leaf}", "convs/{i}/{leaf}"),
        *(
            same(f"{collection}/BatchNorm_{{i}}/{leaf}", f"norms/{{i}}/{leaf}")
            for collection, names in (
                ("params", ("scale", "bias")),
                ("batch_stats", ("mean", "var")),
            )
            for leaf in names
        ),
    ]
    twin = Twin(
        Linen, lambda rngs: Nnx(rngs), lambda: (images,),
        call_linen=lambda module, variables, x: module.apply(variables, x, mutable=["batch_stats"]),
    )  # fmt: skip
    return Pair(twin, rules, blind=("params/Conv_0/bias", "params/Conv_1/bias"))


@pair
def group_norm_conv_net() -> Pair:
    """GroupNorm and convolutions of one shape; depthwise, strided and transposed ones too."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            skip = nn.Conv(4, (3, 3))(x)
            x = nn.GroupNorm(2)(nn.Conv(4, (3, 3))(x))
            x = nn.GroupNorm(2)(nn.Conv(4, (3, 3))(nn.silu(x))) + skip
            x = nn.Conv(4, (3, 3), feature_group_count=4, strides=2)(x)
            return nn.ConvTranspose(4, (3, 3), strides=(2, 2))(x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.up = nnx.ConvTranspose(4, 4, (3, 3), strides=(2, 2), rngs=rngs)
            self.depth = nnx.Conv(4, 4, (3, 3), feature_group_count=4, strides=2, rngs=rngs)
            self.two, self.one, self.skip = (nnx.Conv(4, 4, (3, 3), rngs=rngs) for _ in range(3))
            self.norm_b, self.norm_a = (nnx.GroupNorm(4, num_groups=2, rngs=rngs) for _ in range(2))

        def __call__(self, x):
            y = nnx.silu(self.norm_a(self.one(x)))
            y = self.norm_b(self.two(y)) + self.skip(x)
            return self.up(self.depth(y))

    names = {"Conv_0": "skip", "Conv_1": "one", "Conv_2": "two", "Conv_3": "depth"}
    names |= {"GroupNorm_0": "norm_a", "GroupNorm_1": "norm_b", "ConvTranspose_0": "up"}
    # An inner module is constructed after the outer one, a layer's arguments before it is called.
    images = jnp.linspace(-1, 1, 2 * 4 * 4 * 4).reshape(2, 4, 4, 4) ** 3
    return Pair(
        Twin(Linen, lambda rngs: Nnx(rngs), lambda: (images,)),
        [same(f"params/{one}/{{leaf}}", f"{two}/{{leaf}}") for one, two in names.items()],
    )


@pair
def tied_embeddings() -> Pair:
    """One table for input and logits, learned positions longer than the example, bfloat16."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            embed = nn.Embed(10, D, dtype=jnp.bfloat16)
            places = self.param("places", nn.initializers.normal(), (10, D))
            x = embed(tokens) + places[: tokens.shape[1]].astype(jnp.bfloat16)
            x = nn.LayerNorm(dtype=jnp.bfloat16)(nn.Dense(D, dtype=jnp.bfloat16)(x))
            return embed.attend(x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.position = nnx.Embed(10, D, dtype=jnp.bfloat16, rngs=rngs)
            self.vocabulary = nnx.Embed(10, D, dtype=jnp.bfloat16, rngs=rngs)
            self.norm = nnx.LayerNorm(D, dtype=jnp.bfloat16, rngs=rngs)
            self.dense = linear(rngs, dtype=jnp.bfloat16)

        def __call__(self, tokens):
            x = self.vocabulary(tokens) + self.position(jnp.arange(tokens.shape[1]))
            return self.vocabulary.attend(self.norm(self.dense(x)))

    return Pair(
        Twin(Linen, lambda rngs: Nnx(rngs), lambda: (TOKENS,)),
        [
            same("params/Embed_0/embedding", "vocabulary/embedding"),
            same("params/places", "position/embedding"),
            same("params/Dense_0/{leaf}", "dense/{leaf}"),
            same("params/LayerNorm_0/{leaf}", "norm/{leaf}"),
        ],
    )


# More forms


@pair
def nested_scans() -> Pair:
    """A scan of scans; in nnx a list of lists."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.tanh(nn.Dense(D)(x)), None

    def scanned(layer, length):
        return nn.scan(
            layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=length
        )

    class Stage(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.LayerNorm()(scanned(Layer, 2)(name="inner")(x, None)[0]), None

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return scanned(Stage, 3)(name="outer")(x, None)[0]

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.norms = nnx.List([nnx.LayerNorm(D, rngs=rngs) for _ in range(3)])
            self.stages = nnx.List([nnx.List([linear(rngs) for _ in range(2)]) for _ in range(3)])

        def __call__(self, x):
            for stage, norm in zip(self.stages, self.norms, strict=True):
                for layer in stage:
                    x = x + nnx.tanh(layer(x))
                x = norm(x)
            return x

    outer, inner = ({"op": "stack", "capture": name, "axis": 0} for name in "ij")
    return Pair(
        Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)),
        [
            same("params/outer/inner/Dense_0/{leaf}", "stages/{i}/{j}/{leaf}", outer, inner),
            same("params/outer/LayerNorm_0/{leaf}", "norms/{i}/{leaf}", outer),
        ],
    )


@pair
def layouts_of_another_framework() -> Pair:
    """Convolutions stored as (out, in, height, width), dense kernels as (out, in)."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(2):
                x = nn.relu(nn.Conv(4, (3, 3))(x))
            return nn.Dense(D)(x.reshape(x.shape[0], -1))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.w = nnx.List([nnx.Param(rngs.params.normal((4, 4, 3, 3))) for _ in range(2)])
            self.b = nnx.List([nnx.Param(jnp.zeros(4)) for _ in range(2)])
            self.fc = nnx.Param(rngs.params.normal((D, 64)))
            self.fc_bias = nnx.Param(jnp.zeros(D))

        def __call__(self, x):
            dims = ("NHWC", "OIHW", "NHWC")
            for w, b in zip(self.w, self.b, strict=True):
                x = jax.lax.conv_general_dilated(x, w[...], (1, 1), "SAME", dimension_numbers=dims)
                x = nnx.relu(x + b[...])
            return x.reshape(x.shape[0], -1) @ self.fc[...].T + self.fc_bias[...]

    return Pair(
        Twin(Linen, lambda rngs: Nnx(rngs), lambda: (jnp.ones((2, 4, 4, 4)),)),
        [
            same("params/Conv_{i}/kernel", "w/{i}", {"op": "transpose", "perm": [3, 2, 0, 1]}),
            same("params/Conv_{i}/bias", "b/{i}"),
            same("params/Dense_0/kernel", "fc", {"op": "transpose", "perm": [1, 0]}),
            same("params/Dense_0/bias", "fc_bias"),
        ],
    )


@pair
def gated_mlps() -> Pair:
    """Gate and up projection in one array, the norms of all layers in another, down transposed."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            for k in range(3):
                y = nn.RMSNorm()(x)
                gate = nn.silu(nn.Dense(8, use_bias=False, name=f"gate{k}")(y))
                y = gate * nn.Dense(8, use_bias=False, name=f"up{k}")(y)
                x = x + nn.Dense(D, use_bias=False, name=f"down{k}")(y)
            return x

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.wi = nnx.List([nnx.Param(rngs.params.normal((2, D, 8))) for _ in range(3)])
            self.wo = nnx.List([nnx.Param(rngs.params.normal((D, 8))) for _ in range(3)])
            self.norm = nnx.Param(jnp.ones((3, D)))

        def __call__(self, x):
            for k in range(3):
                scale = jax.lax.rsqrt((x**2).mean(-1, keepdims=True) + 1e-6)
                h = jnp.einsum("bd,cdf->cbf", x * scale * self.norm[k], self.wi[k][...])
                x = x + (h[1] * nnx.silu(h[0])) @ self.wo[k][...].T
            return x

    wide = {"op": "reshape", "linen": [D, 8], "nnx": [1, D, 8]}
    rules = [same("params/RMSNorm_{i}/scale", "norm", {"op": "stack", "capture": "i", "axis": 0})]
    for k in range(3):
        parts = [f"params/gate{k}/kernel", f"params/up{k}/kernel"]
        joined = {"linen": parts, "nnx": f"wi/{k}", "ops": [wide, {"op": "concat", "axis": 0}]}
        turn = {"op": "transpose", "perm": [1, 0]}
        rules += [joined, same(f"params/down{k}/kernel", f"wo/{k}", turn)]
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)), rules)


@pair
def experts_in_one_einsum() -> Pair:
    """Experts as one array each; gates applied before the last product, which leaves them open."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            wi = self.param("wi", nn.initializers.normal(), (3, D, 8))
            wo = self.param("wo", nn.initializers.normal(), (3, 8, D))
            bias = self.param("bias", nn.initializers.zeros, (3, 8))
            gates = nn.softmax(nn.Dense(3)(x))
            h = nn.relu(jnp.einsum("bd,edf->bef", x, wi) + bias)
            return jnp.einsum("bef,efd,be->bd", h, wo, gates)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.into = nnx.List([linear(rngs, D, 8) for _ in range(3)])
            self.out = nnx.List([linear(rngs, 8, D, use_bias=False) for _ in range(3)])
            self.router = linear(rngs, D, 3)

        def __call__(self, x):
            gates = nnx.softmax(self.router(x))
            ys = [out(nnx.relu(into(x))) for into, out in zip(self.into, self.out, strict=True)]
            return sum(gates[:, k : k + 1] * y for k, y in enumerate(ys))

    stack = {"op": "stack", "capture": "i", "axis": 0}
    return Pair(
        Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)),
        [
            same("params/wi", "into/{i}/kernel", stack),
            same("params/bias", "into/{i}/bias", stack),
            same("params/wo", "out/{i}/kernel", stack),
            same("params/Dense_0/{leaf}", "router/{leaf}"),
        ],
    )


@pair
def plain_and_optimized_lstm_cells() -> Pair:
    """A bidirectional pair: one cell fused in nnx, the other not (`if` is called `if_`)."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Bidirectional(nn.RNN(nn.LSTMCell(D)), nn.RNN(nn.LSTMCell(D)))(x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            back = {"reverse": True, "keep_order": True}
            self.back = nnx.RNN(nnx.LSTMCell(D, D, rngs=rngs), rngs=rngs, **back)
            self.ahead = nnx.RNN(nnx.OptimizedLSTMCell(D, D, rngs=rngs), rngs=rngs)

        def __call__(self, x):
            return jnp.concatenate([self.ahead(x), self.back(x)], -1)

    rules = []
    for kind, leaf in (("i", "kernel"), ("h", "kernel"), ("h", "bias")):
        parts = [f"params/LSTMCell_0/{kind}{gate}/{leaf}" for gate in "ifgo"]
        join = {"op": "concat", "axis": -1}
        rules.append({"linen": parts, "nnx": f"ahead/cell/dense_{kind}/{leaf}", "ops": [join]})
        for gate in "ifgo":
            name = {"if": "if_"}.get(kind + gate, kind + gate)
            rules.append(same(f"params/LSTMCell_1/{kind}{gate}/{leaf}", f"back/cell/{name}/{leaf}"))
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (SEQ,)), rules)


@pair
def control_flow() -> Pair:
    """Four equal layers in a cond, under custom derivatives and in a loop; one is never taken."""

    @jax.custom_vjp
    def clip(x):
        return jnp.clip(x, -1, 1)

    clip.defvjp(lambda x: (clip(x), None), lambda _, g: (g,))

    class Linen(nn.Module):
        def setup(self):
            self.layers = [nn.Dense(D) for _ in range(4)]

        def __call__(self, x):
            if self.is_initializing():
                self.layers[0](x), self.layers[1](x)
            branches = (lambda m, x: m.layers[0](x), lambda m, x: m.layers[1](x))
            x = nn.cond(jnp.sum(x**2) > 0, *branches, self, x)
            return clip(self.layers[3](clip(nn.remat(nn.Dense.__call__)(self.layers[2], x))))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.d, self.c, self.b, self.a = (linear(rngs) for _ in range(4))

        def __call__(self, x):
            x = jax.lax.cond(jnp.sum(x**2) > 0, lambda x: self.a(x), lambda x: self.b(x), x)
            return clip(self.d(clip(jax.jit(lambda x: self.c(x))(x))))

    return Pair(
        Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)),
        [same(f"params/layers_{k}/{{leaf}}", f"{name}/{{leaf}}") for k, name in enumerate("abcd")],
        blind=("params/layers_1/kernel", "params/layers_1/bias"),
    )


@pair
def learned_latents() -> Pair:
    """Cross-attention of learned queries, scalars, a leaf with an extra axis."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            latents = self.param("latents", nn.initializers.normal(), (3, D))
            z = jnp.broadcast_to(latents, (x.shape[0], 3, D))
            z = z + nn.MultiHeadDotProductAttention(num_heads=2, name="attend")(z, x)
            temperature = self.param("temperature", nn.initializers.ones, ())
            return z * temperature + self.param("offset", nn.initializers.ones, ())

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Param(jnp.ones(())), nnx.Param(jnp.ones((1,)))
            self.cross = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)
            self.query = nnx.Param(jnp.ones((1, 3, D)))

        def __call__(self, x):
            z = jnp.repeat(self.query[...], x.shape[0], 0)
            return (z + self.cross(z, x)) * self.b[...] + self.a[...]

    return Pair(
        Twin(Linen, lambda rngs: Nnx(rngs), lambda: (SEQ,)),
        [
            same("params/attend/{name}/{leaf}", "cross/{name}/{leaf}"),
            same("params/latents", "query", {"op": "reshape", "linen": [3, D], "nnx": [1, 3, D]}),
            same("params/temperature", "b", {"op": "reshape", "linen": [], "nnx": [1]}),
            same("params/offset", "a"),
        ],
        blind=("params/attend/key/bias",),
    )


# Pairs that are no twins, or not quite: what is true of them is all that may be assigned.


def stack_of(layers: int, ported: int, bias: bool = True, epsilon: float = 1e-6, act=nnx.tanh):
    """Residual blocks with norms: `layers` in Linen, `ported` in nnx."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            for _ in range(layers):
                x = nn.LayerNorm()(x + nn.Dense(D)(nn.tanh(nn.Dense(D)(x))))
            return nn.Dense(3)(x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.a = nnx.List([linear(rngs, use_bias=bias) for _ in range(ported)])
            self.b = nnx.List([linear(rngs) for _ in range(ported)])
            self.n = nnx.List([nnx.LayerNorm(D, epsilon=epsilon, rngs=rngs) for _ in range(ported)])
            self.head = linear(rngs, D, 3)

        def __call__(self, x):
            for a, b, n in zip(self.a, self.b, self.n, strict=True):
                x = n(x + b(act(a(x))))
            return self.head(x)

    rules = [same("params/LayerNorm_{i}/{leaf}", "n/{i}/{leaf}")]
    for k in range(layers):
        rules.append(same(f"params/Dense_{2 * k}/{{leaf}}", f"b/{k}/{{leaf}}"))
        rules.append(same(f"params/Dense_{2 * k + 1}/kernel", f"a/{k}/kernel"))
        one_sided = {"linen": f"params/Dense_{2 * k + 1}/bias", "ops": [{"op": "drop"}]}
        both = same(f"params/Dense_{2 * k + 1}/bias", f"a/{k}/bias")
        rules.append(both if bias else one_sided)
    rules.append(same(f"params/Dense_{2 * layers}/{{leaf}}", "head/{leaf}"))
    return Pair(Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,)), rules)


def standard_deviation_for_variance() -> Twin:
    """A value-changing port: log-variance there, log-deviation here."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(D)(nn.Dense(D)(x) + jnp.exp(0.5 * nn.Dense(D)(x)))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.mean, self.deviation, self.out = (linear(rngs) for _ in range(3))

        def __call__(self, x):
            return self.out(self.mean(x) + jnp.exp(self.deviation(x)))

    return Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,))


def names_that_disagree_with_the_order() -> Twin:
    """Interchangeable layers, called in opposite orders."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(D, name="left")(x) + nn.Dense(D, name="right")(x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.left, self.right = linear(rngs), linear(rngs)

        def __call__(self, x):
            return self.right(x) + self.left(x)

    return Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,))


def wrapped(linen: Any, nnx_: Any, **options: Any) -> Twin:
    """A dense layer in a wrapper of each framework, and one without."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(D, name="out")(linen(nn.Dense(D, name="into"))(x, **options))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.wrapped, self.out = nnx_(linear(rngs), rngs=rngs), linear(rngs)

        def __call__(self, x):
            return self.out(self.wrapped(x, **options))

    return Twin(Linen, lambda rngs: Nnx(rngs), lambda: (X,))
