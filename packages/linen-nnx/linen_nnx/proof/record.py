"""Runs a traced model one equation at a time and keeps the values at given addresses.

    jaxpr of tanh(x @ w):      (0,)  c = dot_general(x, w)
                               (1,)  d = tanh(c)
    record(jaxpr, [w, x], {(0,)})  ->  ([d], {(0,): Record(outs=[c], args=[x, w], iterations=())})

A model that is compiled as a whole is rounded as XLA fuses it, and XLA fuses twins differently.
Here nothing is compiled as a whole, so equations that are the same in both twins give the same
bits. A model can also be run in float64, which `compare.py` needs to tell rounding from a fault.
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
    """What one equation gave and took.

    Attributes:
      outs: its outputs.
      args: its operands.
      iterations: that of each scan around it, the outermost first; empty outside of scans.
    """

    outs: list[Any]
    args: list[Any]
    iterations: tuple[int, ...]


def record(
    jaxpr: Any, args: Sequence[Any], sites: Container[Site], mode: Mode = "own"
) -> tuple[list[Any], dict[Site, Record]]:
    """Runs a closed jaxpr; returns its outputs and a record of each equation at one of `sites`.

    Args:
      jaxpr: what to run.
      args: arrays of the dtypes that the jaxpr takes.
      sites: addresses as `dataflow.Site` has them.
      mode: `own` runs in the dtypes of the model. `wide` runs in float64. `nudged` runs in float64
        with each constant that may have been rounded moved by half a unit in its last place.

    Example:
        >>> w, x = jnp.ones((2, 1)), jnp.ones((1, 2))
        >>> jaxpr = jax.make_jaxpr(lambda w, x: jnp.tanh(x @ w))(w, x)
        >>> outs, found = record(jaxpr, [w, x], {(0,)})
        >>> found[0,].outs[0].tolist()
        [[2.0]]
    """
    run = _Run(sites, mode)
    with nullcontext() if mode == "own" else jax.enable_x64(True):
        return run.jaxpr(jaxpr, args, (), ()), run.found


class _Run:
    """One run; `site` and `around` say where an equation stands, and in which iterations."""

    def __init__(self, sites: Container[Site], mode: Mode) -> None:
        self.sites, self.mode = sites, mode
        self.found: dict[Site, Record] = {}

    def constant(self, value: Any) -> Any:
        if self.mode == "own":
            return value
        return wide(_nudged(value) if self.mode == "nudged" else value)

    def jaxpr(self, jaxpr: Any, args: Sequence[Any], site: Site, around: Site) -> list[Any]:
        def equation(number: int, eqn: Any, given: list[Any]) -> Sequence[Any]:
            here = (*site, number)
            outs = self.equation(eqn, given, here, around)
            # The first time: the body of a while loop has one address in all its iterations.
            if here in self.sites and here not in self.found:
                self.found[here] = Record(list(outs), given, around)
            return outs

        given = args if self.mode == "own" else map(wide, args)
        return interpret(jaxpr, given, self.constant, equation)

    def equation(self, eqn: Any, args: list[Any], site: Site, around: Site) -> Sequence[Any]:
        match eqn.primitive.name:
            case "scan":
                return self.scan(eqn, args, site, around)
            case "while":
                return self.loop(eqn, args, site, around)
            case "cond":
                ways = branches(eqn)
                # As `lax.switch` does with an index out of range.
                number = int(np.clip(args[0], 0, len(ways) - 1))
                return self.jaxpr(ways[number], args[1:], (*site, number), around)
        if (inner := called(eqn)) is not None:
            return self.jaxpr(inner, args, site, around)
        return bind(eqn, args) if self.mode == "own" else equation(eqn, args)

    def scan(self, eqn: Any, args: list[Any], site: Site, around: Site) -> Sequence[Any]:
        scan = scan_parts(eqn)
        fixed, carry, rows = scan.operands(args)
        collected = {}
        for step in scan.steps():
            row_now = [row[step] for row in rows]
            given = [*fixed, *carry, *row_now]
            outs = self.jaxpr(scan.body, given, (*site, step), (*around, step))
            carry, collected[step] = outs[: scan.carried], outs[scan.carried :]
        # In the order of rows: a reverse scan has collected the last one first.
        in_order = [collected[step] for step in range(scan.length)]
        return [*carry, *map(jnp.stack, zip(*in_order, strict=True))]

    def loop(self, eqn: Any, args: list[Any], site: Site, around: Site) -> Sequence[Any]:
        loop = while_parts(eqn)
        test, body, carry = loop.operands(args)
        while self.jaxpr(loop.test, [*test, *carry], (*site, 0), around)[0]:
            carry = self.jaxpr(loop.body, [*body, *carry], (*site, 1), around)
        return carry


def _nudged(value: Any) -> Any:
    """A constant in float64, moved by half a unit in the last place of its own dtype.

    The direction follows from the constant's own bits. So equal constants move alike on both sides
    and cancel, while a constant that one side alone has shows what its rounding may do.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return value
    info = jnp.finfo(value.dtype)
    wide_value = np.asarray(value, np.float64)
    # The upper half of the mantissa's digits, before the point. 1, 0.5 and 64 have none behind it:
    # they were not rounded, and stay as they are. sqrt(2 / pi) has some.
    digits = np.frexp(wide_value)[0] * 2.0 ** (info.nmant // 2)
    was_rounded = digits != np.round(digits)
    with np.errstate(invalid="ignore"):
        signs = np.where(np.floor(digits * 2.0**8) % 2, 1.0, -1.0) * was_rounded
    return wide_value * (1 + signs * float(info.eps) / 2)
