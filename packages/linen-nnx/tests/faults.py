"""Twins of twelve blocks whose nnx side has one planted fault, for the tests of `bisect`."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from linen_nnx import RuleBook, Twin

D, DEPTH = 8, 12
X = jax.random.normal(jax.random.key(0), (2, 5, D))
IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


def plain_attention(query, key, value, *_: Any, **__: Any) -> jax.Array:
    """One attention function for both frameworks, (batch, length, heads, width)."""
    weights = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(weights), value)


def sharp_attention(query, key, value, *_: Any, **__: Any) -> jax.Array:
    """The same without the scale."""
    return plain_attention(query * query.shape[-1] ** 0.5, key, value)


class LinenBlock(nn.Module):
    attention: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(epsilon=1e-6)(x)
        if self.attention:
            y = nn.MultiHeadDotProductAttention(2, attention_fn=plain_attention)(y)
        y = nn.gelu(nn.Dense(D, name="up")(y))
        y = nn.Dropout(0.5, deterministic=True)(y)
        return x + nn.Dense(D, name="down")(y)


class LinenNet(nn.Module):
    depth: int = DEPTH
    attention: bool = False
    scan: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.scan:
            stack = nn.scan(
                lambda block, x, _: (block(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            return stack(LinenBlock(self.attention, name="blocks"), x, None)[0]
        for k in range(self.depth):
            x = LinenBlock(self.attention, name=f"block_{k}")(x)
        return x


class NnxBlock(nnx.Module):
    def __init__(
        self,
        rngs: nnx.Rngs,
        attention: Any = None,
        epsilon: float = 1e-6,
        bias: bool = True,
        dtype: Any = None,
        dropping: bool = False,
        activation: Any = nnx.gelu,
    ) -> None:
        self.norm = nnx.LayerNorm(D, epsilon=epsilon, rngs=rngs)
        options = {"attention_fn": attention, "decode": False, "rngs": rngs}
        self.attention = nnx.MultiHeadAttention(2, D, **options) if attention else None
        self.up = nnx.Linear(D, D, use_bias=bias, dtype=dtype, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=not dropping, rngs=rngs)
        self.down = nnx.Linear(D, D, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm(x)
        y = self.attention(y) if self.attention else y
        return x + self.down(self.dropout(self.activation(self.up(y))))


class NnxNet(nnx.Module):
    """Options of `NnxBlock` apply to block `at`; to all, if it is None."""

    def __init__(
        self,
        rngs: nnx.Rngs,
        at: int | None = None,
        depth: int = DEPTH,
        attention: Any = None,
        **options: Any,
    ) -> None:
        good = {"attention": attention and plain_attention}
        bad = options | {"attention": attention}
        self.blocks = nnx.List(
            [NnxBlock(rngs, **(bad if at in (None, k) else good)) for k in range(depth)]
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        for block in self.blocks:
            x = block(x)
        return x


def net(scan: bool = False, depth: int = DEPTH, **options: Any) -> Twin:
    """The twin; `options` go to the nnx side alone."""
    linen = LinenNet(depth, bool(options.get("attention")), scan)
    return Twin(lambda: linen, lambda rngs: NnxNet(rngs, depth=depth, **options), lambda: (X,))


def book(wrong: dict[str, str] | None = None, transposed: str = "") -> RuleBook:
    """The leaves of `net` one by one; `wrong` has other nnx leaves for some Linen leaves."""
    parts = {"LayerNorm_0": ("norm", "scale"), "up": ("up", "kernel"), "down": ("down", "kernel")}
    pairs = {
        f"params/block_{k}/{part}/{leaf}": f"blocks/{k}/{name}/{leaf}"
        for k in range(DEPTH)
        for part, (name, weight) in parts.items()
        for leaf in (weight, "bias")
    }
    rules = [{"linen": one, "nnx": two} for one, two in (pairs | (wrong or {})).items()]
    for rule in rules:
        if rule["linen"] == transposed:
            rule["ops"] = [{"op": "transpose", "perm": [1, 0]}]
    return RuleBook.from_dict({"version": 1, "rules": rules})


SCANNED = RuleBook.from_dict(
    {
        "version": 1,
        "rules": [
            {
                "linen": f"params/blocks/{one}/{{leaf}}",
                "nnx": f"blocks/{{i}}/{two}/{{leaf}}",
                "ops": [{"op": "stack", "capture": "i", "axis": 0}],
            }
            for one, two in (("LayerNorm_0", "norm"), ("up", "up"), ("down", "down"))
        ],
    }
)


class LinenConvs(nn.Module):
    """Convolutions with BatchNorm."""

    train: bool = False
    padding: Any = ((1, 1), (1, 1))

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (3, 4, 4):
            x = nn.Conv(width, (3, 3), strides=2, padding=self.padding)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not self.train, momentum=0.9)(x))
        return nn.Dense(3)(x.reshape(len(x), -1))


class NnxConvs(nnx.Module):
    def __init__(
        self,
        rngs: nnx.Rngs,
        train: bool = False,
        padding: Any = ((1, 1), (1, 1)),
        momentum: float = 0.9,
    ) -> None:
        self.convs, self.norms = nnx.List(), nnx.List()
        for into, out in ((3, 3), (3, 4), (4, 4)):
            conv = nnx.Conv(into, out, (3, 3), strides=2, padding=padding, rngs=rngs)
            norm = nnx.BatchNorm(out, momentum=momentum, use_running_average=not train, rngs=rngs)
            self.convs.append(conv)
            self.norms.append(norm)
        self.out = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.out(x.reshape(len(x), -1))


def convs(train: bool = False, padding: Any = ((1, 1), (1, 1)), **options: Any) -> Twin:
    """The twin; `options` go to the nnx side alone."""
    linen = LinenConvs(train, padding)

    def call(module: Any, variables: Any, x: jax.Array) -> Any:
        return module.apply(variables, x, mutable=["batch_stats"] if train else False)

    return Twin(lambda: linen, lambda rngs: NnxConvs(rngs, **options), lambda: (IMAGES,), call)
