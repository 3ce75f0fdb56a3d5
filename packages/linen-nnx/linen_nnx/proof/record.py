"""Runs a traced model one equation at a time and keeps the values at given addresses.

Nothing is compiled as a whole, so no fusion rounds one model's equations otherwise than its twin's:
where two models do the same, the bits are the same. It may also be run in float64.
"""

from collections.abc import Container, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from linen_nnx.infer.dataflow import Site
from linen_nnx.infer.float64 import equation, wide
from linen_nnx.infer.jaxprs import bind, branches, called, interpret, scan_parts, while_parts

Mode = Literal["own", "wide", "nudged"]


class Record(NamedTuple):
    """What an equation gave (its outputs) and took, and the steps of the scans around it."""

    outs: list[Any]
    args: list[Any]
    steps: tuple[int, ...]


def record(
    jaxpr: Any, args: Sequence[Any], sites: Container[Site], mode: Mode = "own"
) -> tuple[list[Any], dict[Site, Record]]:
    """The outputs of a closed jaxpr, and a record of each equation at one of `sites`.

    Addresses are those of `dataflow.Site`; arguments have the dtypes of the jaxpr's.

    Args:
      mode: `own`, in the dtypes of the model; `wide`, in float64; `nudged`, in float64 with each
        constant that may have been rounded moved by as much, and equal constants alike.
    """
    run = _Run(sites, mode)
    with nullcontext() if mode == "own" else jax.enable_x64(True):
        return run.jaxpr(jaxpr, args, (), ()), run.found


class _Run:
    def __init__(self, sites: Container[Site], mode: Mode) -> None:
        self.sites, self.mode = sites, mode
        self.found: dict[Site, Record] = {}

    def constant(self, value: Any) -> Any:
        if self.mode == "own":
            return value
        return wide(_nudged(value) if self.mode == "nudged" else value)

    def jaxpr(self, jaxpr: Any, args: Sequence[Any], site: Site, steps: Site) -> list[Any]:
        def equation(number: int, eqn: Any, given: list[Any]) -> Sequence[Any]:
            here = (*site, number)
            outs = self.equation(eqn, given, here, steps)
            if here in self.sites and here not in self.found:
                self.found[here] = Record(list(outs), given, steps)
            return outs

        given = args if self.mode == "own" else map(wide, args)
        return interpret(jaxpr, given, self.constant, equation)

    def equation(self, eqn: Any, args: list[Any], site: Site, steps: Site) -> Sequence[Any]:
        match eqn.primitive.name:
            case "scan":
                return self.scan(eqn, args, site, steps)
            case "while":
                return self.loop(eqn, args, site, steps)
            case "cond":
                ways = branches(eqn)
                number = int(np.clip(args[0], 0, len(ways) - 1))
                return self.jaxpr(ways[number], args[1:], (*site, number), steps)
        if (inner := called(eqn)) is not None:
            return self.jaxpr(inner, args, site, steps)
        return bind(eqn, args) if self.mode == "own" else equation(eqn, args)

    def scan(self, eqn: Any, args: list[Any], site: Site, steps: Site) -> Sequence[Any]:
        scan = scan_parts(eqn)
        fixed, carry, rows = scan.operands(args)
        collected = {}
        for step in scan.steps():
            given = [*fixed, *carry, *(row[step] for row in rows)]
            outs = self.jaxpr(scan.body, given, (*site, step), (*steps, step))
            carry, collected[step] = outs[: scan.carried], outs[scan.carried :]
        each = zip(*(collected[step] for step in range(scan.length)), strict=True)
        return [*carry, *map(jnp.stack, each)]

    def loop(self, eqn: Any, args: list[Any], site: Site, steps: Site) -> Sequence[Any]:
        loop = while_parts(eqn)
        test, body, carry = loop.operands(args)
        while self.jaxpr(loop.test, [*test, *carry], (*site, 0), steps)[0]:
            carry = self.jaxpr(loop.body, [*body, *carry], (*site, 1), steps)
        return carry


def _nudged(value: Any) -> Any:
    """A constant in float64, moved within its rounding: up or down as its own last bits say.

    Numbers with few digits (1, 0.5, 64) were not rounded and stay.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return value
    info = jnp.finfo(value.dtype)
    wide_value = np.asarray(value, np.float64)
    digits = np.frexp(wide_value)[0] * 2.0 ** (info.nmant // 2)
    with np.errstate(invalid="ignore"):
        signs = np.where(np.floor(digits * 2.0**8) % 2, 1.0, -1.0) * (digits != np.round(digits))
    return wide_value * (1 + signs * float(info.eps) / 2)
