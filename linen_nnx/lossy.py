"""Layers whose Linen and nnx forms cannot be translated without loss, and why.

Each of these is a known gap upstream; `suggest` refuses their leaves with the reason rather than
proposing a rule that would be wrong for some weights.
"""

from typing import NamedTuple

import flax.linen as nn
from flax import nnx

from linen_nnx.twin import Trace

_GRU = (
    "nnx.GRUCell has no home for the bias that Linen's GRUCell adds to its recurrent candidate "
    "(flax #5594): lossless only where it is all zeros; check that, then write a `drop` rule"
)
_WEIGHT_NORM = (
    "nnx.WeightNorm overwrites its layer's kernel in the forward pass and keeps its scales where "
    "no optimizer sees them (flax #5577): train it in one framework, or fold the norm into its "
    "kernel"
)
_SPECTRAL_NORM = (
    "nnx.SpectralNorm overwrites its layer's kernel in the forward pass (flax #5576): the original "
    "kernel is lost after one step, so that no rule is right both ways"
)


class Losses(NamedTuple):
    """What to refuse: {path: reason} per side, and Linen leaves without a twin: {path: value}.

    With such a leaf at the given value both sides compute the same.
    """

    linen: dict[str, str]
    nnx: dict[str, str]
    alone: dict[str, float]


def lossy(linen: Trace, nnx_: Trace) -> Losses:
    """The leaves of two traced sides that no rule can translate."""
    losses = Losses({}, {}, {})
    for path, layer in nnx_.layers.items():
        for kind, why in ((nnx.WeightNorm, _WEIGHT_NORM), (nnx.SpectralNorm, _SPECTRAL_NORM)):
            if issubclass(layer, kind):
                inside = [
                    leaf for leaf in nnx_.leaves if leaf.startswith(f"{path}/" if path else "")
                ]
                losses.nnx.update(dict.fromkeys(inside, why))
    kinds = set(nnx_.layers.values())
    for path, layer in linen.layers.items():
        within = [leaf for leaf in linen.leaves if f"/{path}/" in leaf]
        if issubclass(layer, nn.GRUCell) and nnx.GRUCell in kinds:
            found = [leaf for leaf in within if leaf.endswith("hn/bias")]
            losses.linen.update(dict.fromkeys(found, _GRU))
            losses.alone.update(dict.fromkeys(found, 0.0))
        if issubclass(layer, nn.WeightNorm) and nnx.WeightNorm in kinds:
            losses.linen.update(dict.fromkeys(within, _WEIGHT_NORM))
            losses.alone.update(dict.fromkeys(within, 1.0))
        if issubclass(layer, nn.SpectralNorm) and nnx.SpectralNorm in kinds:
            losses.linen.update(dict.fromkeys(within, _SPECTRAL_NORM))
    return losses
