"""Runs a traced model one equation at a time and keeps the values at given addresses.

Nothing is compiled as a whole, so no fusion rounds one model's equations otherwise than its twin's:
where two models do the same, the bits are the same. `wide` runs it in float64 instead.
"""

from collections.abc import Container, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from linen_nnx.dataflow import Site
from linen_nnx.equations import called
from linen_nnx.evaluate import equation, wide


class Record(NamedTuple):
    """What an equation gave (its outputs) and took, and the steps of the scans around it."""

    outs: list[Any]
    args: list[Any]
    steps: tuple[int, ...]


def record(
    jaxpr: Any, args: Sequence[Any], sites: Container[Site], widened: bool = False
) -> tuple[list[Any], dict[Site, Record]]:
    """The outputs of a closed jaxpr, and a record of each equation at one of `sites`.

    Addresses are those of `dataflow.Site`. Arguments have the dtypes of the jaxpr's, whether or not
    it is `widened` to float64.
    """
    run = _Run(sites, widened)
    with jax.enable_x64(True) if widened else nullcontext():
        return run.jaxpr(jaxpr, args, (), ()), run.found


class _Run:
    def __init__(self, sites: Container[Site], widened: bool) -> None:
        self.sites, self.widened = sites, widened
        self.found: dict[Site, Record] = {}

    def jaxpr(
        self, jaxpr: Any, args: Sequence[Any], site: Site, steps: tuple[int, ...]
    ) -> list[Any]:
        consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
        as_run = wide if self.widened else lambda value: value
        known = dict(zip(jaxpr.constvars, map(as_run, consts), strict=True))
        known.update(zip(jaxpr.invars, map(as_run, args), strict=True))

        def read(atom: Any) -> Any:
            if isinstance(atom, Literal):
                return as_run(np.asarray(atom.val, atom.aval.dtype))
            return known[atom]

        for number, eqn in enumerate(jaxpr.eqns):
            given, here = [read(atom) for atom in eqn.invars], (*site, number)
            outs = self.equation(eqn, given, here, steps)
            known.update(zip(eqn.outvars, outs, strict=True))
            if here in self.sites and here not in self.found:
                self.found[here] = Record(list(outs), given, steps)
        return [read(atom) for atom in jaxpr.outvars]

    def equation(
        self, eqn: Any, args: list[Any], site: Site, steps: tuple[int, ...]
    ) -> Sequence[Any]:
        match eqn.primitive.name:
            case "scan":
                return self.scan(eqn.params, args, site, steps)
            case "while":
                return self.loop(eqn.params, args, site, steps)
            case "cond":
                number = int(np.clip(args[0], 0, len(eqn.params["branches"]) - 1))
                return self.jaxpr(eqn.params["branches"][number], args[1:], (*site, number), steps)
        if (inner := called(eqn)) is not None:
            return self.jaxpr(inner, args, site, steps)
        if self.widened:
            return equation(eqn, args)
        outs = eqn.primitive.bind(*args, **eqn.params)
        return outs if eqn.primitive.multiple_results else [outs]

    def scan(
        self, params: Any, args: list[Any], site: Site, steps: tuple[int, ...]
    ) -> Sequence[Any]:
        fixed = params["num_consts"]
        carried = fixed + params["num_carry"]
        carry, rows = args[fixed:carried], args[carried:]
        order = range(params["length"])
        collected = {}
        for step in reversed(order) if params["reverse"] else order:
            given = [*args[:fixed], *carry, *(row[step] for row in rows)]
            outs = self.jaxpr(params["jaxpr"], given, (*site, step), (*steps, step))
            carry, collected[step] = outs[: len(carry)], outs[len(carry) :]
        each = zip(*(collected[step] for step in order), strict=True)
        return [*carry, *map(jnp.stack, each)]

    def loop(
        self, params: Any, args: list[Any], site: Site, steps: tuple[int, ...]
    ) -> Sequence[Any]:
        tests, bodies = params["cond_nconsts"], params["body_nconsts"]
        test, body, carry = args[:tests], args[tests : tests + bodies], args[tests + bodies :]
        while self.jaxpr(params["cond_jaxpr"], [*test, *carry], (*site, 0), steps)[0]:
            carry = self.jaxpr(params["body_jaxpr"], [*body, *carry], (*site, 1), steps)
        return carry
