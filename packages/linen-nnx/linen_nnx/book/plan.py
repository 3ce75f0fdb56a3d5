"""Plans a translation from shapes alone: which leaves become which, by which actions.

Planning finds every fault of a book against a tree and raises them together; it touches no array
data, so that it serves arrays, tracers, abstract trees and checkpoints on disk alike. A `Plan` is
then run on arrays (`RuleBook.to_nnx`) or on a store's bytes (the converter).
"""

import difflib
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from linen_nnx.book.grammar import Rule, did_you_mean
from linen_nnx.book.index import Hit
from linen_nnx.book.moves import Move
from linen_nnx.book.ops import PART, Action, Block, Drop, Fill, Init, Mismatch, Side, Spec, Stack
from linen_nnx.book.patterns import Pattern, is_integer
from linen_nnx.book.tree import branches_of
from linen_nnx.errors import Refusal

_SHOWN = 100  # problems in one message; the rest is counted, and is in `.problems`
_EXAMPLES = 3  # leaves shown of those that the same rules match
_TREE = (
    "give a target tree (`target=`; on the command line a checkpoint of that form with --like, a "
    "fresh one will do, or both models with --twin); or state `shape` and `dtype`, with no capture "
    "in the last name"
)
_COMPARED = 50_000  # names compared for suggestions, which takes difflib about two seconds


