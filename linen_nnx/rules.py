"""The rule book: one list of two-way rules between Linen and nnx leaves.

    book = RuleBook.load("rules.yaml")
    nnx_leaves = book.to_nnx(linen_leaves)      # {path: array} -> {path: array}
    linen_leaves = book.to_linen(nnx_leaves)    # the inverse

The grammar is in `grammar.py`. Exactly one rule must match each leaf of either side; everything
that does not fit is raised together, as one `RuleError`. Leaves may be numpy or jax arrays, or
tracers under `jax.jit`; nothing is cast, and this module imports no jax.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from linen_nnx.grammar import Rule, did_you_mean, parse_rule, rule_to_dict
from linen_nnx.ops import Side
from linen_nnx.plan import Plan, Planner, RuleError

VERSION = 1
_KEYS = ("version", "rules")
# libyaml's parser where it is there: a book of 5000 rules takes 0.4 s instead of 4 s.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class RuleBook:
    """An immutable list of rules. Build it from `Rule`s, a dict, or a YAML file."""

    def __init__(self, rules: Iterable[Rule]) -> None:
        self.rules = tuple(rules)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RuleBook) and self.rules == other.rules

    def __hash__(self) -> int:
        return hash(self.rules)

    def __repr__(self) -> str:
        return f"RuleBook({len(self.rules)} rules)"

    @classmethod
    def load(cls, path: str | Path) -> "RuleBook":
        """Reads a YAML file. Raises `RuleError` naming file, rule number and key."""
        try:
            content = yaml.load(Path(path).read_text(), Loader=_LOADER)
        except yaml.YAMLError as error:
            raise RuleError(f"{path} is not YAML", [" ".join(str(error).split())]) from None
        return cls.from_dict(content, name=str(path))

    @classmethod
    def from_dict(cls, content: Any, name: str = "the rule book") -> "RuleBook":
        """Reads the mapping `{version: 1, rules: [...]}`; `name` is for messages.

        Raises `RuleError` with every fault of every rule.
        """
        if not isinstance(content, Mapping):
            raise RuleError(
                f"{name} cannot be read",
                [f"expected a mapping with `version` and `rules`, got {type(content).__name__}"],
            )
        problems = [
            f"unknown key `{key}`{did_you_mean(str(key), _KEYS)}"
            for key in content
            if key not in _KEYS
        ]
        if content.get("version") != VERSION:
            problems.append(f"`version` must be {VERSION}, got {content.get('version')!r}")
        entries = content.get("rules")
        if not isinstance(entries, list):
            problems.append(f"`rules` must be a list, got {entries!r}")
            entries = []
        rules = []
        for number, entry in enumerate(entries, start=1):
            try:
                rules.append(parse_rule(entry))
            except ValueError as error:
                problems.append(f"rule {number}: {error}")
        if problems:
            raise RuleError(f"{name} cannot be read", problems)
        return cls(rules)

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `from_dict` reads: plain dicts, lists, strings and numbers."""
        return {"version": VERSION, "rules": [rule_to_dict(rule) for rule in self.rules]}

    def save(self, path: str | Path) -> None:
        """Writes a YAML file that `load` reads back to an equal book."""
        content = self.to_dict()
        for entry in content["rules"]:
            if "ops" in entry:
                entry["ops"] = _OneLine(entry["ops"])
        Path(path).write_text(yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=1000))

    @property
    def invertible(self) -> bool:
        """Whether every rule keeps every bit both ways."""
        return all(rule.lossless for rule in self.rules)

    def within(self, half: str) -> "RuleBook":
        """The rules below one sub-tree: Linen `<collection>/<half>/...`, nnx `<half>/...`.

        For a tree in which only that half is translated. Keeps the order of the rules.
        """

        def inside(rule: Rule) -> bool:
            linen = [pattern.text.split("/")[1:2] for pattern in rule.linen]
            nnx = [pattern.text.split("/")[:1] for pattern in rule.nnx]
            return all(element == [half] for element in linen + nnx)

        return RuleBook(rule for rule in self.rules if inside(rule))

    def of_collection(self, collection: str) -> "RuleBook":
        """The rules of one Linen collection, for a tree that holds no other (a moment's, say)."""

        def inside(rule: Rule) -> bool:
            return all(pattern.text.split("/")[0] == collection for pattern in rule.linen)

        return RuleBook(rule for rule in self.rules if rule.linen and inside(rule))

    def plan(
        self,
        specs: Mapping[str, Any],
        to: Side,
        target: Mapping[str, Any] | None = None,
        partial: bool = False,
    ) -> Plan:
        """Plans a translation without touching data.

        Args:
          specs: `{path: leaf}` of the source side; leaves need `.shape` and `.dtype` only.
          to: the side to go to.
          target: the same for the other side, if known: then every one of its leaves must be
            filled, with its shape and dtype.
          partial: leave out what no rule matches, and accept idle rules and open target leaves.

        Raises:
          RuleError: with everything that does not fit.
        """
        return self._planner.plan(specs, to, target, partial)

    def to_nnx(
        self,
        leaves: Mapping[str, Any],
        target: Mapping[str, Any] | None = None,
        partial: bool = False,
    ) -> dict[str, Any]:
        """nnx leaves from Linen leaves; arguments and errors as in `plan`."""
        return self.plan(leaves, "nnx", target, partial).run(leaves)

    def to_linen(
        self,
        leaves: Mapping[str, Any],
        target: Mapping[str, Any] | None = None,
        partial: bool = False,
    ) -> dict[str, Any]:
        """Linen leaves from nnx leaves; arguments and errors as in `plan`."""
        return self.plan(leaves, "linen", target, partial).run(leaves)

    @cached_property
    def _planner(self) -> Planner:
        return Planner(self.rules)


class _OneLine(list[Any]):
    """A list that YAML writes on one line."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(
    _OneLine,
    lambda dumper, ops: dumper.represent_sequence("tag:yaml.org,2002:seq", ops, flow_style=True),
)
