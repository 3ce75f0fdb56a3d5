"""The leaves of a training state that mirror no parameter: counts, keys, fields of one's own.

Such a leaf goes along as it is, and arrays are listed. Where that could be wrong it is refused. Two
parameters `a` and `b` become `z` and `b`: their order by name changes, and an array of an optimizer
that holds both in a row would have to be put in another order, too. Nothing says whether an array
of their common length is such a row:

    opt_state/0/flat   float32[6]      a [2,2], then b [2]     or something else of length 6?

A rule may name such a leaf by its path beside the model, and settles it:

    - {linen: obs_mean, ops: [{op: drop}]}                           left behind
    - {linen: obs_mean, nnx: statistics}                             renamed
    - {linen: opt_state/0/ns_coeffs, nnx: opt_state/0/ns_coeffs}     as it is, and that is meant
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from linen_nnx.book.index import Hit
from linen_nnx.book.moves import Move
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.specs import Side
from linen_nnx.disk.follow import remedy, reshaped
from linen_nnx.disk.leaves import Leaf, dict_keys
from linen_nnx.disk.mirrors import prefix_keys
from linen_nnx.disk.places import Place
from linen_nnx.disk.state import OPTIMIZER, Id, State, is_key

# As optax.contrib.muon calls the coefficients of its iteration.
_OF_MUON = "ns_coeffs"


@dataclass(frozen=True)
class Ruled:
    """The rules that settle single leaves, and the moves that they make of them."""

    moves: list[Move[Leaf, Place]]
    paths: frozenset[str]
    """The leaves that are settled so."""
    rules: frozenset[int]
    """The rules that settle them, by number."""


def ruled(
    state: State, model: Iterable[str], book: RuleBook, to: Side, problems: list[str]
) -> Ruled:
    """The moves of the leaves of the rest that a rule names.

    A rule that matches a leaf of the model (`model`: their paths in the book) is none of these.
    """
    side = state.form.side
    found: dict[str, list[Hit]] = {}
    rules: set[int] = set()
    for path in state.rest:
        # `../` is above the training state: what lies beside it in a checkpoint.
        if hits := book.hits(side, path.removeprefix("../")):
            found[path] = hits
            rules.update([hit.rule for hit in hits])
    # Mostly there are none, and the model's leaves are many.
    if rules:
        for path in model:
            rules.difference_update([hit.rule for hit in book.hits(side, path)])
    moves: list[Move[Leaf, Place]] = []
    settled: set[str] = set()
    for path, hits in found.items():
        named = [hit for hit in hits if hit.rule in rules]
        # Only rules of the model match it: `params/{rest...}`, say, and a field called `params`.
        if not named:
            continue
        settled.add(path)
        if len(named) > 1:
            texts = " and ".join([str(book.rules[hit.rule]) for hit in named])
            problems.append(f"`{path}` is matched by several rules: {texts}")
            continue
        moves += _settled(path, state.rest[path], named[0], book, to, problems)
    return Ruled(moves, frozenset(settled), frozenset(rules))


def _settled(
    path: str, leaf: Leaf, hit: Hit, book: RuleBook, to: Side, problems: list[str]
) -> list[Move[Leaf, Place]]:
    """The moves that one rule makes of one leaf: none of its targets, or one."""
    rule = book.rules[hit.rule]
    targets = rule.side(to)
    if not targets:
        return [Move((leaf,), (), rule=rule)]
    if rule.ops:
        problems.append(f"`{path}` is no leaf of the model: {rule} can only drop or rename it")
        return []
    new = targets[0].format(hit.captures)
    keys = prefix_keys(path, leaf)
    # Under its old name it keeps the kinds of its keys; a new one is made of dicts.
    if new == path.removeprefix("../"):
        return [Move((leaf,), (Place(path=path, prefix=keys),), rule=rule)]
    above = "../" if path.startswith("../") else ""
    place = Place(path=above + new, prefix=dict_keys(*new.split("/")))
    return [Move((leaf,), (place,), rule=rule)]


@dataclass(frozen=True)
class Scope:
    """The parameters that a part of an optimizer is for, and what the rules do to them.

    A leaf belongs with the mirrors below the nearest node above it that has any. Above
    `opt_state/inner_states/muon/inner_state/0/ns_coeffs` that is `.../inner_state/0`, whose mirror
    `mu` has the matrices alone: Muon is for these.
    """

    moves: Sequence[Move[Id, Id]]
    state: State
    everything: Sequence[Move[Id, Id]]
    """The moves that the rules make of all parameters."""

    @property
    def renamed(self) -> bool:
        """Whether only names change."""
        return not any(move.actions for move in self.moves)

    @property
    def telling(self) -> set[int]:
        """The lengths of an array that may hold something for each parameter, element or layer."""
        lengths = {self.in_a_row()}
        count = 0
        for move in self.moves:
            count += len(move.sources)
            # A move that only renames leaves its arrays as they are.
            if not move.actions:
                continue
            # How many layers are stacked, or parts joined. Length 1 would tell of everything.
            lengths |= {len(move.sources), len(move.targets)} - {1}
            for id in move.sources:
                spec = self.state.model[id].spec
                lengths |= {spec.size, *spec.shape}
        return lengths | {count}

    def reordered(self) -> bool:
        """Whether the parameters come in another order, which is that of their names."""
        pairs = []
        for move in self.moves:
            if move.targets:
                pairs.append((move.sources[0].path, move.targets[0].path))
        # Level by level, as jax flattens dicts: `a/b` comes before `a-c` there, and not as text.
        by_old_name = sorted(pairs, key=lambda pair: pair[0].split("/"))
        by_new_name = sorted(pairs, key=lambda pair: pair[1].split("/"))
        return by_old_name != by_new_name

    def in_a_row(self) -> int:
        """The length of all parameters in a row."""
        length = 0
        for move in self.moves:
            for id in move.sources:
                length += self.state.model[id].spec.size
        return length


def scopes(
    paths: Collection[str],
    mirrors: Mapping[str, Collection[Id]],
    moves: Sequence[Move[Id, Id]],
    state: State,
) -> dict[str, Scope]:
    """The scope of each of some leaves that mirror nothing.

    Args:
      paths: those leaves.
      mirrors: the parameters in each mirror, by the path of the mirror.
      moves: what the rules do to the model.
      state: the state that all of them are of.
    """
    # Every node above a mirror, with the parameters of all mirrors below it.
    by_node: dict[str, set[Id]] = {}
    for prefix, ids in mirrors.items():
        node = prefix
        while node:
            node = node.rpartition("/")[0]
            by_node.setdefault(node, set()).update(ids)
    everything = [move for move in moves if _of_params(move)]
    found: dict[str, Scope] = {}
    known: dict[str, Scope] = {}
    for path in paths:
        node = path.rpartition("/")[0]
        while node and node not in by_node:
            node = node.rpartition("/")[0]
        # Leaves of one node share a scope, which takes a pass over all moves to make.
        if node not in known:
            inside = [m for m in everything if by_node.get(node, set()) & {*m.sources}]
            known[node] = Scope(inside if node else everything, state, everything)
        found[path] = known[node]
    return found


def _of_params(move: Move[Id, Id]) -> bool:
    return any(id.collection in ("", "params") for id in (*move.sources, *move.targets))


def check_plain(
    path: str, leaf: Leaf, tree: Collection[str], scope: Scope, side: Side, beside: bool
) -> str | None:
    """Why a leaf that mirrors nothing may depend on the model's form; None if it does not.

    Args:
      tree: the paths of the model's leaves.
      scope: the parameters that it may depend on.
      beside: whether it lies beside the training state, where anything may be that is not called
        like a parameter.
    """
    if leaf.zarr is None:
        return None
    names = path.split("/")
    # `extra/fc/kernel` beside a parameter `fc/kernel`: a mirror that lacks the other parameters.
    for start in range(1, len(names)):
        if "/".join(names[start:]) in tree:
            fault = f"`{leaf.path}` has a parameter's name outside of any mirror"
            return f"{fault}: {remedy(path, side)}"
    # Counts and keys depend on no form, and what lies outside of the optimizer is the user's own.
    if beside or path.split("/")[0] != OPTIMIZER or is_key(leaf) or not leaf.spec.shape:
        return None
    if names[-1] == _OF_MUON and reshaped(scope.everything, scope.state):
        return (
            f"`{leaf.path}` is Muon's, which chooses its parameters by their number of axes, and "
            f"rules change that: {remedy(path, side)}"
        )
    lengths = {*leaf.spec.shape}
    row = scope.in_a_row()
    # Renaming can only change the order of the parameters, and so only an array of all of them.
    if scope.renamed and not (row in lengths and scope.reordered()):
        return None
    if not scope.renamed and not lengths & scope.telling:
        return None
    what = "may hold all parameters in a row, in the order of their names, which changes"
    if not scope.renamed:
        what = "mirrors nothing, and may depend on the form of parameters that rules reshape"
    named = path.removeprefix("../")
    return (
        f"`{leaf.path}` ({leaf.spec}) {what}: if it does not, say so by a rule, "
        f"{{linen: {named!r}, nnx: {named!r}}}; else {remedy(path, side)}"
    )
