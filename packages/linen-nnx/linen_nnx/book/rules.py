"""The rule book: one list of two-way rules between Linen and nnx leaves.

    >>> import numpy as np
    >>> rule = {"linen": "params/Dense_{i}/{leaf}", "nnx": "layers/{i}/{leaf}"}
    >>> book = RuleBook.from_dict({"version": 1, "rules": [rule]})
    >>> linen_leaves = {"params/Dense_0/kernel": np.ones((4, 8)), "params/Dense_0/bias": np.ones(8)}
    >>> nnx_leaves = book.to_nnx(linen_leaves)
    >>> list(nnx_leaves)
    ['layers/0/kernel', 'layers/0/bias']
    >>> list(book.to_linen(nnx_leaves))
    ['params/Dense_0/kernel', 'params/Dense_0/bias']

The grammar is in `grammar.py`. Exactly one rule must match each leaf of either side; everything
that does not fit is raised together, as one `RuleError`. Leaves may be numpy or jax arrays, or
tracers under `jax.jit`; nothing is cast, and this module imports no jax.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from linen_nnx.book.draws import Pairing, parse_pairing
from linen_nnx.book.grammar import Rule, noting, parse_rule, rule_to_dict, unknown
from linen_nnx.book.index import Hit, Index
from linen_nnx.book.plan import Plan, RuleError, make_plan
from linen_nnx.book.reading import parse_json, read_text
from linen_nnx.book.specs import Side

VERSION = 1


class Unassigned(NamedTuple):
    """A leaf that `suggest` found no safe rule for; write one by hand and delete this entry."""

    side: Side
    reason: str
    candidates: tuple[str, ...]
    """Leaves of the other side, the likeliest first."""
    likely: Rule | None = None
    """The rule that would close it, where there is a likely one; nothing proves it."""


class RuleBook:
    """An immutable list of rules. Build it from `Rule`s, a dict, or a YAML file.

    `unassigned` maps the path of each leaf that still lacks a rule to what is known of it. While
    it is not empty, translating raises unless `partial=True`. `draws` pairs the random keys of
    both models, for each kind of call (`draws.py`); translating needs none of it. `notes` are
    for the reader: `suggest` writes there what it found out about the two models as wholes.

    Example:
      >>> import numpy as np
      >>> rule = {"linen": "params/up/{leaf}", "nnx": "first/{leaf}"}
      >>> book = RuleBook.from_dict({"version": 1, "rules": [rule]})
      >>> list(book.to_nnx({"params/up/kernel": np.ones((2, 3))}))
      ['first/kernel']
    """

    def __init__(
        self,
        rules: Iterable[Rule],
        unassigned: Mapping[str, Unassigned] = MappingProxyType({}),
        draws: Iterable[Pairing] = (),
        notes: Iterable[str] = (),
    ) -> None:
        self.rules = tuple(rules)
        self.notes = tuple(notes)
        self.unassigned = MappingProxyType(dict(unassigned))
        self.draws = tuple(draws)
        # The text of the file it was loaded from, or is saved to: `save` keeps a person's comments.
        self._text: str | None = None

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RuleBook)
            and self.rules == other.rules
            and self._open() == other._open()
            and self.draws == other.draws
            and self.notes == other.notes
        )

    def _open(self) -> dict[str, Any]:
        """Each open leaf without its likely rule, which a file has as a comment alone."""
        return {leaf: known[:3] for leaf, known in self.unassigned.items()}

    def __repr__(self) -> str:
        open_leaves = f", {len(self.unassigned)} leaves unassigned" if self.unassigned else ""
        return f"RuleBook({len(self.rules)} rules{open_leaves})"

    @classmethod
    def load(cls, path: str | Path) -> "RuleBook":
        """Reads a YAML file.

        Raises `RuleError` naming file, rule number and key, or `OSError` for a file that is not
        there.
        """
        try:
            text = read_text(path)
        except ValueError as error:
            raise RuleError(f"{path} cannot be read", [str(error)]) from None
        # JSON is YAML, too, and is read fifty times faster.
        try:
            content = parse_json(text)
        except ValueError:
            from linen_nnx.book.yaml_io import parse

            try:
                content = parse(text)
            except ValueError as error:
                raise RuleError(f"{path} is not YAML", [str(error)]) from None
        book = cls.from_dict(content, name=str(path))
        book._text = text
        return book

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
        # All faults of a book at once: a person mends them in one go.
        problems = unknown(
            content, ("version", "notes", "rules", "unassigned", "draws"), "unknown key"
        )
        if content.get("version") != VERSION:
            problems.append(f"`version` must be {VERSION}, got {content.get('version')!r}")
        rules = _rules_in(content, problems)
        unassigned = _unassigned_in(content, problems)
        draws = _draws_in(content, problems)
        notes = content.get("notes") or ()
        if type(notes) not in (list, tuple) or not all(isinstance(n, str) for n in notes):
            problems.append(f"`notes` must be a list of texts, got {notes!r}")
        if problems:
            raise RuleError(f"{name} cannot be read", problems)
        return cls(rules, unassigned, draws, notes)

    def to_dict(self) -> dict[str, Any]:
        """The mapping that `from_dict` reads: plain dicts, lists, strings and numbers."""
        content: dict[str, Any] = {"version": VERSION}
        if self.notes:
            content["notes"] = list(self.notes)
        content["rules"] = [rule_to_dict(rule) for rule in self.rules]
        if self.unassigned:
            content["unassigned"] = [
                _unassigned_to_dict(leaf, known) for leaf, known in self.unassigned.items()
            ]
        if self.draws:
            content["draws"] = [pairing.to_dict() for pairing in self.draws]
        return content

    def save(self, path: str | Path) -> None:
        """Writes a YAML file that `load` reads back to an equal book; a loaded one as it was."""
        # A loaded book is written as it was, with the comments of whoever wrote it.
        if self._text is None:
            from linen_nnx.book.yaml_io import write

            self._text = write(self.to_dict())
        Path(path).write_text(self._text)

    @property
    def invertible(self) -> bool:
        """Whether every leaf has a rule, and every rule keeps every bit both ways."""
        return not self.unassigned and all(rule.lossless for rule in self.rules)

    def within(self, part: str) -> "RuleBook":
        """The rules below one sub-tree: Linen `<collection>/<part>/...`, nnx `<part>/...`.

        For a tree in which only that part is translated. Keeps the order of the rules.
        """

        def is_inside(side: Side, path: str) -> bool:
            elements = path.split("/")
            # In front of a Linen path stands its collection.
            below = elements[1:] if side == "linen" else elements
            return below[:1] == [part]

        return self._only(("linen", "nnx"), is_inside)

    def of_collection(self, collection: str) -> "RuleBook":
        """The rules of one Linen collection, for a tree that holds no other (a moment's, say)."""
        return self._only(("linen",), lambda _, path: path.split("/")[0] == collection)

    def _only(self, sides: Collection[Side], fits: Callable[[Side, str], bool]) -> "RuleBook":
        """The rules that have patterns on some sides, all of which fit; unassigned leaves alike."""

        def inside(rule: Rule) -> bool:
            fitting = []
            for side in sides:
                fitting += [fits(side, pattern.text) for pattern in rule.side(side)]
            # A rule without a pattern on these sides says nothing of the sub-tree.
            return bool(fitting) and all(fitting)

        unassigned = {}
        for leaf, known in self.unassigned.items():
            if known.side in sides and fits(known.side, leaf):
                unassigned[leaf] = known
        return RuleBook(filter(inside, self.rules), unassigned)

    def plan(
        self,
        specs: Mapping[str, Any],
        to: Side,
        target: Mapping[str, Any] | None = None,
        partial: bool = False,
        idle: Collection[int] = (),
    ) -> Plan:
        """Plans a translation without touching data.

        Args:
          specs: `{path: leaf}` of the source side; leaves need `.shape` and `.dtype` only.
          to: the side to go to.
          target: the same for the other side, if known: then every one of its leaves must be
            filled, with its shape and dtype.
          partial: leave out what no rule matches, and accept idle rules and open target leaves.
          idle: the numbers of rules that may match nothing.

        Raises:
          RuleError: with everything that does not fit, or every leaf that is still unassigned.
        """
        if self.unassigned and not partial:
            problems = []
            for leaf, known in self.unassigned.items():
                problem = f"the {known.side} leaf `{leaf}` is unassigned: {known.reason}"
                if known.candidates:
                    problem += f"; candidates: {', '.join(known.candidates)}"
                problems.append(problem)
            raise RuleError(
                "The rule book is not complete: write rules for these leaves and delete them from "
                "`unassigned`, or pass partial=True for what is assigned",
                problems,
            )
        return make_plan(self.rules, self.hits, specs, to, target, partial, idle)

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

    def hits(self, side: Side, path: str) -> list[Hit]:
        """Every pattern on `side` that matches `path`."""
        return self._index[side].match(path)

    # Made when it is first asked for: a book may be read and only shown.
    @cached_property
    def _index(self) -> dict[Side, Index]:
        rules = self.rules
        return {"linen": Index([r.linen for r in rules]), "nnx": Index([r.nnx for r in rules])}


def _rules_in(content: Mapping[str, Any], problems: list[str]) -> list[Rule]:
    """The rules of a book's mapping; each that cannot be read adds a problem."""
    entries = content.get("rules")
    # `rules:` with nothing but comments below it: likely rules, each still to be uncommented.
    if entries is None and "rules" in content and content.get("unassigned"):
        entries = []
    if not isinstance(entries, list):
        problems.append(f"`rules` must be a list, got {entries!r}")
        entries = []
    rules = []
    for number, entry in enumerate(entries, start=1):
        with noting(problems, f"rule {number}: "):
            rules.append(parse_rule(entry))
    return rules


def _unassigned_in(content: Mapping[str, Any], problems: list[str]) -> dict[str, Unassigned]:
    """The open leaves of a book's mapping, by path."""
    entries = content.get("unassigned") or []
    if not isinstance(entries, list):
        problems.append(f"`unassigned` must be a list, got {type(entries).__name__}")
        entries = []
    unassigned = {}
    for number, entry in enumerate(entries, start=1):
        with noting(problems, f"unassigned leaf {number}: "):
            leaf, known = _read_unassigned(entry)
            unassigned[leaf] = known
    return unassigned


def _draws_in(content: Mapping[str, Any], problems: list[str]) -> list[Pairing]:
    """The pairings of a book's mapping, one for each kind of call."""
    draws: dict[str, Pairing] = {}
    for number, entry in enumerate(content.get("draws") or (), start=1):
        with noting(problems, f"entry {number} of `draws`: "):
            pairing = parse_pairing(entry)
            # Two entries could pair one draw in two ways.
            if pairing.kind in draws:
                raise ValueError(f"the call {pairing.kind} has an entry before")
            draws[pairing.kind] = pairing
    return list(draws.values())


def _unassigned_to_dict(leaf: str, known: Unassigned) -> dict[str, Any]:
    """One entry of `unassigned`, the inverse of `_read_unassigned`."""
    entry: dict[str, Any] = {"leaf": leaf, "side": known.side, "reason": known.reason}
    entry["candidates"] = list(known.candidates)
    return entry if known.likely is None else {**entry, "likely": rule_to_dict(known.likely)}


def _read_unassigned(entry: Any) -> tuple[str, Unassigned]:
    """One entry of `unassigned`. Raises `ValueError` saying what it must be."""
    keys = {"leaf", "side", "reason", "candidates"}
    if not isinstance(entry, Mapping) or set(entry) - {"likely"} != keys:
        raise ValueError(f"expected a mapping with leaf, side, reason, candidates, got {entry!r}")
    candidates = entry["candidates"] or []
    if not isinstance(candidates, list):
        raise ValueError(f"`candidates` is a list of texts, got {candidates!r}")
    likely = parse_rule(entry["likely"]) if "likely" in entry else None
    known = Unassigned(entry["side"], entry["reason"], tuple(candidates), likely)
    if not all(isinstance(text, str) for text in (entry["leaf"], known.reason, *candidates)):
        raise ValueError(f"leaf, reason and candidates are texts, got {entry!r}")
    if known.side not in ("linen", "nnx"):
        raise ValueError(f"`side` is linen or nnx, got {known.side!r}")
    return entry["leaf"], known
