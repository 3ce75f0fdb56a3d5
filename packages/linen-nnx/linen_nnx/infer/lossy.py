"""Layers whose Linen and nnx forms cannot be translated without loss, and why.

Each of these is a known gap upstream. `suggest` refuses their leaves with the reason: any rule that
it could propose would be wrong for some weights.
"""

from typing import NamedTuple

import flax.linen as nn
from flax import nnx

from linen_nnx.infer.trace import Trace

_GRU = (
    "nnx.GRUCell has no home for the bias that Linen's GRUCell adds to its recurrent candidate "
    "(flax #5594): lossless only where it is all zeros; check that, then write a `drop` rule"
)
_WEIGHT_NORM = (
    "nnx.WeightNorm overwrites its layer's kernel in the forward pass (flax #5576) and, before "
    "flax 0.12.12, keeps its scales where no optimizer sees them (flax #5577): fold the norm into "
    "the kernel before migrating"
)
_SPECTRAL_NORM = (
    "nnx.SpectralNorm overwrites its layer's kernel in the forward pass (flax #5576): the original "
    "kernel is lost after one step, so that no rule is right both ways"
)
_WRAPPERS: dict[type, tuple[type, str]] = {
    nnx.WeightNorm: (nn.WeightNorm, _WEIGHT_NORM),
    nnx.SpectralNorm: (nn.SpectralNorm, _SPECTRAL_NORM),
}


class Losses(NamedTuple):
    """What to refuse.

    Attributes:
      reasons: for Linen and for nnx, {path: reason}.
      alone: {path: value} of Linen leaves without a twin; at these values both sides compute the
        same.
    """

    reasons: tuple[dict[str, str], dict[str, str]]
    alone: dict[str, float]


def lossy(linen: Trace, nnx_: Trace) -> Losses:
    """The leaves of two traced sides that no rule can translate."""
    losses = Losses(({}, {}), {})
    of_linen, of_nnx = losses.reasons
    kinds = set(nnx_.layers.values())
    for path, layer in nnx_.layers.items():
        inside = [leaf for leaf in (*nnx_.leaves, *nnx_.bare) if leaf.startswith(f"{path}/")]
        for kind, (_, why) in _WRAPPERS.items():
            if issubclass(layer, kind):
                of_nnx.update(dict.fromkeys(inside, why))
    for path, layer in linen.layers.items():
        inside = [leaf for leaf in linen.leaves if f"/{path}/" in leaf]
        if issubclass(layer, nn.GRUCell) and nnx.GRUCell in kinds:
            found = [leaf for leaf in inside if leaf.endswith("/hn/bias")]
            of_linen.update(dict.fromkeys(found, _GRU))
            # Without that bias both cells compute the same, so the rest can be paired.
            losses.alone.update(dict.fromkeys(found, 0.0))
        for kind, (twin, why) in _WRAPPERS.items():
            if issubclass(layer, twin) and kind in kinds:
                # <wrapper>/<layer>/kernel/scale belongs to <layer>/kernel beside the wrapper
                beside = path.rpartition("/")[0]
                for leaf in inside:
                    inner = leaf.split(f"/{path}/")[1].rpartition("/")[0]
                    of_linen["/".join(filter(None, ("params", beside, inner)))] = why
                of_linen.update(dict.fromkeys(inside, why))
        # nnx has no leaves for the scales; at ones both sides compute the same.
        if issubclass(layer, nn.WeightNorm) and nnx.WeightNorm in kinds:
            losses.alone.update(dict.fromkeys(inside, 1.0))
    return losses
