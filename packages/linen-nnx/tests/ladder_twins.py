"""Small models as people write them, in Linen and in nnx: dropout by streams, nothing by hand.

The ports differ from their Linen twins where ports do: names, the order of construction and of
draws, lists in place of scanned stacks. `CASES` holds each twin with the keys that it draws from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import Array

from linen_nnx import Ladder, RuleBook, Twin

WIDTH = 8


def plain_attention(
    query: Array,
    key: Array,
    value: Array,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    **_: Any,
) -> Array:
    """One attention function for both sides: their own differ by rounding."""
    options: dict[str, Any] = {"dropout_rng": dropout_rng, "dropout_rate": dropout_rate}
    return nn.dot_product_attention(query, key, value, deterministic=deterministic, **options)


class LinenMlp(nn.Module):
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.Dense(16, dtype=self.dtype)(x)
        x = nn.BatchNorm(use_running_average=not train, dtype=self.dtype)(x)
        x = nn.Dropout(0.5)(nn.relu(x), deterministic=not train)
        x = nn.relu(nn.Dense(16, dtype=self.dtype)(x))
        x = nn.Dropout(0.3)(x, deterministic=not train)
        return nn.Dense(4, dtype=self.dtype)(x)


class NnxMlp(nnx.Module):
    def __init__(self, dtype: Any = jnp.float32, *, rngs: nnx.Rngs) -> None:
        linear = partial(nnx.Linear, dtype=dtype, rngs=rngs)
        self.late = nnx.Dropout(0.3, rngs=rngs)  # built first, drawn from last
        self.early = nnx.Dropout(0.5, rngs=rngs)
        self.inner, self.hidden, self.out = linear(WIDTH, 16), linear(16, 16), linear(16, 4)
        same = lambda values, **_: values  # noqa: E731 - the norms' cast, which Linen does not make
        self.norm = nnx.BatchNorm(16, dtype=dtype, promote_dtype=same, rngs=rngs)

    def __call__(self, x: Array, train: bool = False) -> Array:
        x = self.norm(self.inner(x), use_running_average=not train)
        x = self.early(nnx.relu(x), deterministic=not train)
        x = self.late(nnx.relu(self.hidden(x)), deterministic=not train)
        return self.out(x)


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        attention = nn.MultiHeadDotProductAttention(
            2, dropout_rate=0.2, deterministic=not train, attention_fn=plain_attention
        )
        x = x + nn.Dropout(0.1)(attention(nn.LayerNorm()(x)), deterministic=not train)
        hidden = nn.gelu(nn.Dense(16)(nn.LayerNorm()(x)))
        return x + nn.Dropout(0.1)(nn.Dense(WIDTH)(hidden), deterministic=not train)


class LinenTransformer(nn.Module):
    remat: bool = False

    @nn.compact
    def __call__(self, tokens: Array, train: bool = False) -> Array:
        x = nn.Embed(11, WIDTH)(tokens)
        block = nn.remat(LinenBlock, static_argnums=2) if self.remat else LinenBlock
        for _ in range(2):
            x = block()(x, train)
        return nn.Dense(11)(x)


class NnxBlock(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.norm2 = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            2, WIDTH, dropout_rate=0.2, decode=False, attention_fn=plain_attention, rngs=rngs
        )
        self.up, self.down = nnx.Linear(WIDTH, 16, rngs=rngs), nnx.Linear(16, WIDTH, rngs=rngs)
        self.drop = nnx.Dropout(0.1, rngs=rngs)  # one module, drawn from twice

    def __call__(self, x: Array, train: bool) -> Array:
        attended = self.attention(self.norm1(x), deterministic=not train)
        x = x + self.drop(attended, deterministic=not train)
        hidden = nnx.gelu(self.up(self.norm2(x)))
        return x + self.drop(self.down(hidden), deterministic=not train)


class NnxTransformer(nnx.Module):
    def __init__(self, remat: bool = False, *, rngs: nnx.Rngs) -> None:
        self.remat = remat
        self.embed = nnx.Embed(11, WIDTH, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs=rngs) for _ in range(2)])
        self.logits = nnx.Linear(WIDTH, 11, rngs=rngs)

    def __call__(self, tokens: Array, train: bool = False) -> Array:
        x = self.embed(tokens)
        for block in self.blocks:
            call = nnx.remat(NnxBlock.__call__, static_argnums=2) if self.remat else None
            x = call(block, x, train) if call else block(x, train)
        return self.logits(x)


class LinenVae(nn.Module):
    def setup(self) -> None:
        self.enc, self.dec = nn.Dense(16), nn.Dense(WIDTH)
        self.mean, self.spread = nn.Dense(4), nn.Dense(4)
        self.drop = nn.Dropout(0.4)

    def encode(self, x: Array, *, train: bool) -> tuple[Array, Array]:
        h = self.drop(nn.relu(self.enc(x)), deterministic=not train)
        return self.mean(h), self.spread(h)

    def __call__(self, x: Array, *, train: bool = False) -> dict[str, Array]:
        mean, spread = self.encode(x, train=train)
        noise = jax.random.normal(self.make_rng("noise"), mean.shape) if train else 0.0
        return {"mean": mean, "x": self.dec(mean + jnp.exp(0.1 * spread) * noise)}


class NnxVae(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.rngs = rngs
        self.enc, self.dec = nnx.Linear(WIDTH, 16, rngs=rngs), nnx.Linear(4, WIDTH, rngs=rngs)
        self.mean, self.spread = nnx.Linear(16, 4, rngs=rngs), nnx.Linear(16, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.4)

    def encode(self, x: Array, *, train: bool) -> tuple[Array, Array]:
        h = nnx.relu(self.enc(x))
        h = self.drop(h, deterministic=not train, rngs=self.rngs)
        return self.mean(h), self.spread(h)

    def __call__(self, x: Array, *, train: bool = False) -> dict[str, Array]:
        noise = (
            jax.random.normal(self.rngs.noise(), (len(x), 4)) if train else 0.0
        )  # before dropout
        mean, spread = self.encode(x, train=train)
        return {"mean": mean, "x": self.dec(mean + jnp.exp(0.1 * spread) * noise)}


class LinenLayer(nn.Module):
    train: bool

    @nn.compact
    def __call__(self, x: Array, _: None) -> tuple[Array, None]:
        h = nn.Dropout(0.3)(nn.tanh(nn.Dense(WIDTH)(x)), deterministic=not self.train)
        return x + nn.Dropout(0.2)(h, deterministic=not self.train), None


class LinenScanned(nn.Module):
    split: bool = True

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        scanned = nn.scan(
            LinenLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": self.split},
            length=3,
        )
        x, _ = scanned(train, name="layers")(x, None)
        return nn.Dropout(0.5)(nn.Dense(4)(x), deterministic=not train)


class NnxLayer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.first, self.second = nnx.Dropout(0.3, rngs=rngs), nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x: Array, train: bool) -> Array:
        h = self.first(nnx.tanh(self.dense(x)), deterministic=not train)
        return x + self.second(h, deterministic=not train)


class NnxListed(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.layers = nnx.List([NnxLayer(rngs=rngs) for _ in range(3)])
        self.out, self.last = nnx.Linear(WIDTH, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array, train: bool = False) -> Array:
        for layer in self.layers:
            x = layer(x, train)
        return self.last(self.out(x), deterministic=not train)


class NnxStacked(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        make = nnx.split_rngs(splits=3)(nnx.vmap(lambda rngs: NnxLayer(rngs=rngs)))
        self.layers = make(rngs)
        self.out, self.last = nnx.Linear(WIDTH, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array, train: bool = False) -> Array:
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x: Array, layer: NnxLayer) -> Array:
            return layer(x, train)

        return self.last(self.out(run(x, self.layers)), deterministic=not train)


class LinenRnn(nn.Module):
    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        x = nn.RNN(nn.LSTMCell(WIDTH))(x)
        return nn.Dense(4)(nn.Dropout(0.3)(x, deterministic=not train))


class NnxRnn(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.rnn = nnx.RNN(nnx.LSTMCell(WIDTH, WIDTH, rngs=rngs), rngs=rngs)
        self.out, self.drop = nnx.Linear(WIDTH, 4, rngs=rngs), nnx.Dropout(0.3, rngs=rngs)

    def __call__(self, x: Array, train: bool = False) -> Array:
        return self.out(self.drop(self.rnn(x), deterministic=not train))


class LinenTwice(nn.Module):
    """A submodule that is called twice; two inputs, one of them a dict, and a tuple of outputs."""

    @nn.compact
    def __call__(
        self, x: Array, more: dict[str, Array], train: bool = False
    ) -> tuple[Array, Array]:
        layer = LinenBlock()
        x, y = layer(x, train), layer(more["x"] * more["mask"][..., None], train)
        return nn.Dense(4)(x), x + y


class NnxTwice(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.layer, self.out = NnxBlock(rngs=rngs), nnx.Linear(WIDTH, 4, rngs=rngs)

    def __call__(
        self, x: Array, more: dict[str, Array], train: bool = False
    ) -> tuple[Array, Array]:
        x, y = self.layer(x, train), self.layer(more["x"] * more["mask"][..., None], train)
        return self.out(x), x + y


@dataclass(frozen=True)
class Case:
    """A twin, its example inputs and rules, and the streams of a call with `train=True`."""

    linen: Callable[[], nn.Module]
    nnx: Callable[[nnx.Rngs], nnx.Module]
    inputs: Callable[[], tuple[Any, ...]]
    rules: tuple[tuple[str, str], ...]
    streams: tuple[str, ...] = ("dropout",)

    @property
    def twin(self) -> Twin:
        return Twin(linen=self.linen, nnx=self.nnx, inputs=self.inputs)

    @property
    def book(self) -> RuleBook:
        """Rules with `{i}` on one side alone stack."""
        entries = []
        for linen, port in self.rules:
            stack = [{"op": "stack", "capture": "i", "axis": 0}]
            is_stack = ("{i}" in linen) != ("{i}" in port)
            entries.append({"linen": linen, "nnx": port, **({"ops": stack} if is_stack else {})})
        return RuleBook.from_dict({"version": 1, "rules": entries})

    def ladder(self, say: Callable[[str], None] = print) -> Ladder:
        return Ladder(self.twin, self.book, say=say)

    def rngs(self, seed: int) -> dict[str, Array]:
        keys = jax.random.split(jax.random.key(seed), len(self.streams))
        return dict(zip(self.streams, keys, strict=True))


def rows(*shape: int) -> Array:
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def tokens() -> Array:
    return jax.random.randint(jax.random.key(0), (3, 5), 0, 11)


def two_inputs() -> tuple[Any, ...]:
    more = {"x": rows(3, 5, WIDTH) + 1, "mask": jnp.arange(15.0).reshape(3, 5) % 2}
    return rows(3, 5, WIDTH), more


MLP = (
    ("params/Dense_0/{leaf}", "inner/{leaf}"),
    ("params/Dense_1/{leaf}", "hidden/{leaf}"),
    ("params/Dense_2/{leaf}", "out/{leaf}"),
    ("params/BatchNorm_0/scale", "norm/scale"),
    ("params/BatchNorm_0/bias", "norm/bias"),
    ("batch_stats/BatchNorm_0/mean", "norm/mean"),
    ("batch_stats/BatchNorm_0/var", "norm/var"),
)


def block(linen: str, port: str) -> tuple[tuple[str, str], ...]:
    """The rules of a transformer's block."""
    attention = f"{linen}/MultiHeadDotProductAttention_0/{{name}}/{{leaf}}"
    return (
        (attention, f"{port}/attention/{{name}}/{{leaf}}"),
        (f"{linen}/LayerNorm_0/{{leaf}}", f"{port}/norm1/{{leaf}}"),
        (f"{linen}/LayerNorm_1/{{leaf}}", f"{port}/norm2/{{leaf}}"),
        (f"{linen}/Dense_0/{{leaf}}", f"{port}/up/{{leaf}}"),
        (f"{linen}/Dense_1/{{leaf}}", f"{port}/down/{{leaf}}"),
    )


