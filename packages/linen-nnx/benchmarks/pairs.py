"""The layer twins that `make parity` compares, and where they are known to differ.

A pair that differs says why, and what makes it exact. Known gaps of Flax itself are in `gaps.py`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import Array

from benchmarks.compare import Pair

Rules = list[Mapping[str, Any]]

_rng = np.random.default_rng(1)


def _normal(*shape: int) -> np.ndarray:
    return _rng.normal(size=shape).astype(np.float32)


X = _normal(8, 16)  # (batch, features)
H, C = _normal(8, 12), _normal(8, 12)  # carries of recurrent cells
SEQUENCE = _normal(2, 16, 8)  # (batch, length, features)
LONG = _normal(2, 128, 24)
IMAGE = _normal(2, 6, 6, 4)  # (batch, height, width, channels)
TOKENS = np.arange(6).reshape(2, 3) % 5
KEY = np.array([0, 7], np.uint32)  # raw: a typed key would start JAX before the CPU is chosen

EVERYWHERE = ("float32 forward", "float32 gradient", "bfloat16 forward", "bfloat16 gradient")
GRADIENTS = ("float32 gradient", "bfloat16 gradient")
FORWARD = ("float32 forward", "bfloat16 forward")
BFLOAT16 = ("bfloat16 forward", "bfloat16 gradient")


def _same(*names: str, collection: str = "params") -> Rules:
    """Leaves of one name on both sides."""
    return [{"linen": f"{collection}/{name}", "nnx": name} for name in names]


def _fused(gates: str, *leaves: str, linen: str = "params", nnx: str = "") -> Rules:
    """Leaves such as `i/kernel`, one for each gate in Linen (`ii`, `if`, ...), joined in nnx."""
    return [
        {
            "linen": [f"{linen}/{leaf[0]}{gate}{leaf[1:]}" for gate in gates],
            "nnx": f"{nnx}dense_{leaf}",
            "ops": [{"op": "concat", "axis": -1}],
        }
        for leaf in leaves
    ]


def _lstm(linen: str = "params", nnx: str = "") -> Rules:
    """`if` is a word of Python's, so nnx writes `if_`."""
    names = [f"i{gate}/kernel" for gate in "igo"] + [f"h{gate}/{{leaf}}" for gate in "ifgo"]
    rules = [{"linen": f"{linen}/{name}", "nnx": f"{nnx}{name}"} for name in names]
    return [{"linen": f"{linen}/if/kernel", "nnx": f"{nnx}if_/kernel"}, *rules]


LINEAR = _same("kernel", "bias")
GRU: Rules = [
    *_fused("rzn", "i/kernel", "i/bias", "h/kernel"),
    {"linen": "params/hn/bias", "ops": [{"op": "drop"}]},
]
ATTENTION = _same("{layer}/{leaf}")


class LinenStack(nn.Module):
    """Six layers under nn.scan, their leaves stacked: (batch, features) to the same."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layer = nn.Dense(x.shape[-1], dtype=self.dtype, name="layers")
        scan = nn.scan(
            lambda layer, x, _: (nn.tanh(layer(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=6,
        )
        return scan(layer, x.astype(self.dtype), None)[0]


class NnxStack(nnx.Module):
    """The same under nnx.scan."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs) -> None:
        create = nnx.vmap(lambda rngs: nnx.Linear(16, 16, dtype=dtype, rngs=rngs))
        self.dtype, self.layers = dtype, create(rngs.fork(split=6))

    def __call__(self, x: Array) -> Array:
        def body(x: Array, layer: nnx.Linear) -> Array:
            return nnx.tanh(layer(x))

        scan = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(x.astype(self.dtype), self.layers)


class NnxList(nnx.Module):
    """The same as a list of layers, called one after the other."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs) -> None:
        self.dtype = dtype
        self.layers = nnx.List([nnx.Linear(16, 16, dtype=dtype, rngs=rngs) for _ in range(6)])

    def __call__(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        for layer in self.layers:
            x = nnx.tanh(layer(x))
        return x


class NnxRemat(nnx.Module):
    """A layer that is computed anew in the backward pass."""

    def __init__(self, dtype: Any, rngs: nnx.Rngs) -> None:
        self.layer = nnx.Linear(16, 12, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return nnx.remat(nnx.Linear.__call__)(self.layer, x)


def causal_attention(query: Array, key: Array, value: Array, **_: Any) -> Array:
    """One attention function for both frameworks, whose own two are 1e-5 apart."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=True)


