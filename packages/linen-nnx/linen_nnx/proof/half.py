"""One side of a twin, run on given weights: the value of every use of a leaf, and where it is."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from linen_nnx.infer.sides import SlottedSide
from linen_nnx.infer.trace import place
from linen_nnx.proof.compare import Value, same
from linen_nnx.proof.record import Mode, record
from linen_nnx.proof.terms import Part
from linen_nnx.proof.unrolled import Unrolled


class Half:
    """One side, its weights, and all that it gave on them."""

    def __init__(self, side: SlottedSide, leaves: dict[str, Any], inputs: Sequence[Any]) -> None:
        self.side, self.flow = side, side.flow
        args = [*(jnp.asarray(leaves[path]) for path in side.paths), *inputs]
        jaxpr, sites = side.trace.jaxpr, {use.site for use in side.flow.uses.values()}
        runs = [record(jaxpr, args, sites, mode) for mode in get_args(Mode)]
        self.records = [records for _, records in runs]
        outs = [out for out, _ in runs]
        values = list(map(Value.of, *outs))
        self.outs = values[: side.trace.count]
        compiled = jax.jit(jaxpr_as_fun(jaxpr))(*args)
        self.compiled = list(map(Value.of, compiled, *outs[1:]))[: side.trace.count]
        old = {path: Value.of(a, a, a) for path, a in zip(side.paths, args, strict=False)}
        new = dict(zip(side.trace.updates, values[side.trace.count :], strict=True))
        self.updated = {path for path, value in new.items() if not same(value.own, old[path].own)}
        self.leaves = {**old, **new}
        self.places: Sequence[int] = range(len(self.outs))

    def reorder(self, places: Sequence[int]) -> None:
        """Puts the outputs in another order, and leaves some out."""
        self.places = places
        self.outs = [self.outs[place] for place in places]
        self.compiled = [self.compiled[place] for place in places]

    @cached_property
    def above(self) -> dict[int, set[int]]:
        """For each use the uses that flow into it."""
        owners = [int(self.flow.owner[slot.ids[0, 0]]) for slot in self.flow.slots]
        above: dict[int, set[int]] = {use: set() for use in self.flow.uses}
        for owner, row in zip(owners, self.flow.above, strict=True):
            above[owner] |= {owners[k] for k in np.flatnonzero(row)} - {owner}
        return above

    @cached_property
    def leaf(self) -> dict[int, str]:
        """For each use the leaf, or the first of its leaves."""
        first: dict[int, str] = {}
        for slot, path in zip(self.flow.slots, self.side.first, strict=True):
            first.setdefault(int(self.flow.owner[slot.ids[0, 0]]), path)
        return first

    def layer(self, use: int) -> str:
        """The path of the module that holds the leaf of a use, and the steps of scans around it."""
        path, steps = self.module(use), self.steps(use)
        return f"{path}{list(steps)}" if path in self.stepping else path

    def module(self, use: int) -> str:
        """The path of the module that holds the leaf of a use."""
        return place(self.leaf[use].split("/")[self.side.trace.side == "linen" : -1])

    def steps(self, use: int) -> tuple[int, ...]:
        found = self.records[0].get(self.flow.uses[use].site)
        return found.steps if found else ()

    @cached_property
    def stepping(self) -> set[str]:
        """Modules that are used in more than one step of a scan."""
        steps: dict[str, set[tuple[int, ...]]] = {}
        for use in self.leaf:
            steps.setdefault(self.module(use), set()).add(self.steps(use))
        return {path for path, found in steps.items() if len(found) > 1}

    def value(self, use: int) -> Value | None:
        """What the equation of a use gives."""
        at = self.flow.uses[use]
        if at.site not in self.records[0]:
            return None
        outs = [records[at.site].outs for records in self.records]
        fit = [k for k, out in enumerate(outs[0]) if out.shape == at.columns.shape]
        return Value.of(*(each[fit[0] if fit else 0] for each in outs))

    @cached_property
    def unrolled(self) -> Unrolled:
        """The equations that ran."""
        return Unrolled(self.side.trace.jaxpr)

    def part(self, end: int, stops: Mapping[int, str], whole: frozenset[str]) -> Part:
        """The steps from the uses at `stops`, by name, to the step `end`."""
        known = {
            number: name
            for use, name in stops.items()
            for number in self.unrolled.at.get(self.flow.uses[use].site, ())
        }
        known.pop(end, None)
        return Part(self.unrolled, end, len(self.side.paths), known, whole)

    def given(self, use: int) -> int | None:
        """The number of the step that gives the value of a use."""
        at = self.flow.uses[use]
        steps = self.unrolled.at.get(at.site, ())
        shapes = [step.eqn.outvars[step.place].aval.shape for step in self.unrolled.of(steps)]
        fit = [
            number for number, shape in zip(steps, shapes, strict=True) if shape == at.columns.shape
        ]
        return (fit or [*steps, None])[0]

    def inputs(self, use: int) -> list[Value]:
        """What flows into the equation of a use."""
        at = self.flow.uses[use]
        args = [records[at.site].args for records in self.records]
        return [Value.of(*(each[k] for each in args)) for k in at.inputs]
