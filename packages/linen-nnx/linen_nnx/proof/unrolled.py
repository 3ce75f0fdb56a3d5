"""A jaxpr as one flat list of steps: calls opened, scans unrolled, each step with its address.

    scan over rows w0, w1:  c = tanh(c @ w)        number  step           args
                                                   0       argument c
                                                   1       argument w
                                                   2       row 0          1
                                                   3       dot_general    0, 2
                                                   4       tanh           3
                                                   5       row 1          1
                                                   6       dot_general    4, 5
                                                   7       tanh           6

Nothing is computed. `back` cuts out what one step needs, down to steps whose values are known:
`back(7, stops=[4])` is 1, 4, 5, 6, 7.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

from linen_nnx.infer.dataflow import Site
from linen_nnx.infer.jaxprs import branches, called, interpret, scan_parts, while_parts


class Step(NamedTuple):
    """One value: a result of an equation, a constant, or an argument of the jaxpr.

    Attributes:
      name: the primitive; or `constant`, `argument`; or `row` and `rows` of an unrolled scan: what
        a turn gets, and what all have given.
      args: the numbers of the steps that it takes.
      eqn: the equation; of a row or of rows the whole scan's; None for constants and arguments.
      place: which of the equation's results it is. For an argument its number, for a row its own.
      value: the array of a constant.
    """

    name: str
    args: tuple[int, ...] = ()
    eqn: Any = None
    place: int = 0
    value: Any = None


class Unrolled:
    """The steps of a jaxpr.

    Attributes:
      steps: all steps, in the order of running.
      at: by the address of an equation, the numbers of its results.
      outs: the numbers of what the jaxpr returns.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> body = lambda c, w: (jnp.tanh(c @ w), None)
        >>> c, w = jnp.ones((1, 4)), jnp.ones((2, 4, 4))
        >>> steps = Unrolled(jax.make_jaxpr(lambda c, w: jax.lax.scan(body, c, w)[0])(c, w))
        >>> [step.name for step in steps.steps]  # doctest: +NORMALIZE_WHITESPACE
        ['argument', 'argument', 'row', 'dot_general', 'tanh', 'row', 'dot_general', 'tanh']
        >>> steps.back(7, stops=[4])
        [1, 4, 5, 6, 7]
    """

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
            self.at[here] = list(outs)
            return outs

        return interpret(jaxpr, args, self._constant, equation)

    def _equation(self, eqn: Any, args: list[int], site: Site) -> Sequence[int]:
        match eqn.primitive.name:
            case "scan":
                return self._scan(eqn, args, site)
            case "while":
                return self._loop(eqn, args, site)
            case "cond":
                return self._branches(eqn, args, site)
        if (inner := called(eqn)) is not None:
            return self._run(inner, args, site)
        # A step for each result: what takes the one half of a `split` needs nothing of the other.
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
        # In the order of rows: a reverse scan has collected the last one first.
        in_order = [collected[number] for number in range(scan.length)]
        stacked = zip(*in_order, strict=True)
        return [*carry, *(self._add(Step("rows", several, eqn)) for several in stacked)]

    def _loop(self, eqn: Any, args: list[int], site: Site) -> list[int]:
        """The body once: it shows which functions the loop has, if not how often they run."""
        loop = while_parts(eqn)
        of_test, of_body, carry = loop.operands(args)
        self._run(loop.test, [*of_test, *carry], (*site, 0))
        return self._run(loop.body, [*of_body, *carry], (*site, 1))

    def _branches(self, eqn: Any, args: list[int], site: Site) -> list[int]:
        """All branches, as nothing here knows which one runs; a `cond` step chooses from them."""
        index, *given = args
        ways = []
        for number, branch in enumerate(branches(eqn)):
            ways.append(self._run(branch, given, (*site, number)))
        each = zip(*ways, strict=True)
        return [self._add(Step("cond", (index, *several), eqn)) for several in each]