def keep_dtype(arrays: Any, *_: Any, **__: Any) -> Any:
    """An nnx norm's `promote_dtype` without the cast that it makes before it normalises."""
    return arrays


def _norm(
    name: str,
    linen: Callable[[Any], nn.Module],
    twin: Callable[..., nnx.Module],
    leaves: Rules,
    **call: Any,
) -> list[Pair]:
    """A norm as it comes, and with `promote_dtype=keep_dtype` in nnx."""
    calls: dict[str, Any] = {"linen_call": call, "nnx_call": call}

    def kept(dtype: Any, rngs: nnx.Rngs) -> nnx.Module:
        return twin(dtype, rngs, promote_dtype=keep_dtype)

    return [
        Pair(
            f"{name}, defaults",
            linen,
            twin,
            (SEQUENCE,),
            leaves,
            differs=BFLOAT16,
            why="nnx casts inputs, scale, bias and statistics to the compute dtype before it "
            "normalises, Linen casts the result",
            fix="nnx `promote_dtype=keep_dtype` (docs/pitfalls.md), the next row of this name",
            **calls,
        ),
        Pair(f"{name}, keep_dtype", linen, kept, (SEQUENCE,), leaves, **calls),
    ]


PAIRS = (
    Pair(
        "Dense / Linear",
        lambda d: nn.Dense(12, dtype=d),
        lambda d, r: nnx.Linear(16, 12, dtype=d, rngs=r),
        (X,),
        LINEAR,
    ),
    Pair(
        "DenseGeneral / LinearGeneral",
        lambda d: nn.DenseGeneral((3, 2), axis=(-2, -1), dtype=d),
        lambda d, r: nnx.LinearGeneral((16, 8), (3, 2), axis=(-2, -1), dtype=d, rngs=r),
        (SEQUENCE,),
        LINEAR,
    ),
    Pair(
        "Einsum",
        lambda d: nn.Einsum((8, 3, 2), "abc,cde->abde", dtype=d),
        lambda d, r: nnx.Einsum("abc,cde->abde", (8, 3, 2), (3, 2), dtype=d, rngs=r),
        (SEQUENCE,),
        LINEAR,
        note="nnx has a bias only if its shape is given, Linen unless told not to",
    ),
    Pair(
        "Conv",
        lambda d: nn.Conv(5, (3, 3), strides=2, dtype=d),
        lambda d, r: nnx.Conv(4, 5, (3, 3), strides=2, dtype=d, rngs=r),
        (IMAGE,),
        LINEAR,
    ),
    Pair(
        "ConvTranspose",
        lambda d: nn.ConvTranspose(5, (3, 3), strides=(2, 2), dtype=d),
        lambda d, r: nnx.ConvTranspose(4, 5, (3, 3), strides=(2, 2), dtype=d, rngs=r),
        (IMAGE,),
        LINEAR,
    ),
    Pair(
        "Embed",
        lambda d: nn.Embed(5, 16, dtype=d),
        lambda d, r: nnx.Embed(5, 16, dtype=d, rngs=r),
        (TOKENS,),
        _same("embedding"),
    ),
    Pair(
        "Embed, attend",
        lambda d: nn.Embed(5, 16, dtype=d),
        lambda d, r: nnx.Embed(5, 16, dtype=d, rngs=r),
        (X,),
        _same("embedding"),
        method="attend",
    ),
    Pair(
        "PReLU",
        lambda d: nn.PReLU(),
        lambda d, r: nnx.PReLU(),
        (X,),
        _same("negative_slope"),
        cast_inputs=True,
        note="leave nnx's `dtype` at None: Linen has none and computes in that of the input",
    ),
    Pair(
        "Dropout, same key",
        lambda d: nn.Dropout(0.5),
        lambda d, r: nnx.Dropout(0.5),
        (X,),
        linen_call={"deterministic": False, "rng": KEY},
        nnx_call={"deterministic": False, "rngs": KEY},
        cast_inputs=True,
        note="the key is passed in the call (`rng=`, in nnx `rngs=`), not drawn from a stream",
    ),
    Pair(
        "SimpleCell",
        lambda d: nn.SimpleCell(12, dtype=d),
        lambda d, r: nnx.SimpleCell(16, 12, dtype=d, rngs=r),
        (H, X),
        [
            {"linen": "params/i/{leaf}", "nnx": "dense_i/{leaf}"},
            {"linen": "params/h/kernel", "nnx": "dense_h/kernel"},
        ],
        note="give both the same `dtype`: the defaults differ",
    ),
    Pair(
        "LSTMCell",
        lambda d: nn.LSTMCell(12, dtype=d),
        lambda d, r: nnx.LSTMCell(16, 12, dtype=d, rngs=r),
        ((C, H), X),
        _lstm(),
        note="Linen's `if` is `if_` in nnx",
    ),
    Pair(
        "OptimizedLSTMCell",
        lambda d: nn.OptimizedLSTMCell(12, dtype=d),
        lambda d, r: nnx.OptimizedLSTMCell(16, 12, dtype=d, rngs=r),
        ((C, H), X),
        _fused("ifgo", "i/kernel", "h/kernel", "h/bias"),
        note="Linen's twelve leaves are three in nnx, the gates joined in the order i, f, g, o",
    ),
    Pair(
        "GRUCell, hn/bias 0",
        lambda d: nn.GRUCell(12, dtype=d),
        lambda d, r: nnx.GRUCell(16, 12, dtype=d, rngs=r),
        (H, X),
        GRU,
        zero=("params/hn/bias",),
        differs=GRADIENTS,
        varies=FORWARD,
        why="nnx multiplies by all gates' kernels at once, Linen by each: sums, above all those of "
        "gradients, are taken in another order",
        fix="none; it is rounding",
        note="Linen's next training step moves hn/bias away from 0",
    ),
    Pair(
        "GRUCell, hn/bias not 0",
        lambda d: nn.GRUCell(12, dtype=d),
        lambda d, r: nnx.GRUCell(16, 12, dtype=d, rngs=r),
        (H, X),
        GRU,
        differs=EVERYWHERE,
        why="nnx has no home for hn/bias (flax #5594), so it is dropped here",
        fix="none: such a cell cannot be translated without loss",
    ),
    Pair(
        "RNN of LSTMCell",
        lambda d: nn.RNN(nn.LSTMCell(12, dtype=d)),
        lambda d, r: nnx.RNN(nnx.LSTMCell(8, 12, dtype=d, rngs=r)),
        (SEQUENCE,),
        _lstm("params/cell", "cell/"),
    ),
    Pair(
        "RNN of OptimizedLSTMCell",
        lambda d: nn.RNN(nn.OptimizedLSTMCell(12, dtype=d)),
        lambda d, r: nnx.RNN(nnx.OptimizedLSTMCell(8, 12, dtype=d, rngs=r)),
        (SEQUENCE,),
        _fused("ifgo", "i/kernel", "h/kernel", "h/bias", linen="params/cell", nnx="cell/"),
        varies=GRADIENTS,
        why="where the CPU has a fused multiply-add, the compiled loops round the sum of the "
        "bias's gradient over time otherwise; with XLA_FLAGS=--xla_cpu_max_isa=AVX they do not",
        fix="none; it is rounding",
    ),
    Pair(
        "Bidirectional",
        lambda d: nn.Bidirectional(
            nn.RNN(nn.LSTMCell(12, dtype=d)), nn.RNN(nn.LSTMCell(12, dtype=d))
        ),
        lambda d, r: nnx.Bidirectional(
            nnx.RNN(nnx.LSTMCell(8, 12, dtype=d, rngs=r)),
            nnx.RNN(nnx.LSTMCell(8, 12, dtype=d, rngs=r)),
        ),
        (SEQUENCE,),
        [
            *_lstm("params/forward_rnn/cell", "forward_rnn/cell/"),
            *_lstm("params/backward_rnn/cell", "backward_rnn/cell/"),
        ],
    ),
    Pair(
        "Sequential",
        lambda d: nn.Sequential([nn.Dense(12, dtype=d), nn.tanh, nn.Dense(3, dtype=d)]),
        lambda d, r: nnx.Sequential(
            nnx.Linear(16, 12, dtype=d, rngs=r), nnx.tanh, nnx.Linear(12, 3, dtype=d, rngs=r)
        ),
        (X,),
        [{"linen": "params/layers_{i}/{leaf}", "nnx": "layers/{i}/{leaf}"}],
    ),
    Pair(
        "scan over layers",
        LinenStack,
        NnxStack,
        (X,),
        _same("layers/{leaf}"),
        note="with the layers stacked on both sides",
    ),
    Pair(
        "scan / list of layers",
        LinenStack,
        NnxList,
        (X,),
        [
            {
                "linen": "params/layers/{leaf}",
                "nnx": "layers/{i}/{leaf}",
                "ops": [{"op": "stack", "capture": "i", "axis": 0}],
            }
        ],
        varies=EVERYWHERE,
        why="XLA compiles the body of a loop by itself, and so fuses and rounds it otherwise than "
        "the same layers written out",
        fix="call nnx's layers in a loop too: nnx.scan, or jax.lax.scan over their stacked states "
        "(model/transformer/nnx.py)",
    ),
    Pair(
        "remat",
        lambda d: nn.remat(nn.Dense)(12, dtype=d),
        NnxRemat,
        (X,),
        [{"linen": "params/{leaf}", "nnx": "layer/{leaf}"}],
    ),
    *_norm(
        "LayerNorm",
        lambda d: nn.LayerNorm(dtype=d),
        lambda d, r, **k: nnx.LayerNorm(8, dtype=d, rngs=r, **k),
        _same("scale", "bias"),
    ),
    *_norm(
        "RMSNorm",
        lambda d: nn.RMSNorm(dtype=d),
        lambda d, r, **k: nnx.RMSNorm(8, dtype=d, rngs=r, **k),
        _same("scale"),
    ),
    *_norm(
        "GroupNorm",
        lambda d: nn.GroupNorm(num_groups=2, dtype=d),
        lambda d, r, **k: nnx.GroupNorm(8, num_groups=2, dtype=d, rngs=r, **k),
        _same("scale", "bias"),
    ),
    *_norm(
        "InstanceNorm",
        lambda d: nn.InstanceNorm(dtype=d),
        lambda d, r, **k: nnx.InstanceNorm(8, dtype=d, rngs=r, **k),
        _same("scale", "bias"),
    ),
    *_norm(
        "BatchNorm (train)",
        lambda d: nn.BatchNorm(dtype=d),
        lambda d, r, **k: nnx.BatchNorm(8, dtype=d, rngs=r, **k),
        _same("scale", "bias") + _same("mean", "var", collection="batch_stats"),
        use_running_average=False,
    ),
    *_norm(
        "BatchNorm (eval)",
        lambda d: nn.BatchNorm(dtype=d),
        lambda d, r, **k: nnx.BatchNorm(8, dtype=d, rngs=r, **k),
        _same("scale", "bias") + _same("mean", "var", collection="batch_stats"),
        use_running_average=True,
    ),
    Pair(
        "attention, defaults",
        lambda d: nn.MultiHeadDotProductAttention(2, dtype=d),
        lambda d, r: nnx.MultiHeadAttention(2, 24, dtype=d, decode=False, rngs=r),
        (LONG,),
        ATTENTION,
        differs=EVERYWHERE,
        why="without dropout nnx calls jax.nn.dot_product_attention, Linen its own softmax",
        fix="one `attention_fn` for both, the next row",
    ),
    Pair(
        "attention, one attention_fn",
        lambda d: nn.MultiHeadDotProductAttention(2, dtype=d, attention_fn=causal_attention),
        lambda d, r: nnx.MultiHeadAttention(
            2, 24, dtype=d, decode=False, attention_fn=causal_attention, rngs=r
        ),
        (LONG,),
        ATTENTION,
    ),
)
