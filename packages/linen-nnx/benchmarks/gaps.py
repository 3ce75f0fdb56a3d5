"""What a Linen layer and its nnx twin are known not to share, each measured anew.

A gap with an `issue` is a fault or a lack of Flax that this project works around or refuses to
translate: the day it is closed upstream, that can go. The others are defaults to know about.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from jax import Array


@dataclass(frozen=True)
class Gap:
    """A known difference that no comparison of values shows."""

    name: str
    probe: Callable[[], str]
    """Returns what shows that the gap is still there, or an empty text if it is not."""
    meaning: str
    """What it means for whoever migrates."""
    issue: int | None = None
    """The issue of google/flax."""
    then: str = ""
    """What can be done once it is closed."""
    breaks: str = ""
    """What of this project breaks if it no longer holds."""
    closed_in: str = ""
    """The version of Flax in which it is closed, while the oldest supported one still has it."""


def _spectral_norm() -> str:
    layer = nnx.SpectralNorm(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    return _moved(layer, lambda x: layer(x, update_stats=False))


def _weight_norm() -> str:
    layer = nnx.WeightNorm(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    return _moved(layer, layer)


def _moved(layer: Any, call: Callable[[Array], Array]) -> str:
    before = layer.layer_instance.kernel[...]
    call(jnp.ones((2, 6)))
    by = float(jnp.max(jnp.abs(layer.layer_instance.kernel[...] - before)))
    return f"one call in evaluation moves the kernel by {by:.2g}" if by else ""


def _weight_norm_scales() -> str:
    layer = nnx.WeightNorm(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(layer, nnx.Param))]
    lacking = not any(path[0] == "scales" for path in paths)
    return f"its parameters are {sorted('/'.join(map(str, p)) for p in paths)}" if lacking else ""


def _scanned_axis() -> str:
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("in", "out"))

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x: Array) -> Array:
            scan = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            layer = bridge.to_linen(nnx.Linear, 4, 4, kernel_init=init, name="layer")
            return scan(layer, x, None)[0]

    with nnx.use_eager_sharding(False):  # the names of the axes would need a mesh
        variables = jax.eval_shape(Stack().init, jax.random.key(0), jnp.ones((2, 4)))
        box = variables["params"]["layer"]["kernel"]
        axes, spec = box.value.ndim, box.get_partition_spec()
    return "" if len(spec) == axes else f"a stacked kernel of {axes} axes is partitioned as {spec}"


def _gru_bias() -> str:
    linen = nn.GRUCell(4).init(jax.random.key(0), jnp.ones((2, 4)), jnp.ones((2, 3)))
    cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0))
    sizes = [sum(a.size for a in jax.tree.leaves(tree)) for tree in (linen, nnx.state(cell))]
    return "" if sizes[0] == sizes[1] else f"Linen has {sizes[0]} values, nnx {sizes[1]}"


def _default(layer: Any, argument: str) -> Any:
    return inspect.signature(layer.__init__).parameters[argument].default


def _einsum_bias() -> str:
    defaults = _default(nn.Einsum, "use_bias"), _default(nnx.Einsum, "bias_shape")
    return "Linen use_bias=True, nnx bias_shape=None" if defaults == (True, None) else ""


def _simple_cell_dtype() -> str:
    linen, twin = (_default(module.SimpleCell, "dtype") for module in (nn, nnx))
    return "" if linen == twin else f"Linen {linen}, nnx {jnp.dtype(twin).name}"


def _train_mode() -> str:
    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    found = {"Dropout": nnx.Dropout(0.5).deterministic, "BatchNorm": norm.use_running_average}
    linen = {
        "Dropout": nn.Dropout(0.5).deterministic,
        "BatchNorm": nn.BatchNorm().use_running_average,
    }
    known = not any(found.values()) and all(value is None for value in linen.values())
    return "nnx starts in training mode, Linen demands the flag" if known else ""


def _orthogonal() -> str:
    h, x, key = jnp.ones((2, 8)), jnp.ones((2, 6)), jax.random.key(0)
    linen: Any = nn.OptimizedLSTMCell(8).init(key, (h, h), x)
    lstm = nnx.OptimizedLSTMCell(6, 8, rngs=nnx.Rngs(0)).dense_h.kernel[...]
    gru = nnx.GRUCell(6, 8, rngs=nnx.Rngs(0)).dense_h.kernel[...]
    gates = (linen["params"]["hi"]["kernel"], lstm[:, :8], gru[:, :8])
    off = [float(jnp.max(jnp.abs(gate.T @ gate - jnp.eye(8)))) for gate in gates]
    if not off[0] < 1e-5 < 1e-2 < min(off[1:]):
        return ""
    return f"a gate of OptimizedLSTMCell is {off[1]:.2g} off orthogonal, of GRUCell {off[2]:.2g}"


GAPS = (
    Gap(
        "SpectralNorm overwrites the kernel",
        _spectral_norm,
        "a training step in nnx updates the normalised kernel, in Linen the kernel itself: "
        "translating loses the latter at the first call",
        5576,
        "SpectralNorm translates without loss, as any other layer",
    ),
    Gap(
        "WeightNorm overwrites the kernel",
        _weight_norm,
        "as SpectralNorm",
        5576,
        "WeightNorm translates without loss, once #5577 is closed too",
    ),
    Gap(
        "WeightNorm does not train its scales",
        _weight_norm_scales,
        "no optimizer and no checkpoint of the parameters sees the scales",
        5577,
        "WeightNorm translates without loss, once #5576 is closed too",
        closed_in="0.12.12",
    ),
    Gap(
        "nn.scan adds no axis to an NNXMeta box",
        _scanned_axis,
        "partition names of an nnx layer under Linen's nn.scan are off by one axis: name the "
        "sharding of stacked leaves by hand",
        5589,
        "partition names of nnx layers under nn.scan can be used as they are",
    ),
    Gap(
        "GRUCell lacks hn/bias in nnx",
        _gru_bias,
        "a trained Linen GRUCell has no lossless nnx twin",
        5594,
        "GRUCell translates without loss: give hn/bias its rule here and wherever rules for it "
        "are proposed, and expect `GRUCell, hn/bias not 0` to be equal",
    ),
    Gap(
        "Einsum has a bias by default in Linen only",
        _einsum_bias,
        "pass nnx its `bias_shape`",
    ),
    Gap(
        "SimpleCell's default dtype",
        _simple_cell_dtype,
        "pass both the same `dtype`",
    ),
    Gap(
        "Dropout and BatchNorm start in different modes",
        _train_mode,
        "pass `deterministic` and `use_running_average` in the call",
    ),
    Gap(
        "recurrent init of fused cells",
        _orthogonal,
        "translate Linen's init to start alike: Linen draws an orthogonal matrix for each gate, "
        "nnx one for all",
    ),
)