class RuleError(Refusal):
    """A book that does not fit a tree, or cannot be read; `problems` lists every reason."""

    def __init__(self, headline: str, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        lines = [f"  - {problem}" for problem in self.problems[:_SHOWN]]
        if len(self.problems) > _SHOWN:
            lines.append(f"  ... and {len(self.problems) - _SHOWN} more")
        noun = "problem" if len(self.problems) == 1 else "problems"
        super().__init__("\n".join([f"{headline} ({len(self.problems)} {noun}):", *lines]))


@dataclass(frozen=True)
class Plan:
    """Every move of one translation, from paths to paths. Each move has the rule that says so."""

    moves: tuple[Move[str, str], ...]

    def run(self, leaves: Mapping[str, Any]) -> dict[str, Any]:
        """Target leaves from source leaves."""
        result: dict[str, Any] = {}
        for move in self.moves:
            arrays = move.run([leaves[path] for path in move.sources])
            result.update(zip(move.targets, arrays, strict=True))
        return result


def make_plan(
    rules: Sequence[Rule],
    hits: Callable[[Side, str], list[Hit]],
    leaves: Mapping[str, Any],
    to: Side,
    target: Mapping[str, Any] | None,
    partial: bool,
    idle: Collection[int],
) -> Plan:
    """`RuleBook.plan`; `hits` finds every pattern on a side that matches a path."""
    if to not in ("linen", "nnx"):
        raise ValueError(f"`to` is linen or nnx, got {to!r}")
    wanted = None if target is None else _specs(target)
    attempt = _Attempt(rules, hits, to, _specs(leaves), wanted)
    attempt.used.update(idle)
    attempt.match()
    attempt.fill()
    attempt.check(partial)
    if attempt.problems:
        raise RuleError(f"The rule book does not fit, going to {to}", attempt.problems)
    return Plan(tuple(attempt.moves))


class _Attempt:
    """One planning, with the problems found so far."""

    def __init__(
        self,
        rules: Sequence[Rule],
        hits: Callable[[Side, str], list[Hit]],
        to: Side,
        source: dict[str, Spec],
        target: dict[str, Spec] | None,
    ) -> None:
        self.rules, self.hits, self.source, self.target = rules, hits, source, target
        self.to: Side = to
        self.side: Side = "linen" if to == "nnx" else "nnx"
        self.moves: list[Move[str, str]] = []
        self.problems: list[str] = []
        self.used: set[int] = set()
        self.broken: set[int] = set()  # rules with a problem of their own: no follow-up errors
        self.unmatched: list[str] = []
        self.compared = 0  # names so far, for suggestions
        self.ambiguous: dict[tuple[Side, tuple[int, ...]], list[str]] = {}  # by side and rules

    def match(self) -> None:
        """Groups the source leaves by rule and shared captures, and plans each group."""
        groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[tuple[int, ...], str]] = {}
        for path, spec in self.source.items():
            hits = self.hits(self.side, path)
            if not hits:
                self.unmatched.append(path)
            elif len(hits) > 1:
                self.used.update(hit.rule for hit in hits)
                self._note_ambiguous(self.side, path, hits)
            else:
                number, part, captures = hits[0]
                rule = self.rules[number]
                self.used.add(number)
                if not rule.ops:  # a plain rename, which is most leaves of most books
                    target = rule.side(self.to)[0].format(captures)
                    self.moves.append(Move((path,), (target,), (), (spec,), rule))
                else:
                    stacked = self._stacked(rule)
                    shared = tuple(sorted((c, captures[c]) for c in captures if c not in stacked))
                    place = (part, *(int(captures[name]) for name in stacked))
                    groups.setdefault((number, shared), {})[place] = path
        for (number, shared), members in groups.items():
            self._group(number, dict(shared), members)

    def _stacked(self, rule: Rule) -> list[str]:
        """The captures that the source side has and the target side lacks."""
        here = rule.side(self.side)[0].captures
        return [op.capture for op in rule.ops if isinstance(op, Stack) and op.capture in here]

    def _group(
        self, number: int, shared: dict[str, str], members: dict[tuple[int, ...], str]
    ) -> None:
        """Plans a rule for the leaves `members`, by part and stacked captures."""
        rule = self.rules[number]
        if not rule.side(self.to):
            self.moves += [Move((path,), (), rule=rule) for path in members.values()]
            return
        try:
            coords = self._coords(rule, members)
            sources = tuple(members[place] for place in sorted(members))
            block = Block(coords, tuple(self.source[path] for path in sources))
            actions, block = self._actions(rule, block)
        except Mismatch as mismatch:
            self._fault(number, f"{mismatch} (at `{next(iter(members.values()))}`)")
            return
        targets = self._targets(rule, shared, block)
        self.moves.append(Move(sources, targets, actions, block.specs, rule))

    def _coords(self, rule: Rule, members: Collection[tuple[int, ...]]) -> dict[str, int]:
        """The grid that the members fill, or a `Mismatch` that names the holes in it."""
        parts, stacked = rule.side(self.side), self._stacked(rule)
        columns = zip([PART, *stacked], zip(*members, strict=True), strict=True)
        sizes = {name: max(column) + 1 for name, column in columns} | {PART: len(parts)}
        holes: list[str] = []
        for part, pattern in enumerate(parts):
            here = [place[1:] for place in members if place[0] == part]
            if not here:
                holes.append(f"no leaf matches its part `{pattern.text}`")
            for name, numbers in zip(stacked, zip(*here, strict=True), strict=False):
                if missing := sorted(set(range(sizes[name])) - set(numbers)):
                    shown = ", ".join(map(str, missing[:10]))
                    holes.append(
                        f"`{{{name}}}` in `{pattern.text}` must run 0..{sizes[name] - 1} "
                        f"without gaps, missing: {shown}"
                    )
        grid = math.prod(sizes.values())
        if not holes and len(members) != grid:
            holes.append(f"the stacked indices fill {len(members)} of {grid} places")
        if holes:
            raise Mismatch("; ".join(holes))
        if len(parts) == 1:
            del sizes[PART]
        return sizes

    def _actions(self, rule: Rule, block: Block) -> tuple[tuple[Action, ...], Block]:
        if rule.ops and any(str(spec.dtype).startswith("key<") for spec in block.specs):
            raise Mismatch("typed PRNG keys can be renamed only")
        ops = rule.ops if self.to == "nnx" else rule.ops[::-1]
        actions = []
        for op in ops:
            assert not isinstance(op, Drop | Init)  # one-sided, never planned here
            action, block = op.plan(block, self.to, len(rule.side(self.to)))
            actions.append(action)
        return tuple(actions), block

    def _targets(self, rule: Rule, shared: dict[str, str], block: Block) -> tuple[str, ...]:
        """The paths of a planned block, in its row-major order."""
        patterns, targets = rule.side(self.to), []
        for place in itertools.product(*map(range, block.coords.values())):
            at = dict(zip(block.coords, place, strict=True))
            pattern = patterns[at.pop(PART, 0)]
            targets.append(pattern.format({**shared, **{k: str(v) for k, v in at.items()}}))
        return tuple(targets)

    def fill(self) -> None:
        """Plans the `init` rules of the target side."""
        for number, rule in enumerate(self.rules):
            init = rule.init
            if rule.side(self.side) or init is None:
                continue
            pattern = rule.side(self.to)[0]
            if self.target is not None:
                wanted = {p: s for p, s in self.target.items() if pattern.match(p) is not None}
            elif init.spec:
                wanted = dict.fromkeys(self._places(pattern), init.spec)
            else:
                wanted = {}
            if self.target is None and not wanted:
                self._fault(number, f"cannot be placed or shaped: {_TREE}")
            if wanted:
                self.used.add(number)
            for path, spec in wanted.items():
                if init.spec and not init.spec.same(spec):
                    self._fault(number, f"states {init.spec}, the target's `{path}` is {spec}")
                fill = Fill(init.fill, init.stddev, init.seed, path, spec, init.data)
                self.moves.append(Move((), (path,), (fill,), (spec,), rule))

    def _places(self, pattern: Pattern) -> list[str]:
        """Where a pattern fills a leaf, if no target tree says so: beside the leaves that move.

        With `layers/{i}/key/kernel` moved to the layers 0 and 1, `layers/{i}/key/bias` is filled in
        both: each node that its parent matches gets one.
        """
        if pattern.literal:
            return [pattern.text]
        node, _, name = pattern.text.rpartition("/")
        if not node or "{" in name:
            return []
        parent = Pattern(node)
        nodes = branches_of(path for move in self.moves for path in move.targets)
        return [f"{node}/{name}" for node in sorted(nodes) if parent.match(node) is not None]

    def check(self, partial: bool) -> None:
        """Checks what the moves write against each other, the book and the target."""
        written: dict[str, Spec] = {}
        for move in self.moves:
            for path, spec in zip(move.targets, move.specs, strict=True):
                self._check_target(move, path, spec, written)
                written[path] = spec
        self._report_ambiguous()
        if partial:
            return
        unfilled = [path for path in self.target or () if path not in written]
        self._report_unmatched(unfilled)
        self._report_unused()
        self._report_unfilled(self.target or {}, unfilled)

    def _check_target(
        self, move: Move[str, str], path: str, spec: Spec, written: Mapping[str, Spec]
    ) -> None:
        if not path:
            self.problems.append(f"{_origin(move)} would get an empty path from {move.rule}")
            return
        if path in written:
            self.problems.append(f"two sources for `{path}`: the second is {_origin(move)}")
        hits = self.hits(self.to, path)
        if len(hits) > 1:
            self._note_ambiguous(self.to, path, hits)
        if self.target is None:
            return
        due = self.target.get(path)
        if due is None:
            near = did_you_mean(path, self.target) if self._may_compare(self.target) else ""
            self.problems.append(f"{_origin(move)} becomes `{path}`, which the target lacks{near}")
        elif not due.same(spec):
            self.problems.append(
                f"`{path}` would be {spec} (from {_origin(move)}), but the target wants {due}"
            )

    def _report_unmatched(self, unfilled: list[str]) -> None:
        if not self.unmatched:
            return
        hint = self._collection_hint()
        patterns = [
            pattern
            for number, rule in enumerate(self.rules)
            if number not in self.used
            for pattern in rule.side(self.side)
        ]
        for path in self.unmatched:
            near = hint
            if not hint and self._may_compare([*patterns, *unfilled]):
                near = _letter_for_a_name(path, patterns) or self._nearest(path, patterns, unfilled)
            self.problems.append(
                f"no rule matches the {self.side} leaf `{path}` ({self.source[path]}){near}"
            )

    def _nearest(self, path: str, patterns: list[Pattern], unfilled: list[str]) -> str:
        """The nearest idle pattern of this side, else the nearest open leaf of the other."""
        texts = [pattern.text for pattern in patterns]
        if near := difflib.get_close_matches(path, texts, n=1):
            return f"; the nearest idle pattern is `{near[0]}`"
        fits = [p for p in unfilled if self.target and self.target[p].same(self.source[path])]
        near = difflib.get_close_matches(path, fits, n=1, cutoff=0.4)
        return f"; the nearest open {self.to} leaf is `{near[0]}`" if near else ""

    def _may_compare(self, names: Collection[Any]) -> bool:
        """Whether a suggestion from so many names is still to be had in reasonable time."""
        self.compared += len(names)
        return self.compared <= _COMPARED

    def _collection_hint(self) -> str:
        """Whether all unmatched Linen leaves would match with a collection added or removed."""
        if self.side != "linen":
            return ""
        heads = {p.text.split("/")[0] for rule in self.rules for p in rule.linen}
        for head in sorted(heads):
            if all(self.hits("linen", f"{head}/{path}") for path in self.unmatched):
                return f"; with the level `{head}` in front it would match: is it missing?"
        if all("/" in p and self.hits("linen", p.split("/", 1)[1]) for p in self.unmatched):
            return "; without its first level it would match: is there one too many?"
        return ""

    def _report_unused(self) -> None:
        busy = self.used | self.broken
        for number, rule in enumerate(self.rules):
            here = rule.side(self.side)
            if number not in busy and (here or rule.init):
                side = self.side if here else self.to
                self.problems.append(f"{self._name(number)} matches no {side} leaf")

    def _report_unfilled(self, target: Mapping[str, Spec], unfilled: list[str]) -> None:
        for path in unfilled:
            hits = self.hits(self.to, path)
            if not any(hit.rule in self.broken for hit in hits):
                what = f"nothing fills the {self.to} leaf `{path}` ({target[path]})"
                whys = [self._why_idle(hit) for hit in hits] or ["no rule matches it"]
                self.problems += [f"{what}: {why}" for why in whys]

    def _why_idle(self, hit: Hit) -> str:
        """Why a rule fills nothing, though it matches the target leaf."""
        parts = self.rules[hit.rule].side(self.side)
        if not parts:
            return f"rule {hit.rule + 1} drops it; use `init` if it is to be filled on this way"
        missing = " + ".join(f"`{_format_known(p.text, hit.captures)}`" for p in parts)
        return f"rule {hit.rule + 1} would, but the source has no {missing}"

    def _note_ambiguous(self, side: Side, path: str, hits: Sequence[Hit]) -> None:
        rules = tuple(sorted({hit.rule for hit in hits}))
        self.broken.update(rules)
        self.ambiguous.setdefault((side, rules), []).append(path)

    def _report_ambiguous(self) -> None:
        for (side, rules), found in self.ambiguous.items():
            paths = [f"`{path}`" for path in dict.fromkeys(found)]
            by = " and ".join(map(self._name, rules)) + (" (twice)" * (len(rules) == 1))
            if len(paths) == 1:
                self.problems.append(f"the {side} leaf {paths[0]} is matched by {by}")
            else:
                some = ", ".join([*paths[:_EXAMPLES], *["..."] * (len(paths) > _EXAMPLES)])
                self.problems.append(f"{len(paths)} {side} leaves are matched by {by}: {some}")

    def _name(self, rule: int) -> str:
        """How messages call a rule, counted from 1 as people do."""
        return f"rule {rule + 1} ({self.rules[rule]})"

    def _fault(self, number: int, text: str) -> None:
        self.broken.add(number)
        self.problems.append(f"{self._name(number)}: {text}")


