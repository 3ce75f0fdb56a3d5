"""Proposes a rule book for a twin: from the two models' code alone, without weights.

    book = suggest(twin)
    book.save("rules.yaml")      # each rule with its evidence; what is open, with its candidates

Two independent kinds of evidence must agree for every rule: the place of a leaf in the dataflow of
the forward pass (`dataflow.py`) and its gradient (`fingerprints.py`). Where the two models compute
the same in different ways, the gradients of whole leaves are compared (`leafwise.py`); what only
one model has gets the values of its constructor (`additions.py`). Then the whole book is tested on
numbers that differ from leaf to leaf (`trial.py`). What is left in doubt stays unassigned: a wrong
rule is worse than none.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from linen_nnx.book.grammar import Rule
from linen_nnx.book.rules import RuleBook
from linen_nnx.infer.additions import additions
from linen_nnx.infer.assign import SEE_NOTES, assign
from linen_nnx.infer.compress import compress
from linen_nnx.infer.fingerprints import fingerprints
from linen_nnx.infer.found import FoundRule, SidedPath
from linen_nnx.infer.ground import common_ground
from linen_nnx.infer.grouped import Reasons, rules_by_name, rules_of_pairs
from linen_nnx.infer.leafwise import Blind, pair_leaves, sharing
from linen_nnx.infer.lossy import lossy
from linen_nnx.infer.notes import notes_of_book, with_notes
from linen_nnx.infer.proposals import OpenLeaves
from linen_nnx.infer.run import EXACT
from linen_nnx.infer.sides import Both, even, sides
from linen_nnx.infer.trace import Trace, trace_linen, trace_nnx
from linen_nnx.infer.trial import Trial
from linen_nnx.infer.twin import Twin
from linen_nnx.infer.unassigned import likely_pair, unassigned

_TIMES = 8  # the leaves' bytes, at the peak: `make bench ARGS=proofs` measures it
_APART = "with numbers that differ from leaf to leaf the twins' outputs differ"
_HIDDEN = (
    "the sides use different leaves, and agree only where a constant in these hides all the others"
)
_NO_OPS = (
    "its elements are among those of the candidates, by their gradients, but no ops say how: a "
    "rule joins whole leaves along one axis"
)
_UPDATED = (
    "no output sees it; the new values that training gives agree, with numbers that differ from "
    "leaf to leaf"
)
_VEILED = (
    "the order of its elements is not proven: beside leaves that are open, whose numbers are one "
    "constant, no gradient shows it"
)

Say = Callable[[str], None]


def silent(text: str) -> None:
    """Tells nobody."""


def suggest(twin: Twin, say: Say = silent, progress: Say = silent) -> RuleBook:
    """Finds the rules that the evidence proves, each with a note of it.

    Args:
      twin: both models, and an example of their inputs.
      say: is told, before the work starts, how much memory it will take, from 1 GB on.
      progress: is told what is being done, a few words each time.

    Returns:
      the book; leaves for which nothing is proven are in its `unassigned`.

    Raises:
      TwinError: when a part of the twin cannot be built or called.

    Example:
        >>> from linen_nnx.infer.example import two_layers
        >>> book = suggest(two_layers())
        >>> [str(rule) for rule in book.rules]
        ['`params/up/{leaf}` <-> `first/{leaf}`', '`params/down/kernel` <-> `last`']
        >>> list(book.unassigned)
        []
    """
    progress("tracing both models")
    traces = trace_linen(twin), trace_nnx(twin)
    size = max(map(_bytes, traces)) / 1e9
    if _TIMES * size >= 1:
        say(f"leaves of {size:.2g} GB: suggest takes up to {_TIMES * size:.2g} GB of memory")
    return propose(*traces, progress)


def _bytes(trace: Trace) -> int:
    """What the leaves of one side take in float32, whatever their dtype."""
    return sum(4 * math.prod(leaf.shape) for leaf in trace.leaves.values())


def propose(linen: Trace, nnx: Trace, progress: Say = silent) -> RuleBook:
    """`suggest` for a twin whose sides are traced already."""
    progress("looking for values at which both models compute the same")
    losses = lossy(linen, nnx)
    ground = common_ground(sides(linen, nnx, losses.alone))
    both = ground.sides
    progress("comparing gradients, use by use")
    prints = fingerprints(ground)
    ground = ground._replace(problem=prints.problem)
    # Pairs of slots on which dataflow and gradients agree, and rules for the leaves they make up.
    assignment = assign(*both, prints)
    why: Reasons = {}
    for side, reasons in enumerate(losses.reasons):
        why |= {(side, path): reason for path, reason in reasons.items()}
    rules = rules_of_pairs(both, assignment, why)
    extra: list[Rule] = []
    shared: dict[SidedPath, list[str]] = {}
    # Rules that hold make more of the models known, and so lead to more rules.
    if ground.problem is None:
        progress("testing the rules on random numbers")
        trial = Trial(ground, prints.tolerance)
        rules = _sound(trial, rules, why)
        open_ = _open_leaves(both, rules, losses.reasons)
        rules, veiled, blind = pair_leaves(trial, rules, open_)
        for found in veiled:
            why |= dict.fromkeys(found.leaves, _VEILED)
        if ground.constant and _is_hidden(both, blind):
            ground = ground._replace(problem=_HIDDEN)
            for number, side in enumerate(both):
                why |= {(number, path): SEE_NOTES for path in side.paths if side.slots_of[path]}
            rules = []
        else:
            open_ = _open_leaves(both, rules, losses.reasons)
            extra = additions(trial, rules, open_, losses.reasons)
            shared = sharing(trial, rules, open_)
            why |= dict.fromkeys(shared, _NO_OPS)
    rules += rules_by_name(both)
    shown = compress(rules, both[0].paths, both[1].paths)
    return RuleBook(
        [*with_notes(shown, rules, both[0], prints.tolerance), *extra],
        unassigned(both, rules, extra, (assignment, shared), why),
        notes=notes_of_book(ground, losses.reasons),
    )


def with_updates(twin: Twin, book: RuleBook) -> RuleBook:
    """The book, with rules for the open leaves that updates tell apart.

    No output reads the sums and counts of a codebook. But a call in training updates them. So an
    open leaf is tried with each of its candidates: both get the same numbers, beside the others'
    own, and the new values must agree, with one candidate alone.

    Args:
      twin: both models, called so that they update their statistics.
      book: the rules that hold, and the open leaves with their candidates.
    """
    linen, nnx = trace_linen(twin), trace_nnx(twin)
    ground = common_ground(sides(linen, nnx, {}))
    if ground.problem is not None:
        return book
    trial = Trial(ground, EXACT)
    known = [_of_rule(rule, linen) for rule in book.rules if not rule.init]
    if not trial.holds(known):
        return book
    closed: set[str] = set()
    proven: list[FoundRule] = []
    for path, open_ in book.unassigned.items():
        if open_.side == "nnx" or path not in linen.updates:
            continue
        holding: list[FoundRule] = []
        for name in open_.candidates:
            rule = likely_pair(ground.sides, path, name) if name in nnx.updates else None
            found = None if rule is None else _of_rule(replace(rule, note=_UPDATED), linen)
            if found is not None and trial.holds([*known, found]):
                holding.append(found)
        if len(holding) == 1 and closed.isdisjoint(holding[0].nnx):
            proven += holding
            closed |= holding[0].linen | holding[0].nnx
    if not trial.holds([*known, *proven]):
        return book
    left = {path: open_ for path, open_ in book.unassigned.items() if path not in closed}
    return RuleBook([*book.rules, *(found.rule for found in proven)], left, (), book.notes)


def _of_rule(rule: Rule, linen: Trace) -> FoundRule:
    """A rule with the leaves that it matches."""
    sources: set[str] = set()
    targets: set[str] = set()
    for move in RuleBook([rule]).plan(linen.leaves, "nnx", partial=True).moves:
        sources.update(move.sources)
        targets.update(move.targets)
    return FoundRule(rule, frozenset(sources), frozenset(targets), ())


def _sound(trial: Trial, rules: list[FoundRule], why: Reasons) -> list[FoundRule]:
    """The rules that hold with numbers that differ from leaf to leaf; `why` is told of others."""
    kept = trial.sound(rules)
    for found in rules:
        if found not in kept:
            why |= dict.fromkeys(found.leaves, _APART)
    return kept


def _open_leaves(
    both: Both, rules: Sequence[FoundRule], lossy: Sequence[dict[str, str]]
) -> OpenLeaves:
    """The leaves that are used, have no rule, and may get one."""
    open_: tuple[set[str], set[str]] = set(), set()
    for number, side in enumerate(both):
        # What is held is accounted for: the other side has no leaf for it.
        open_[number].update(path for path in side.paths if side.slots_of[path])
        open_[number].difference_update(side.held, lossy[number])
    for found in rules:
        open_[0].difference_update(found.linen)
        open_[1].difference_update(found.nnx)
    return open_


def _is_hidden(both: Both, blind: Blind | None) -> bool:
    """Whether both sides have an open leaf that no output sees, and they use different leaves.

    Then the twins may agree for no better reason than that a constant hides where they differ: a
    branch whose weights are all 0.03 adds next to nothing, whatever it computes.
    """
    return blind is not None and all(blind) and not even(both)
