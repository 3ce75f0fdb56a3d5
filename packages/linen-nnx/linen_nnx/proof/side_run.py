"""One side of a twin, run on given weights: the value of every use of a leaf, and where it is.

    Linen side, two layers                          use    module    leaf
    first: h = tanh(x @ params/first/kernel)         0     first     params/first/kernel
    last:  y = h @ params/last/kernel                1     last      params/last/kernel

`value(0)` is what the product with the first kernel gave, before the tanh; `above[1]` is {0}.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxpr_as_fun

from linen_nnx.infer.dataflow import Slot
from linen_nnx.infer.sides import SlottedSide
from linen_nnx.infer.trace import place
from linen_nnx.proof.compare import Value, same
from linen_nnx.proof.read_terms import Region
from linen_nnx.proof.record import Mode, record
from linen_nnx.proof.unrolled import Unrolled


class SideRun:
    """One side, its weights, and all that it gave on them.

    Attributes:
      side: the model, and `flow`: where its leaves are used.
      records: for each mode of `record` what the equations gave that use a leaf.
      outs: the outputs, one equation run after the other.
      compiled: the outputs of the whole model as one compiled program.
      leaves: by path the value of each leaf, of one that the call updates its new value.
      updated: the leaves whose new value differs from the old.
      places: for each of `outs` its place among the outputs of the traced call.
    """

    def __init__(self, side: SlottedSide, leaves: dict[str, Any], inputs: Sequence[Any]) -> None:
        self.side, self.flow = side, side.flow
        weights = [jnp.asarray(leaves[path]) for path in side.paths]
        args = [*weights, *inputs]
        jaxpr, sites = side.trace.jaxpr, {use.site for use in side.flow.uses.values()}
        self.records, outs = [], []
        for mode in get_args(Mode):
            out, records = record(jaxpr, args, sites, mode)
            outs.append(out)
            self.records.append(records)
        values = list(map(Value.of, *outs))
        count = side.trace.count
        self.outs = values[:count]
        # What users run is compiled, and there a fault of fusion would show. It has no float64 run
        # of its own: those of the equations are the truth for both.
        compiled = jax.jit(jaxpr_as_fun(jaxpr))(*args)
        self.compiled = list(map(Value.of, compiled, *outs[1:]))[:count]

        self.leaves: dict[str, Value] = {}
        for path, array in zip(side.paths, weights, strict=True):
            self.leaves[path] = Value.of(array, array, array)
        self.updated: set[str] = set()
        for path, value in zip(side.trace.updates, values[count:], strict=True):
            # A call may write a leaf and leave it as it was: BatchNorm in evaluation, say.
            if not same(value.own, self.leaves[path].own):
                self.updated.add(path)
            self.leaves[path] = value
        self.places: Sequence[int] = range(len(self.outs))

    def reorder(self, places: Sequence[int]) -> None:
        """Puts the outputs in another order, and leaves some out."""
        self.places = places
        self.outs = [self.outs[place] for place in places]
        self.compiled = [self.compiled[place] for place in places]

    @cached_property
    def above(self) -> dict[int, set[int]]:
        """For each use the uses that flow into it."""
        owners = np.array([self._use_of(slot) for slot in self.flow.slots], int)
        above: dict[int, set[int]] = {use: set() for use in self.flow.uses}
        for owner, row in zip(owners.tolist(), self.flow.above, strict=True):
            # A use may have several slots (the layers of an nn.vmap): it is not above itself.
            above[owner] |= {*owners[np.flatnonzero(row)].tolist()} - {owner}
        return above

    @cached_property
    def leaf(self) -> dict[int, str]:
        """For each use the leaf, or the first of its leaves."""
        first: dict[int, str] = {}
        for slot, path in zip(self.flow.slots, self.side.first_leaf, strict=True):
            first.setdefault(self._use_of(slot), path)
        return first

    def _use_of(self, slot: Slot) -> int:
        return int(self.flow.owner[slot.first])

    def layer(self, use: int) -> str:
        """The path of the module that holds the leaf of a use, as `blocks/up[7]` in a scan."""
        path = self.module(use)
        return f"{path}{list(self.iterations(use))}" if path in self.iterated else path

    def module(self, use: int) -> str:
        """The path of the module that holds the leaf of a use."""
        names = self.leaf[use].split("/")
        # A Linen path begins with its collection, `params` say, which is no module.
        start = 1 if self.side.trace.side == "linen" else 0
        return place(names[start:-1])

    def iterations(self, use: int) -> tuple[int, ...]:
        """The iterations of the scans around a use; empty where there is none."""
        # A branch that was not taken has an address and no record.
        found = self.records[0].get(self.flow.uses[use].site)
        return found.iterations if found else ()

    @cached_property
    def iterated(self) -> set[str]:
        """Modules that are used in more than one iteration of a scan."""
        seen: dict[str, tuple[int, ...]] = {}
        several = set()
        for use in self.leaf:
            path, iterations = self.module(use), self.iterations(use)
            if seen.setdefault(path, iterations) != iterations:
                several.add(path)
        return several

    def value(self, use: int) -> Value | None:
        """What the equation of a use gives; None if it did not run (a branch not taken)."""
        at = self.flow.uses[use]
        if at.site not in self.records[0]:
            return None
        result = 0
        for number, out in enumerate(self.records[0][at.site].outs):
            # Of an equation with several results (`split`) the one in which the elements stand.
            if out.shape == at.columns.shape:
                result = number
                break
        return Value.of(*(records[at.site].outs[result] for records in self.records))

    @cached_property
    def unrolled(self) -> Unrolled:
        """The equations that ran."""
        return Unrolled(self.side.trace.jaxpr)

    def region(self, end: int, stops: Mapping[int, str], whole: frozenset[str]) -> Region:
        """The steps from known uses on to the step `end`.

        Args:
          end: the number of a step in `unrolled`.
          stops: by use the name of its value.
          whole: the names of values whose parts are values of their own on the other side.
        """
        known: dict[int, str] = {}
        for use, name in stops.items():
            site = self.flow.uses[use].site
            known.update(dict.fromkeys(self.unrolled.at.get(site, ()), name))
        # The end itself may agree in value and be asked for all the same, as an output.
        known.pop(end, None)
        return Region(self.unrolled, end, len(self.side.paths), known, whole)

    def given(self, use: int) -> int | None:
        """The number of the step that gives the value of a use; None if it is not among them."""
        at = self.flow.uses[use]
        # As in `value`: of several results the one in which the elements stand, else the first.
        steps = self.unrolled.at.get(at.site, ())
        for number, step in zip(steps, self.unrolled.of(steps), strict=True):
            if step.eqn.outvars[step.place].aval.shape == at.columns.shape:
                return number
        return steps[0] if steps else None

    def inputs(self, use: int) -> list[Value]:
        """What flows into the equation of a use from the model's inputs, its leaf aside."""
        at = self.flow.uses[use]
        found = []
        for operand in at.inputs:
            arrays = [records[at.site].args[operand] for records in self.records]
            found.append(Value.of(*arrays))
        return found