def _origin(move: Move[str, str]) -> str:
    return ", ".join(f"`{source}`" for source in move.sources[:3]) or "an init rule"


def _letter_for_a_name(path: str, patterns: Iterable[Pattern]) -> str:
    """Whether an idle pattern would match, were its captures of one letter names."""
    for pattern in patterns:
        letters = [name for name in pattern.captures if is_integer(name)]
        longer = pattern.text
        for name in letters:
            longer = longer.replace(f"{{{name}}}", f"{{{name}_name}}")
        try:
            fits = bool(letters) and Pattern(longer).match(path) is not None
        except ValueError:  # two names in one element
            continue
        if fits:
            shown = " and ".join(f"`{{{name}}}`" for name in letters)
            name = letters[0]
            return (
                f"; `{pattern.text}` would match it, but {shown}, one letter, matches integers "
                f"only: write `{{{name}{name}}}`, or a longer name, for a path element"
            )
    return ""


def _format_known(text: str, captures: Mapping[str, str]) -> str:
    for name, value in captures.items():
        text = text.replace(f"{{{name}}}", value).replace(f"{{{name}...}}", value)
    return text


def _specs(leaves: Mapping[str, Any]) -> dict[str, Spec]:
    """The spec of every leaf; raises `RuleError` naming every one that is no array."""
    if not isinstance(leaves, Mapping):
        raise RuleError(
            "The leaves cannot be read",
            [f"expected a mapping from path to array, got {type(leaves).__name__}"],
        )
    problems = [p for path, leaf in leaves.items() if (p := _not_an_array(path, leaf))]
    if problems:
        raise RuleError("Every leaf must be an array", problems)
    return {p: leaf if type(leaf) is Spec else Spec.of(leaf) for p, leaf in leaves.items()}


def _not_an_array(path: Any, leaf: Any) -> str | None:
    kind = type(leaf)
    if kind is Spec and isinstance(path, str):
        return None
    got = f"`{path}` is a {kind.__module__}.{kind.__qualname__}"
    if not isinstance(path, str):
        return f"the path {path!r} is a {kind.__name__}, expected a `/`-joined string"
    if isinstance(leaf, (Mapping, list)) or kind is tuple:
        return f"{got}, a container: flatten the tree first (linen_nnx.book.tree.flatten)"
    if hasattr(kind, "unbox"):
        return f"{got}, a wrapper: take the array out of it (flax.core.meta.unbox)"
    if hasattr(kind, "get_value"):
        return f"{got}, a wrapper: take the array out of it (variable.get_value())"
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return f"{got} without shape and dtype: make it an array of the dtype you mean"
    return None
