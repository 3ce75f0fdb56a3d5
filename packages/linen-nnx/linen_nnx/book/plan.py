"""Plans a translation from shapes alone: which leaves become which, by which actions.

Planning finds every fault of a book against a tree and raises them together. It touches no array
data, so that it serves arrays, tracers, abstract trees and checkpoints on disk alike. A `Plan` is
then run on arrays (`RuleBook.to_nnx`) or on a store's bytes (the converter).

Two layers of a Linen model are one stacked array in nnx, and a layer behind them is renamed:

    - {linen: "params/l_{i}/w", nnx: layers/w, ops: [{op: stack, capture: i, axis: 0}]}
    - {linen: "params/out/{leaf}", nnx: "out/{leaf}"}

Each of the four leaves is matched by one rule. The leaves of a rule with ops form a group for each
value of the captures that both sides share; `i` is on one side only, and says the place in a group:

    leaf           rule    shared       place        becomes
    params/l_0/w   first   nothing      i = 0        layers/w, from both
    params/l_1/w   first   nothing      i = 1
    params/out/w   second  leaf = w                  out/w
    params/out/b   second  leaf = b                  out/b

    >>> from linen_nnx.book.rules import RuleBook
    >>> stack = {"op": "stack", "capture": "i", "axis": 0}
    >>> book = RuleBook.from_dict({"version": 1, "rules": [
    ...     {"linen": "params/l_{i}/w", "nnx": "layers/w", "ops": [stack]},
    ...     {"linen": "params/out/{leaf}", "nnx": "out/{leaf}"},
    ... ]})
    >>> paths = ["params/l_0/w", "params/l_1/w", "params/out/w", "params/out/b"]
    >>> plan = book.plan({path: Spec((8, 8), "float32") for path in paths}, to="nnx")
    >>> for move in plan.moves:
    ...     print(" + ".join(move.sources), "->", *move.targets, *move.specs)
    params/out/w -> out/w float32[8,8]
    params/out/b -> out/b float32[8,8]
    params/l_0/w + params/l_1/w -> layers/w float32[2,8,8]

The work is parted: `plan_draft.py` holds what is known so far, this module makes the moves, and
`plan_check.py` says what does not fit.
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from linen_nnx.book.actions import Action, Fill
from linen_nnx.book.grammar import Rule
from linen_nnx.book.index import Hit
from linen_nnx.book.moves import Move
from linen_nnx.book.ops import Drop, Init, Stack
from linen_nnx.book.patterns import Pattern
from linen_nnx.book.plan_check import check
from linen_nnx.book.plan_draft import Draft
from linen_nnx.book.specs import PART, Mismatch, Side, Spec, SpecGrid
from linen_nnx.book.tree import branches_of
from linen_nnx.errors import Refusal

_SHOWN = 100  # problems in one message; the rest is counted, and is in `.problems`
_TREE = (
    "give a target tree (`target=`; on the command line a checkpoint of that form with --like, a "
    "fresh one will do, or both models with --twin); or state `shape` and `dtype`, with no capture "
    "in the last name"
)

Place = tuple[int, ...]
"""Where a leaf stands in its group: its part, then the value of each stacked capture."""


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
    draft = Draft(rules, hits, to, _specs(leaves), wanted)
    draft.used.update(idle)
    # In this order: filling looks at where the moves lead, and checking at all of them.
    _match(draft)
    _fill(draft)
    check(draft, partial)
    if draft.problems:
        raise RuleError(f"The rule book does not fit, going to {to}", draft.problems)
    return Plan(tuple(draft.moves))


def _match(draft: Draft) -> None:
    """Groups the source leaves by rule and shared captures, and plans each group."""
    groups: dict[tuple[int, tuple[tuple[str, str], ...]], dict[Place, str]] = {}
    for path, spec in draft.source.items():
        hits = draft.hits(draft.side, path)
        if not hits:
            draft.unmatched.append(path)
            continue
        if len(hits) > 1:
            draft.used.update([hit.rule for hit in hits])
            draft.note_ambiguous(draft.side, path, hits)
            continue
        number, part, captures = hits[0]
        rule = draft.rules[number]
        draft.used.add(number)
        # A plain rename, which is most leaves of most books, needs no group.
        if not rule.ops:
            target = rule.side(draft.to)[0].format(captures)
            draft.moves.append(Move((path,), (target,), (), (spec,), rule))
            continue
        stacked = _stacked(draft, rule)
        shared = tuple(sorted([(name, captures[name]) for name in captures if name not in stacked]))
        place = (part, *[int(captures[name]) for name in stacked])
        groups.setdefault((number, shared), {})[place] = path
    for (number, shared), members in groups.items():
        _plan_group(draft, number, dict(shared), members)


def _stacked(draft: Draft, rule: Rule) -> list[str]:
    """The captures that the source side has and the target side lacks."""
    here = rule.side(draft.side)[0].captures
    return [op.capture for op in rule.ops if isinstance(op, Stack) and op.capture in here]


def _plan_group(
    draft: Draft, number: int, shared: dict[str, str], members: Mapping[Place, str]
) -> None:
    """Plans a rule for the leaves `members`, by part and stacked captures."""
    rule = draft.rules[number]
    # The other side has no home for them: a `drop`, or an `init` on its way back.
    if not rule.side(draft.to):
        draft.moves += [Move((path,), (), rule=rule) for path in members.values()]
        return
    try:
        coords = _coords(draft, rule, members)
        # Places sort as the grid counts: part first, the last stacked capture fastest.
        sources = tuple([members[place] for place in sorted(members)])
        grid = SpecGrid(coords, tuple([draft.source[path] for path in sources]))
        actions, grid = _actions(draft, rule, grid)
    except Mismatch as mismatch:
        draft.fault(number, f"{mismatch} (at `{next(iter(members.values()))}`)")
        return
    targets = _targets(draft, rule, shared, grid)
    draft.moves.append(Move(sources, targets, actions, grid.specs, rule))


def _coords(draft: Draft, rule: Rule, members: Collection[Place]) -> dict[str, int]:
    """The grid that the members fill, or a `Mismatch` that names the holes in it."""
    parts, stacked = rule.side(draft.side), _stacked(draft, rule)
    sizes = {PART: len(parts)}
    for axis, name in enumerate(stacked, start=1):
        sizes[name] = max([place[axis] for place in members]) + 1
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
    # Each capture alone may run without a gap, and still layer 1 lack the expert 1 that 0 has.
    places = math.prod(sizes.values())
    if not holes and len(members) != places:
        holes.append(f"the stacked indices fill {len(members)} of {places} places")
    if holes:
        raise Mismatch("; ".join(holes))
    # Without a list there are no parts to join, and ops ask whether the coordinate is there.
    if len(parts) == 1:
        del sizes[PART]
    return sizes


def _actions(draft: Draft, rule: Rule, grid: SpecGrid) -> tuple[tuple[Action, ...], SpecGrid]:
    """The actions of a rule for arrays of given shapes, and the grid that they end in."""
    # A key is stored as raw words, whose number its kind fixes: after an op it would be no key.
    if rule.ops and any(str(spec.dtype).startswith("key<") for spec in grid.specs):
        raise Mismatch("typed PRNG keys can be renamed only")
    # A book lists ops in the order from Linen to nnx.
    ops = rule.ops if draft.to == "nnx" else rule.ops[::-1]
    actions = []
    for op in ops:
        assert not isinstance(op, Drop | Init)  # one-sided, never planned here
        action, grid = op.plan(grid, draft.to, len(rule.side(draft.to)))
        actions.append(action)
    return tuple(actions), grid


def _targets(draft: Draft, rule: Rule, shared: dict[str, str], grid: SpecGrid) -> tuple[str, ...]:
    """The paths of a planned grid, in its row-major order."""
    patterns, targets = rule.side(draft.to), []
    for place in itertools.product(*map(range, grid.coords.values())):
        captures = dict(shared)
        part = 0
        for name, number in zip(grid.coords, place, strict=True):
            if name == PART:
                part = number
            else:
                captures[name] = str(number)
        targets.append(patterns[part].format(captures))
    return tuple(targets)


def _fill(draft: Draft) -> None:
    """Plans the `init` rules of the target side."""
    for number, rule in enumerate(draft.rules):
        init = rule.init
        # A leaf that the source side has is dropped on this way.
        if rule.side(draft.side) or init is None:
            continue
        wanted = _wanted(draft, rule.side(draft.to)[0], init)
        if wanted:
            draft.used.add(number)
        elif draft.target is None:
            draft.fault(number, f"cannot be placed or shaped: {_TREE}")
        for path, spec in wanted.items():
            if init.spec and not init.spec.same(spec):
                draft.fault(number, f"states {init.spec}, the target's `{path}` is {spec}")
            fill = Fill(init.fill, init.stddev, init.seed, path, spec, init.data)
            draft.moves.append(Move((), (path,), (fill,), (spec,), rule))


def _wanted(draft: Draft, pattern: Pattern, init: Init) -> dict[str, Spec]:
    """The leaves that a pattern fills: those of the target, or where the rule's own shape goes."""
    if draft.target is not None:
        return {p: spec for p, spec in draft.target.items() if pattern.match(p) is not None}
    if init.spec:
        return dict.fromkeys(_places_of(draft, pattern), init.spec)
    return {}


