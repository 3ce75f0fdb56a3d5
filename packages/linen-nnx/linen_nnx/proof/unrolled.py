"""A jaxpr as one flat list of steps: calls opened, scans unrolled, each step with its address.

Nothing is computed. `back` cuts out what one step needs, down to steps whose values are known.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from linen_nnx.infer.dataflow import Site
from linen_nnx.infer.jaxprs import branches, called, interpret, scan_parts, while_parts


class Step(NamedTuple):
    """One value: a result of an equation, a constant, or (with neither) an argument of the jaxpr.

    name: the primitive, `constant`, `argument`, or `row` and `stack` of an unrolled scan.
    args: the numbers of the steps that it takes. place: which of the equation's results it is, of
    an argument its number, of a row its own. value: of a constant.
    """

    name: str
    args: tuple[int, ...] = ()
    eqn: Any = None
    place: int = 0
    value: Any = None


class Unrolled:
    """steps: in the order of running; at: the results at each address; outs: the jaxpr's."""

    def __init__(self, jaxpr: Any) -> None:
        self.steps: list[Step] = []
        self.at: dict[Site, list[int]] = {}
        args = [self._add(Step("argument", place=k)) for k in range(len(jaxpr.in_avals))]
        self.outs = self._run(jaxpr, args, ())

    def back(self, end: int, stops: Collection[int]) -> list[int]:
        """The steps that one step needs, in order, itself included; nothing behind `stops`."""
        needed, left = set[int](), [end]
        while left:
            number = left.pop()
            if number in needed:
                continue
            needed.add(number)
            if number not in stops:
                left += self.steps[number].args
        return sorted(needed)

    def of(self, numbers: Iterable[int]) -> list[Step]:
        """The steps with these numbers."""
        return [self.steps[number] for number in numbers]

    def _add(self, step: Step) -> int:
        self.steps.append(step)
        return len(self.steps) - 1

    def _constant(self, value: Any) -> int:
        return self._add(Step("constant", value=value))

    def _run(self, jaxpr: Any, args: Iterable[int], site: Site) -> list[int]:
        def equation(number: int, eqn: Any, given: list[int]) -> Sequence[int]:
            here = (*site, number)
            outs = self._equation(eqn, given, here)
            self.at.setdefault(here, list(outs))
            return outs

        return interpret(jaxpr, args, self._constant, equation)

    def _equation(self, eqn: Any, args: list[int], site: Site) -> Sequence[int]:
        match eqn.primitive.name:
            case "scan":
                return self._scan(eqn, args, site)
            case "while":  # its body once: which functions it has, not how often they run
                loop = while_parts(eqn)
                of_test, of_body, carry = loop.operands(args)
                self._run(loop.test, [*of_test, *carry], (*site, 0))
                return self._run(loop.body, [*of_body, *carry], (*site, 1))
            case "cond":
                ways = enumerate(branches(eqn))
                outs = [self._run(way, args[1:], (*site, number)) for number, way in ways]
                each = zip(*outs, strict=True)
                return [self._add(Step("cond", (args[0], *several), eqn)) for several in each]
        if (inner := called(eqn)) is not None:
            return self._run(inner, args, site)
        name = eqn.primitive.name
        places = range(len(eqn.outvars))
        return [self._add(Step(name, tuple(args), eqn, place)) for place in places]

    def _scan(self, eqn: Any, args: list[int], site: Site) -> list[int]:
        scan = scan_parts(eqn)
        fixed, carry, rows = scan.operands(args)
        collected: dict[int, list[int]] = {}
        for number in scan.steps():
            now = [self._add(Step("row", (row,), eqn, number)) for row in rows]
            outs = self._run(scan.body, [*fixed, *carry, *now], (*site, number))
            carry, collected[number] = outs[: scan.carried], outs[scan.carried :]
        each = zip(*(collected[number] for number in range(scan.length)), strict=True)
        return [*carry, *(self._add(Step("stack", several, eqn)) for several in each)]
