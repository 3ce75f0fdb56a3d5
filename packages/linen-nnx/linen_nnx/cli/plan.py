"""`plan`: what `run` would do, rule by rule or leaf by leaf; nothing is written.

    params/Block_{i}/Dense_0/{leaf}  ->  blocks/{i}/up/{leaf}
        48 leaves: 16 in params, 32 in opt_state (name)

The two lines say that 48 leaves follow the rule: 16 parameters, and the two moments of each in the
optimizer's state. All of them keep their bytes, and only their names change (engine `name`).
"""

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from linen_nnx.cli.models import rules_of, runs_named
from linen_nnx.cli.output import (
    counted,
    few,
    first,
    print_json,
    rule_lines,
    say,
    spec_of,
    summary,
    table,
)

if TYPE_CHECKING:  # what starts a command line imports no more than that command needs
    from linen_nnx.book.moves import Move
    from linen_nnx.disk.leaves import Leaf

    LeafMove = Move[Leaf, Leaf]


def plan(
    ckpt: str,
    to: str,
    as_json: bool,
    by_leaf: bool,
    twin: str | None,
    rules: str | None,
    runs: str | None,
    **options: Any,
) -> int:
    """Shows what would become of every leaf. `options`: those of `plan_conversion`."""
    from linen_nnx.disk.planning import plan_conversion

    options |= {**rules_of(twin, to, rules), "runs": runs_named(runs)}
    conversion = plan_conversion(ckpt, to, **options)
    if as_json:
        jobs = [_content(move) for move in conversion.moves]
        print_json({**conversion.summary(), "jobs": jobs})
        return 0
    if by_leaf:
        _show_leaves(conversion.moves)
    else:
        _show_rules(conversion.moves)
    say(summary(conversion.summary()))
    if not by_leaf:
        say("note     --leaves shows each leaf by itself")
    return 0


def _content(move: "LeafMove") -> dict[str, Any]:
    """One move in plain JSON values."""
    from linen_nnx.disk.engines import nbytes_of

    rule = move.rule
    return {
        "engine": _engine(move),
        "rule": None if rule is None else str(rule),
        "from": [leaf.path for leaf in move.sources],
        "to": [leaf.path for leaf in move.targets],
        "specs": [spec_of(leaf) for leaf in move.targets],
        "bytes": nbytes_of(move),
    }


def _engine(move: "LeafMove") -> str:
    """How the bytes of a move come about: by an engine, or `drop` and `fill`."""
    from linen_nnx.disk.engines import engine_of

    return engine_of(move) if move.sources else "fill"


def _show_rules(moves: "Sequence[LeafMove]") -> None:
    """A few lines for each rule: what follows it, and by which engine."""
    groups: dict[tuple[int, str], list[LeafMove]] = {}
    for move in moves:
        rule = move.rule
        # By identity: to hash a rule for each of 50,000 leaves takes longer than the plan.
        kind = "" if rule is not None else _engine_without_rule(move)
        groups.setdefault((id(rule), kind), []).append(move)
    for (_, kind), members in groups.items():
        rule = members[0].rule
        if rule is not None:
            for line in rule_lines(rule):
                print(line)
        else:
            print(_WITHOUT_RULE[kind])
        print(f"    {_account(members, named=rule is None)}")


_WITHOUT_RULE = {
    "drop": "(no rule) left out",
    "fill": "(no rule) made new",
    "keep": "(no rule) goes along as it is",
}


def _engine_without_rule(move: "LeafMove") -> str:
    engine = _engine(move)
    return engine if engine in _WITHOUT_RULE else "keep"


def _account(moves: "Sequence[LeafMove]", named: bool) -> str:
    """How many leaves some moves take, from which entries of the tree, and by which engines.

    named: whether to name the leaves, where no pattern of a rule says which they are.
    """
    # Engines are counted by targets, as in the line `leaves` below; places by sources, which are
    # what a person knows of the checkpoint.
    engines, places = Counter[str](), Counter[str]()
    paths: list[str] = []
    for move in moves:
        leaves = move.sources or move.targets
        engines[_engine(move)] += len(move.targets) or len(leaves)
        for leaf in leaves:
            places[leaf.path.split("/")[0]] += 1
            paths.append(leaf.path)
    whole = counted(len(paths), "leaf", "leaves")
    if len(engines) == 1:
        ways = next(iter(engines))
    else:
        ways = ", ".join([f"{count} {engine}" for engine, count in engines.items()])
    if named:
        where = few(paths)
    elif len(places) == 1:
        where = f"in {next(iter(places))}"
    else:
        where = ", ".join([f"{count} in {place}" for place, count in places.items()])
    return f"{whole}: {where} ({ways})"


def _show_leaves(moves: "Sequence[LeafMove]") -> None:
    rows: list[tuple[str, ...]] = []
    several = False
    for move in moves:
        old = [leaf.path for leaf in move.sources]
        new = [leaf.path for leaf in move.targets]
        # Of a stack of forty layers one is enough to see what happens.
        specs = [spec_of(leaf) for leaf in move.targets]
        rows.append((f"{_engine(move):6}  {first(old)}", f"->  {first(new)}", first(specs)))
        several = several or len(old) > 1 or len(new) > 1
    table(rows, long=1)
    if several:
        say("note     of several leaves the first is shown, and how many there are (--json: all)")