def _places_of(draft: Draft, pattern: Pattern) -> list[str]:
    """Where a pattern fills a leaf, if no target tree says so: beside the leaves that move.

    With `layers/{i}/key/kernel` moved to the layers 0 and 1, `layers/{i}/key/bias` is filled in
    both: each node that its parent matches gets one.
    """
    if pattern.literal:
        return [pattern.text]
    node, _, name = pattern.text.rpartition("/")
    # A capture in the last name could be any name.
    if not node or "{" in name:
        return []
    parent = Pattern(node)
    targets = itertools.chain.from_iterable([move.targets for move in draft.moves])
    nodes = sorted(branches_of(targets))
    return [f"{node}/{name}" for node in nodes if parent.match(node) is not None]


def _specs(leaves: Mapping[str, Any]) -> dict[str, Spec]:
    """The spec of every leaf; raises `RuleError` naming every one that is no array."""
    if not isinstance(leaves, Mapping):
        raise RuleError(
            "The leaves cannot be read",
            [f"expected a mapping from path to array, got {type(leaves).__name__}"],
        )
    specs, problems = {}, []
    for path, leaf in leaves.items():
        if problem := _not_an_array(path, leaf):
            problems.append(problem)
        else:
            specs[path] = leaf if type(leaf) is Spec else Spec.of(leaf)
    if problems:
        raise RuleError("Every leaf must be an array", problems)
    return specs


def _not_an_array(path: Any, leaf: Any) -> str | None:
    """The problem of a leaf that is no array, with its remedy; None for an array."""
    kind = type(leaf)
    # Of a checkpoint all leaves are, and they are many.
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
