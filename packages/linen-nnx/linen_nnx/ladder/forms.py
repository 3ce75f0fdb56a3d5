"""The variables of a model in each of its forms, and the way from one form to another.

A model is one part, or several by name; each part is in Linen form or in nnx form. A leaf is named
`collection/part/path`, or `collection/path` in a model of one part. For a part `net` of one layer
with its norm, and a port that calls them `up` and `norm`:

    Linen form                        nnx form
    params/net/Dense_0/kernel         params/net/up/kernel
    batch_stats/net/BatchNorm_0/var   batch_stats/net/norm/var

The collection of a leaf in nnx form is the one that Linen has it in, whatever the type of its
Variable: so `mutable=["batch_stats"]` updates a port whose statistics are of a type of their own.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from linen_nnx.book.moves import Move
from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.specs import Side
from linen_nnx.book.stages import WHOLE, Forms
from linen_nnx.errors import Refusal
from linen_nnx.ladder.port import Leaves, Port


class VariablesError(Refusal):
    """Variables that do not fit the stage they are given to; the message lists every difference.

    Example:
      >>> import numpy as np
      >>> try:
      ...     due = {"params/kernel": np.zeros((2, 3))}
      ...     check({"params/bias": np.zeros(2)}, due, "stage 'nnx'")
      ... except VariablesError as error:
      ...     print(*str(error).splitlines()[:3], sep="\\n")
      The variables do not fit stage 'nnx' (2 differences):
        missing     params/kernel: expected float64[2, 3]
        unexpected  params/bias: got float64[2]
    """


class Way(NamedTuple):
    """One move of a rule book, and the part of the model that all of its leaves belong to."""

    part: str
    move: Move[str, str]


class FittedBook:
    """A rule book that has been fitted to the two forms of a model.

    Attributes:
      rules: the rule book itself; `parts`: the names of the model's parts.
      specs: for each side, `{name: shape and dtype}` of all leaves in that form.
      types: `{name in nnx form: type of the Variable, as the bridge calls it}`.
      ways: for each side, what leads to the leaves in that form.
    """

    def __init__(self, rules: RuleBook, linen: Leaves, ports: Mapping[str, Port]) -> None:
        """Fits a rule book.

        Args:
          rules: the rule book.
          linen: `{name: shape and dtype}` of the Linen model's leaves.
          ports: the structure of each part in nnx.

        Raises:
          RuleError: with everything in which the book does not fit the two models.
        """
        self.rules, self.parts = rules, tuple(ports)
        nnx: Leaves = {}
        types: dict[str, str] = {}
        self._keys: dict[str, tuple[Any, ...]] = {}
        called = {part_of(name, ports) for name in linen}
        for part, port in ports.items():
            if part not in called:
                continue  # the example never calls it: it has no Linen variables, and needs none
            for inner, spec in port.leaves.items():
                path = f"{part}/{inner}" if part else inner
                nnx[path], types[path] = spec, port.types[inner]
                self._keys[path] = (part, *port.keys[inner]) if part else port.keys[inner]

        ahead = rules.plan(linen, "nnx", nnx)
        self._named: dict[str, str] = {}
        for move in ahead.moves:
            for target in move.targets:
                # A leaf that only nnx has is in no collection of Linen's: its type names it.
                own = move.sources[0].split("/")[0] if move.sources else types[target]
                self._named[target] = f"{own}/{target}"
        self.specs: dict[Side, Leaves] = {"linen": dict(linen), "nnx": {}}
        self.types: dict[str, str] = {}
        for path, spec in nnx.items():
            self.specs["nnx"][self._named[path]] = spec
            self.types[self._named[path]] = types[path]

        # Both ways are planned here, so that a book that leads one way alone is refused before
        # anything is trained.
        back = rules.plan(nnx, "linen", linen)
        self.ways: dict[Side, list[Way]] = {"nnx": [], "linen": []}
        for move in ahead.moves:
            self._add("nnx", move._replace(targets=self._names(move.targets)))
        for move in back.moves:
            self._add("linen", move._replace(sources=self._names(move.sources)))

    def _names(self, paths: Iterable[str]) -> tuple[str, ...]:
        return tuple([self._named[path] for path in paths])

    def _add(self, to: Side, move: Move[str, str]) -> None:
        parts = {part_of(name, self.parts) for name in (*move.sources, *move.targets)}
        # At a hybrid stage one of the two parts would be in the other form.
        if len(parts) > 1:
            raise RuleError("The rule book cannot be used part by part", [f"{move.rule}: {parts}"])
        self.ways[to].append(Way(parts.pop(), move))

    def name(self, kind: str, path: str) -> str:
        """The name of the nnx leaf at a path, `part/...`, whose Variable is of a type `kind`.

        A leaf that the book does not know is one that the call has made, such as a sown value.
        """
        return self._named.get(path, f"{kind}/{path}")

    def keys(self, name: str) -> tuple[Any, ...]:
        """The keys of an nnx leaf below its collection.

        Unlike the name they hold the indices of an `nnx.List` as integers, which Flax requires.
        """
        return self._keys[name.split("/", 1)[1]]

    def _place(self, name: str) -> tuple[str, str]:
        """The collection and the part of a leaf."""
        return name.split("/")[0], part_of(name, self.parts)

    def abstract(self, forms: Forms) -> Leaves:
        """`{name: shape and dtype}` of every leaf in these forms."""
        # In the order of the two models and not of `forms`: messages list leaves in this order.
        result: Leaves = {}
        for side, specs in self.specs.items():
            for name, spec in specs.items():
                if forms[part_of(name, self.parts)] == side:
                    result[name] = spec
        return result

    def translate(self, leaves: Mapping[str, Any], before: Forms, after: Forms) -> Leaves:
        """The leaves in other forms.

        Args:
          leaves: `{name: array or tracer}`; some collections or parts alone will do, each whole.
          before: the form of each part in `leaves`; `after`: the form that each part gets.

        Raises:
          RuleError: for leaves that no rule of the book knows.
        """
        result: Leaves = {}
        done: set[str] = set()
        for name, leaf in leaves.items():
            part = part_of(name, self.parts)
            if before[part] == after[part]:
                result[name] = leaf
                done.add(name)
        # `params` alone may be translated, as for gradients; or the statistics of one part alone.
        present = {self._place(name) for name in leaves}
        for side in ("linen", "nnx"):
            for way in self.ways[side]:
                if before[way.part] == after[way.part] or after[way.part] != side:
                    continue
                move = way.move
                # A collection that is not there is not translated; one that is, whole.
                if self._place((move.sources or move.targets)[0]) in present:
                    arrays = move.run([leaves[name] for name in move.sources])
                    result.update(zip(move.targets, arrays, strict=True))
                    done.update(move.sources)
        lost = [f"no rule matches `{name}`" for name in leaves if name not in done]
        if lost:
            raise RuleError("The variables cannot be translated", lost)
        return result

    def filled(self, forms: Forms) -> Leaves:
        """The leaves of the parts in nnx form that come from no leaf of Linen, as rules fill them.

        Tables that nnx alone keeps are in no collection of Linen's: `translate` passes them by.
        """
        result: Leaves = {}
        for way in self.ways["nnx"]:
            if not way.move.sources and forms[way.part] == "nnx":
                result.update(zip(way.move.targets, way.move.run([]), strict=True))
        return result


def part_of(name: str, parts: Collection[str]) -> str:
    """The part that a leaf `collection/part/path` belongs to; `WHOLE` where it is the only one.

    Example:
      >>> part_of("params/head/kernel", ["body", "head"])
      'head'
    """
    return WHOLE if WHOLE in parts else name.split("/")[1]


def collections_of(leaves: Iterable[str]) -> list[str]:
    """The collections beside the parameters, sorted, of leaves `collection/path`."""
    return sorted({name.split("/")[0] for name in leaves} - {"params"})


def check(leaves: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Compares leaves with the ones that are due, by name, shape and dtype.

    Args:
      leaves: `{name: array or tracer}`, what was got.
      expected: `{name: object with shape and dtype}`.
      where: what the leaves are for, to be named in the message.

    Raises:
      VariablesError: naming every missing, unexpected or misshapen leaf.
    """
    problems = differences(leaves, expected)
    if problems:
        raise VariablesError(
            f"The variables do not fit {where} ({len(problems)} differences):\n  "
            + "\n  ".join(problems)
            + "\nIf they come from another stage, translate them first: "
            "`ladder.move(tree, that_stage, this_stage)`."
        )


def differences(leaves: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """A line for every leaf that is missing, unexpected, or of another shape or dtype."""
    # What is missing comes first: the rest often follows from it, as where a name is mistyped.
    problems: list[str] = []
    for name, spec in expected.items():
        if name not in leaves:
            problems.append(f"missing     {name}: expected {_spec(spec)}")
    for name, leaf in leaves.items():
        got = _spec(leaf)
        if name not in expected:
            problems.append(f"unexpected  {name}: got {got}")
        elif got != _spec(expected[name]):
            problems.append(f"mismatch    {name}: got {got}, expected {_spec(expected[name])}")
    return problems


def _spec(leaf: Any) -> str:
    # A Python number would be traced with a weak type, which is promoted in another way.
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return f"a {type(leaf).__name__}, not an array"
    return f"{leaf.dtype}{list(leaf.shape)}"