TRANSFORMER = (
    *block("params/LinenBlock_{i}", "blocks/{i}"),
    ("params/Embed_0/embedding", "embed/embedding"),
    ("params/Dense_0/{leaf}", "logits/{leaf}"),
)
LISTED = (
    ("params/layers/Dense_0/{leaf}", "layers/{i}/dense/{leaf}"),
    ("params/Dense_0/{leaf}", "out/{leaf}"),
)
CASES = {
    "mlp": Case(LinenMlp, lambda rngs: NnxMlp(rngs=rngs), lambda: (rows(4, WIDTH),), MLP),
    "mlp in bfloat16": Case(
        lambda: LinenMlp(jnp.bfloat16),
        lambda rngs: NnxMlp(jnp.bfloat16, rngs=rngs),
        lambda: (rows(4, WIDTH),),
        MLP,
    ),
    "transformer": Case(
        LinenTransformer, lambda rngs: NnxTransformer(rngs=rngs), lambda: (tokens(),), TRANSFORMER
    ),
    "transformer, remat": Case(
        lambda: LinenTransformer(True),
        lambda rngs: NnxTransformer(True, rngs=rngs),
        lambda: (tokens(),),
        tuple((linen.replace("Linen", "CheckpointLinen"), p) for linen, p in TRANSFORMER),
    ),
    "vae": Case(
        LinenVae,
        lambda rngs: NnxVae(rngs=rngs),
        lambda: (rows(4, WIDTH),),
        tuple(
            (f"params/{name}/{{leaf}}", f"{name}/{{leaf}}")
            for name in ("enc", "mean", "spread", "dec")
        ),
        ("dropout", "noise"),
    ),
    "scan, list": Case(
        LinenScanned, lambda rngs: NnxListed(rngs=rngs), lambda: (rows(4, WIDTH),), LISTED
    ),
    "scan, nnx.scan": Case(
        LinenScanned,
        lambda rngs: NnxStacked(rngs=rngs),
        lambda: (rows(4, WIDTH),),
        tuple((linen, port.replace("{i}/", "")) for linen, port in LISTED),
    ),
    "scan of one key, list": Case(
        lambda: LinenScanned(split=False),
        lambda rngs: NnxListed(rngs=rngs),
        lambda: (rows(4, WIDTH),),
        LISTED,
    ),
    "rnn": Case(
        LinenRnn,
        lambda rngs: NnxRnn(rngs=rngs),
        lambda: (rows(3, 5, WIDTH),),
        (
            ("params/LSTMCell_0/if/kernel", "rnn/cell/if_/kernel"),
            *(
                (f"params/LSTMCell_0/{gate}/{{leaf}}", f"rnn/cell/{gate}/{{leaf}}")
                for gate in ("ii", "ig", "io", "hi", "hf", "hg", "ho")
            ),
            ("params/Dense_0/{leaf}", "out/{leaf}"),
        ),
    ),
    "called twice": Case(
        LinenTwice,
        lambda rngs: NnxTwice(rngs=rngs),
        two_inputs,
        (*block("params/LinenBlock_0", "layer"), ("params/Dense_0/{leaf}", "out/{leaf}")),
    ),
}
