"""A plan in the making: the moves so far, and the faults so far."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from linen_nnx.book.grammar import Rule
from linen_nnx.book.index import Hit
from linen_nnx.book.moves import Move
from linen_nnx.book.specs import Side, Spec

_EXAMPLES = 3  # leaves shown of those that the same rules match


@dataclass
class Draft:
    """One planning: the rules and leaves that it is about, the moves and faults found so far."""

    rules: Sequence[Rule]
    hits: Callable[[Side, str], list[Hit]]
    """Finds every pattern on a side that matches a path."""
    to: Side
    source: dict[str, Spec]
    target: dict[str, Spec] | None
    moves: list[Move[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    used: set[int] = field(default_factory=set)
    """The rules that match a leaf, by number."""
    broken: set[int] = field(default_factory=set)
    """The rules with a problem of their own: a leaf that they leave open is no second problem."""
    unmatched: list[str] = field(default_factory=list)
    """The leaves of the source that no rule matches."""
    ambiguous: dict[tuple[Side, tuple[int, ...]], list[str]] = field(default_factory=dict)
    """The leaves that several rules match, by side and rules."""

    side: Side = field(init=False)
    """The side to go from."""

    def __post_init__(self) -> None:
        self.side = "linen" if self.to == "nnx" else "nnx"

    def fault(self, number: int, text: str) -> None:
        """Adds a problem of one rule."""
        self.broken.add(number)
        self.problems.append(f"{self.name(number)}: {text}")

    def name(self, number: int) -> str:
        """How messages call a rule, counted from 1 as people do."""
        return f"rule {number + 1} ({self.rules[number]})"

    def note_ambiguous(self, side: Side, path: str, hits: Sequence[Hit]) -> None:
        """Keeps a leaf that several rules match: leaves of the same rules share one message."""
        rules = tuple(sorted({hit.rule for hit in hits}))
        self.broken.update(rules)
        self.ambiguous.setdefault((side, rules), []).append(path)

    def report_ambiguous(self) -> None:
        """Adds a problem for each set of rules that match the same leaves."""
        for (side, rules), found in self.ambiguous.items():
            # A leaf may have been noted as a source and again as a target.
            paths = [f"`{path}`" for path in dict.fromkeys(found)]
            by = " and ".join(map(self.name, rules))
            # Two parts of one list.
            if len(rules) == 1:
                by += " (twice)"
            if len(paths) == 1:
                self.problems.append(f"the {side} leaf {paths[0]} is matched by {by}")
                continue
            shown = paths[:_EXAMPLES]
            if len(paths) > _EXAMPLES:
                shown.append("...")
            self.problems.append(
                f"{len(paths)} {side} leaves are matched by {by}: {', '.join(shown)}"
            )
