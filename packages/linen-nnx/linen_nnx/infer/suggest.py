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

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from linen_nnx.book.grammar import Rule, parse_rule
from linen_nnx.book.rules import RuleBook, Unassigned
from linen_nnx.infer.additions import addition
from linen_nnx.infer.assign import SEE_NOTES, Assignment, Pair, assign, words
from linen_nnx.infer.compress import compress
from linen_nnx.infer.fingerprints import fingerprints
from linen_nnx.infer.fit_ops import Group, rule_for
from linen_nnx.infer.found import FoundRule
from linen_nnx.infer.ground import Ground, common_ground
from linen_nnx.infer.leafwise import pair_leaves
from linen_nnx.infer.lossy import lossy
from linen_nnx.infer.sides import Both, SlottedSide, even, sides
from linen_nnx.infer.trace import LeafSpec, Trace, trace_linen, trace_nnx
from linen_nnx.infer.trial import Trial
from linen_nnx.infer.twin import Twin

Array = np.ndarray
SidedPath = tuple[int, str]  # a leaf: side (0 Linen, 1 nnx) and path
_CANDIDATES = 8
_TIMES = 24  # the leaves' bytes, at the peak: `make bench ARGS=proofs` measures it

Say = Callable[[str], None]


def silent(text: str) -> None:
    """Tells nobody."""


