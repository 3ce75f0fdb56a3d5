"""The variables of a model in each of its forms, and the way from one form to another.

A model is one part, or several by name; each part is in Linen form or in nnx form. Leaves are named
`collection/part/path` (of one part, `collection/path`), in either form with the collection that
Linen has them in. So a port whose statistics have a Variable type of their own is still updated by
`mutable=["batch_stats"]`.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from linen_nnx.book.moves import Move
from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.specs import Side
from linen_nnx.book.stages import WHOLE, Forms
from linen_nnx.errors import Refusal
from linen_nnx.ladder.port import Port

Leaves = dict[str, Any]


class VariablesError(Refusal):
    """Variables that do not fit the stage they are given to; the message lists every difference."""


class Way(NamedTuple):
    """One move of a rule book, and the part of the model that all of its leaves belong to."""

    part: str
    move: Move[str, str]


class Book:
    """A rule book between the two forms of a model.

    Attributes:
      rules: the rule book itself; `parts`: the names of the model's parts.
      specs: for each side, `{name: shape and dtype}` of all leaves in that form.
      types: `{name in nnx form: type of the Variable, as the bridge calls it}`.
    """

    def __init__(self, rules: RuleBook, linen: Leaves, ports: Mapping[str, Port]) -> None:
        """Raises `RuleError` with everything in which the book does not fit the two models."""
        self.rules, self.parts = rules, tuple(ports)
        nnx, types, self._keys = {}, {}, {}
        known = {part_of(name, ports) for name in linen}
        for part, port in ports.items():
            # A part that the example never calls has no Linen variables, and needs none.
            for path in port.leaves if part in known else ():
                name = f"{part}/{path}" if part else path
                nnx[name], types[name] = port.leaves[path], port.types[path]
                self._keys[name] = (part, *port.keys[path]) if part else port.keys[path]
        collection: dict[str, str] = {}
        ahead = rules.plan(linen, "nnx", nnx)
        for move in ahead.moves:
            for target in move.targets:
                own = move.sources[0].split("/")[0] if move.sources else types[target]
                collection[target] = own
        named = {path: f"{collection[path]}/{path}" for path in nnx}
        self.specs: dict[Side, Leaves] = {
            "linen": dict(linen),
            "nnx": {named[path]: spec for path, spec in nnx.items()},
        }
        self.types = {named[path]: kind for path, kind in types.items()}
        self._named = named
        back = rules.plan(nnx, "linen", linen)
        self.ways: dict[Side, list[Way]] = {"nnx": [], "linen": []}
        for move in ahead.moves:
            self._add("nnx", move._replace(targets=tuple(named[path] for path in move.targets)))
        for move in back.moves:
            self._add("linen", move._replace(sources=tuple(named[path] for path in move.sources)))

    def _add(self, to: Side, move: Move[str, str]) -> None:
        parts = {part_of(name, self.parts) for name in (*move.sources, *move.targets)}
        if len(parts) > 1:
            raise RuleError("The rule book cannot be used part by part", [f"{move.rule}: {parts}"])
        self.ways[to].append(Way(parts.pop(), move))

    def name(self, kind: str, path: str) -> str:
        """The name of an nnx leaf: as the book has it, else by its Variable's type."""
        return self._named.get(path, f"{kind}/{path}")

    def keys(self, name: str) -> tuple[Any, ...]:
        """The keys of an nnx leaf below its collection; of lists they are integers."""
        return self._keys[name.split("/", 1)[1]]

    def _place(self, name: str) -> tuple[str, str]:
        """Collection and part: trees may hold some of them alone."""
        return name.split("/")[0], part_of(name, self.parts)

    def abstract(self, forms: Forms) -> Leaves:
        """`{name: shape and dtype}` of every leaf in these forms."""
        result: Leaves = {}
        for side, specs in self.specs.items():
            for name, spec in specs.items():
                if forms[part_of(name, self.parts)] == side:
                    result[name] = spec
        return result

    def translate(self, leaves: Mapping[str, Any], before: Forms, after: Forms) -> Leaves:
        """The leaves in other forms; they may be those of some collections alone.

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
        present = {self._place(name) for name in leaves}
        for side in ("linen", "nnx"):
            for way in self.ways[side]:
                if before[way.part] == after[way.part] or after[way.part] != side:
                    continue
                move = way.move
                if self._place((move.sources or move.targets)[0]) in present:
                    arrays = move.run([leaves[name] for name in move.sources])
                    result.update(zip(move.targets, arrays, strict=True))
                    done.update(move.sources)
        if lost := [f"no rule matches `{name}`" for name in leaves if name not in done]:
            raise RuleError("The variables cannot be translated", lost)
        return result


def part_of(name: str, parts: Collection[str]) -> str:
    """The part that a leaf `collection/part/path` belongs to; `WHOLE` where it is the only one."""
    return WHOLE if WHOLE in parts else name.split("/")[1]


def collections_of(leaves: Iterable[str]) -> list[str]:
    """The collections beside the parameters, sorted, of leaves `collection/path`."""
    return sorted({name.split("/")[0] for name in leaves} - {"params"})


def check(leaves: Mapping[str, Any], expected: Mapping[str, Any], where: str) -> None:
    """Raises `VariablesError` naming every missing, unexpected or misshapen leaf.

    Args:
      leaves: `{name: array or tracer}`, what was got.
      expected: `{name: object with shape and dtype}`.
      where: what the leaves are for, to be named in the message.
    """
    if problems := differences(leaves, expected):
        raise VariablesError(
            f"The variables do not fit {where} ({len(problems)} differences):\n  "
            + "\n  ".join(problems)
            + "\nIf they come from another stage, translate them first: "
            "`ladder.move(tree, that_stage, this_stage)`."
        )


def differences(leaves: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """A line for every leaf that is missing, unexpected, or of another shape or dtype."""
    problems = []
    for name, spec in expected.items():
        if name not in leaves:
            problems.append(f"missing     {name}: expected {_spec(spec)}")
    for name, leaf in leaves.items():
        if name not in expected:
            problems.append(f"unexpected  {name}: got {_spec(leaf)}")
        elif _spec(leaf) != _spec(expected[name]):
            due = _spec(expected[name])
            problems.append(f"mismatch    {name}: got {_spec(leaf)}, expected {due}")
    return problems


def _spec(leaf: Any) -> str:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return f"a {type(leaf).__name__}, not an array"
    return f"{leaf.dtype}{list(leaf.shape)}"