def suggest(twin: Twin, say: Say = silent, progress: Say = silent) -> RuleBook:
    """The rules that the evidence proves, each with a note of it; the rest in `unassigned`.

    Args:
      twin: both models, and an example of their inputs.
      say: is told, before the work starts, how much memory it will take, from 1 GB on.
      progress: is told what is being done, a few words each time.

    Raises:
      TwinError: when a part of the twin cannot be built or called.
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
    """The same for a twin whose sides are traced already."""
    progress("looking for values at which both models compute the same")
    losses = lossy(linen, nnx)
    ground = common_ground(sides(linen, nnx, losses.alone))
    both = ground.sides
    progress("comparing gradients, use by use")
    prints = fingerprints(ground)
    ground = ground._replace(runs=None)  # their gradients have told what they can
    found = assign(*both, prints)
    why = {(side, path): text for side in (0, 1) for path, text in losses.reasons[side].items()}
    items = _items(both, found, why)
    extra: list[Rule] = []
    if ground.problem is None:
        progress("testing the rules on random numbers")
        trial = Trial(ground, prints.tolerance)
        kept = trial.sound(items)
        for item in items:
            if item not in kept:
                why |= dict.fromkeys(_leaves_of(item), _APART)
        items = kept
        more, view = pair_leaves(trial, items, _open_leaves(both, items, losses.reasons))
        items += more
        if ground.constant and not even(both) and view is not None and all(view.blind):
            ground = ground._replace(problem=_HIDDEN)
            for number, side in enumerate(both):
                why |= {(number, path): SEE_NOTES for path in side.paths if side.slots_of[path]}
            items = []
        else:
            extra = _additions(trial, items, losses.reasons)
    items += _unused(both)
    shown = compress(items, both[0].paths, both[1].paths)
    ordered = _in_order([pair for item in items for pair in item.evidence])
    rules = [
        replace(item.rule, note=_note(item, both[0], ordered, prints.tolerance)) for item in shown
    ]
    open_ = _unassigned(both, items, extra, found, why)
    return RuleBook([*rules, *extra], open_, notes=_notes(ground, losses.reasons))


_HIDDEN = (
    "the sides use different leaves, and agree only where a constant in these hides all the others"
)
_APART = "with numbers that differ from leaf to leaf the twins' outputs differ"


def _open_leaves(
    both: Both, items: Sequence[FoundRule], lossy: Sequence[dict[str, str]]
) -> tuple[set[str], set[str]]:
    """The leaves that are used, have no rule, and may get one."""
    done = {leaf for item in items for leaf in _leaves_of(item)}
    found: list[set[str]] = []
    for number, side in enumerate(both):
        free = {path for path in side.paths if side.slots_of[path] and (number, path) not in done}
        found.append(free - set(side.held) - set(lossy[number]))
    return found[0], found[1]


def _additions(
    trial: Trial, items: Sequence[FoundRule], lossy: Sequence[dict[str, str]]
) -> list[Rule]:
    """Rules for the leaves that only one side has, once nothing of the other side is open."""
    both = trial.ground.sides
    open_ = _open_leaves(both, items, lossy)
    done = {leaf for item in items for leaf in _leaves_of(item)}
    rules = []
    for path in both[0].held:
        if both[0].trace.leaves[path].collection != "params" and path not in lossy[0]:
            rules.append(addition(both[0].trace, path, "only Linen has it"))
    idle = [
        {path for path in side.paths if not side.slots_of[path] and (k, path) not in done}
        for k, side in enumerate(both)
    ]
    mine = [path for path in both[1].held if path not in lossy[1]]
    if not open_[0] and open_[1]:
        values = {path: both[1].trace.constructed(path) for path in open_[1]}
        if trial.point(items, fixed=values).gap <= trial.tolerance:
            mine += sorted(open_[1], key=both[1].paths.index)
    for path in mine:
        why = "only nnx has it; both compute the same where it keeps its constructor's value"
        rules.append(addition(both[1].trace, path, why))
    shapes = [both[0].trace.leaves[path].shape for path in idle[0]]
    for path in sorted(idle[1], key=both[1].paths.index):
        if both[1].trace.leaves[path].shape not in shapes:
            why = "only nnx has it, and the forward pass does not use it"
            rules.append(addition(both[1].trace, path, why))
    return rules


def _notes(ground: Ground, lossy: Sequence[dict[str, str]]) -> tuple[str, ...]:
    """What is to be said of the models as wholes, once."""
    linen, nnx = (side.trace for side in ground.sides)
    notes = [*linen.chosen, *nnx.chosen, *ground.notes]
    if ground.problem is not None:
        notes.append(f"no rule is proven: {ground.problem}")
    if bare := [path for path in nnx.bare if path not in lossy[1]]:
        notes.append(
            f"plain arrays of the nnx code, which need no rule: {', '.join(bare)} "
            "(no Variables, and so no weights)"
        )
    return tuple(notes)


def _items(both: Both, found: Assignment, why: dict[SidedPath, str]) -> list[FoundRule]:
    """A rule for each group of leaves that share elements; where there is none, `why` says so."""
    linen, nnx = both
    numbers = np.full(nnx.owner.size, -1)
    groups: dict[SidedPath, tuple[set[SidedPath], list[Pair]]] = {}
    for pair in found.pairs:
        ids = linen.flow.slots[pair.linen].ids, nnx.flow.slots[pair.nnx].ids
        numbers[ids[1].ravel()] = ids[0].ravel()
        leaves = {(side, path) for side in (0, 1) for path in both[side].leaves_of(ids[side])}
        joined = {id(group): group for leaf in leaves if (group := groups.get(leaf))}.values()
        evidence = sorted([pair, *(other for _, pairs in joined for other in pairs)])
        group = leaves.union(*(others for others, _ in joined)), evidence
        groups |= dict.fromkeys(sorted(group[0]), group)

    items = []
    for group, evidence in {id(each): each for each in groups.values()}.values():  # by first use
        leaves = sorted(group)
        arrays = Group(
            {path: linen.trace.numbers[path] for side, path in leaves if side == 0},
            {path: numbers[nnx.trace.numbers[path]] for side, path in leaves if side == 1},
        )
        reason = _refusal(both, leaves, found, why)
        rule = None if reason else rule_for(arrays)
        if rule is None:
            reason = reason or "its elements correspond to the candidates', but no ops say how"
            why |= dict.fromkeys(leaves, reason)
        else:
            matched = frozenset(arrays.linen), frozenset(arrays.nnx)
            items.append(FoundRule(rule, *matched, tuple(evidence)))
    return items


def _refusal(
    both: Both, leaves: list[SidedPath], found: Assignment, refused: dict[SidedPath, str]
) -> str | None:
    """Why leaves that correspond must not get a rule all the same."""
    if known := next((refused[leaf] for leaf in leaves if leaf in refused), None):
        return known
    for side, path in leaves:
        for slot in both[side].slots_of[path]:
            if slot in found.open[side]:
                return f"a part of `{path}` is open: {found.open[side][slot][1]}"
    kinds = {str(both[side].trace.leaves[path].dtype) for side, path in leaves}
    return f"the dtypes differ: {', '.join(sorted(kinds))}" if len(kinds) > 1 else None


def _unused(both: Both) -> list[FoundRule]:
    """Rules for leaves that no forward pass uses: by name alone, where the name is the same."""
    idle = [
        {path: side.trace.leaves[path] for path in side.paths if not side.slots_of[path]}
        for side in both
    ]
    items = []
    for path, leaf in idle[0].items():
        name = words(path.split("/", 1)[1])
        alike = [p for p, other in idle[1].items() if words(p) == name and _same_kind(leaf, other)]
        rivals = [other for other in idle[0] if words(other.split("/", 1)[1]) == name]
        if len(alike) == len(rivals) == 1:
            rule = parse_rule({"linen": path, "nnx": alike[0]})
            items.append(FoundRule(rule, frozenset([path]), frozenset(alike), ()))
    return items


def _same_kind(one: LeafSpec, two: LeafSpec) -> bool:
    """Whether two leaves have one shape and dtype, and are parameters both or neither."""
    are_params = {leaf.collection == "params" for leaf in (one, two)}
    return (one.shape, one.dtype) == (two.shape, two.dtype) and len(are_params) == 1


def _in_order(pairs: list[Pair]) -> set[Pair]:
    """The pairs that follow the one before them in the order of first use on both sides."""
    left = sorted(pairs, key=lambda pair: pair.linen)
    later = {b for a, b in itertools.pairwise(left) if a.nnx < b.nnx}
    return later | set(left[:1])


def _note(item: FoundRule, linen: SlottedSide, ordered: set[Pair], tolerance: float) -> str:
    """The evidence for a rule, in a sentence."""
    pairs = item.evidence
    if not pairs:
        unused = "not used in the forward pass: no evidence but the equal name"
        return "; ".join(item.reasons) or unused
    same = sum(pair in ordered for pair in pairs)
    plural = "s" if len(pairs) > 1 else ""
    texts = [f"{len(pairs)} use{plural} in the same dataflow, {same} in the same order"]
    if seen := [pair for pair in pairs if pair.seen]:
        gap = max(pair.gap for pair in seen)
        texts.append(f"fingerprints equal ({f'to {gap:.0e}' if gap else 'exactly'})")
        if others := [pair.margin for pair in seen if tolerance < pair.margin < np.inf]:
            texts[-1] += f", the nearest other {min(others):.1g} away"
        elif all(pair.margin == np.inf for pair in seen):
            texts[-1] += ", none other of their form"
    if alike := [pair for pair in seen if pair.margin <= tolerance and not pair.chosen]:
        texts.append(f"{len(alike)} told from others alike by the dataflow alone")
    if blind := {linen.first[pair.linen] for pair in pairs if not pair.seen}:
        paths = sorted(blind if len(blind) == 1 else {re.sub(r"\d+", "*", p) for p in blind})
        texts.append(f"no output sees {', '.join(paths)}: placed by the dataflow alone")
    if chosen := [pair for pair in pairs if pair.chosen]:
        named = "and names" if all(pair.named for pair in chosen) else "alone"
        texts.append(f"{len(chosen)} interchangeable to all outputs: by order of first use {named}")
    texts += item.reasons
    return "; ".join(texts)


def _unassigned(
    both: Both,
    items: Sequence[FoundRule],
    extra: Sequence[Rule],
    found: Assignment,
    why: dict[SidedPath, str],
) -> dict[str, Unassigned]:
    """Every leaf without a rule, with the reason and its candidates."""
    done = {leaf for item in items for leaf in _leaves_of(item)}
    for rule in extra:
        done |= {(0, pattern.text) for pattern in rule.linen}
        done |= {(1, pattern.text) for pattern in rule.nnx}
    open_ = [{path for path in side.paths if (k, path) not in done} for k, side in enumerate(both)]
    mates = {pair.linen: pair.nnx for pair in found.pairs}
    mate_of = (mates, {b: a for a, b in mates.items()})
    modules = _modules(items)
    result: dict[str, Unassigned] = {}
    for number, (side, other) in enumerate((both, both[::-1])):
        for path in [path for path in side.paths if (number, path) not in done]:
            reason, near = "the forward pass does not use it", list[str]()
            for slot in side.slots_of[path]:
                if slot in found.open[number]:
                    slots, reason = found.open[number][slot]
                else:
                    slots = [mate_of[number][slot]]
                near += [other.first[k] for k in slots]
            if not side.slots_of[path]:
                shape = side.trace.leaves[path].shape
                idle = [name for name in other.paths if not other.slots_of[name]]
                near = [name for name in idle if other.trace.leaves[name].shape == shape]
            reason = why.get((number, path), reason)
            home = modules[number].get(_module((number, path)))
            near.sort(key=partial(_strangeness, (number, path), home))
            candidates = tuple(dict.fromkeys(near))[:_CANDIDATES]
            likely = _likely((side, other), path, candidates, open_[1 - number])
            result[_key(path, result)] = Unassigned(side.trace.side, reason, candidates, likely)
    for path in both[1].trace.bare:
        if (1, path) in why:
            result[_key(path, result)] = Unassigned("nnx", why[1, path], ())
    return result


def _modules(items: Sequence[FoundRule]) -> tuple[dict[str, str], dict[str, str]]:
    """By side, which module of the other side holds what a module does: proven by another leaf."""
    found: tuple[dict[str, str], dict[str, str]] = {}, {}
    for item in items:
        if len(item.linen) == len(item.nnx) == 1:
            linen, nnx = _module((0, min(item.linen))), _module((1, min(item.nnx)))
            found[0][linen], found[1][nnx] = nnx, linen
    return found


def _module(leaf: SidedPath) -> str:
    """The path of the module that holds a leaf: `a/norm` of `batch_stats/a/norm/mean`."""
    side, path = leaf
    return (path if side == 1 else path.split("/", 1)[1]).rpartition("/")[0]


def _strangeness(leaf: SidedPath, home: str | None, other: str) -> tuple[bool, bool]:
    """How unlikely a candidate is by its names: sorts those of the same name and module first.

    Where the mean of a norm is known to be that of `heads/0/norm`, its scale is likely to be there.
    """
    side, path = leaf
    is_named_so = path.rpartition("/")[2] == other.rpartition("/")[2]
    return not is_named_so, home is None or _module((1 - side, other)) != home


def _likely(both: Both, path: str, candidates: Sequence[str], free: set[str]) -> Rule | None:
    """The rule that would close an open leaf of the first side: nothing proves it."""
    side, other = both
    mine = side.trace.leaves[path]
    fit = [
        name
        for name in candidates
        if name in free and sorted(other.trace.leaves[name].shape) == sorted(mine.shape)
    ]
    if fit:
        shapes = {side.trace.side: mine.shape, other.trace.side: other.trace.leaves[fit[0]].shape}
        entry = {side.trace.side: path, other.trace.side: fit[0]}
        if shapes["linen"] != shapes["nnx"]:
            left = list(shapes["linen"])
            perm = [left.index(size) for size in shapes["nnx"]]
            ops = [{"op": "transpose", "perm": perm}]
            return parse_rule({**entry, "ops": ops}) if len(set(perm)) == len(perm) else None
        return parse_rule(entry)
    if candidates:
        return None
    if side.trace.side == "nnx":
        return addition(side.trace, path, "only nnx has it")
    return parse_rule({"linen": path, "ops": [{"op": "drop"}]})


def _key(path: str, taken: dict[str, Unassigned]) -> str:
    """The path, told apart from an equal one of the other side."""
    return f"{path} (nnx)" if path in taken else path


def _leaves_of(item: FoundRule) -> list[SidedPath]:
    return [*((0, path) for path in item.linen), *((1, path) for path in item.nnx)]
