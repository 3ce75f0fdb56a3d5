"""What a training state holds that mirrors no parameter: counts, keys, and fields of one's own.

Such a leaf goes along as it is, and arrays are listed. Where that could be wrong it is refused: an
array of an optimizer may hold all parameters in one row, say, which rules would put in another
order. A rule may name such a leaf by its path beside the model, and settles it:

    - {linen: obs_mean, ops: [{op: drop}]}                           left behind
    - {linen: obs_mean, nnx: statistics}                             renamed
    - {linen: opt_state/0/ns_coeffs, nnx: opt_state/0/ns_coeffs}     as it is, and that is meant
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from linen_nnx.book.index import Hit
from linen_nnx.book.ops import Side
from linen_nnx.book.rules import RuleBook
from linen_nnx.disk.follow import remedy, reshaped
from linen_nnx.disk.leaves import DICT, Key, Leaf, make_key
from linen_nnx.disk.mirrors import prefix_keys
from linen_nnx.disk.moves import Move, Place, Step
from linen_nnx.disk.state import OPTIMIZER, Id, State, is_key

_OF_MUON = "ns_coeffs"  # as optax.contrib.muon calls the coefficients of its iteration


@dataclass(frozen=True)
class Ruled:
    """What rules say of single leaves of the rest."""

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
    for path in state.rest:
        if hits := book.hits(side, path.removeprefix("../")):
            found[path] = hits
    rules = {hit.rule for hits in found.values() for hit in hits}
    if rules:
        rules -= {hit.rule for path in model for hit in book.hits(side, path)}
    moves: list[Move[Leaf, Place]] = []
    settled: set[str] = set()
    for path, hits in found.items():
        named = [hit for hit in hits if hit.rule in rules]
        if not named:
            continue
        settled.add(path)
        if len(named) > 1:
            texts = " and ".join(str(book.rules[hit.rule]) for hit in named)
            problems.append(f"`{path}` is matched by several rules: {texts}")
            continue
        moves += _settled(path, state.rest[path], named[0], book, to, problems)
    return Ruled(moves, frozenset(settled), frozenset(rules))


def _settled(
    path: str, leaf: Leaf, hit: Hit, book: RuleBook, to: Side, problems: list[str]
) -> list[Move[Leaf, Place]]:
    """What one rule makes of one leaf of the rest."""
    rule = book.rules[hit.rule]
    targets = rule.side(to)
    if not targets:
        return [Move((leaf,), (), rule=rule)]
    if rule.ops:
        problems.append(f"`{path}` is no leaf of the model: {rule} can only drop or rename it")
        return []
    new = targets[0].format(hit.captures)
    keys = prefix_keys(path, leaf)
    if new == path.removeprefix("../"):
        return [Move((leaf,), (Place(path=path, prefix=keys),), rule=rule)]
    above = "../" if path.startswith("../") else ""
    return [Move((leaf,), (Place(path=above + new, prefix=_dicts(new)),), rule=rule)]


def _dicts(path: str) -> tuple[Key, ...]:
    return tuple(make_key(name, DICT) for name in path.split("/"))


@dataclass(frozen=True)
class Scope:
    """The parameters that a part of an optimizer is for, and what the rules do to them.

    Of `opt_state/inner_states/muon/inner_state/0/ns_coeffs` that are those in the mirrors below
    the nearest node above that has any: the matrices, which Muon's moments are kept of.
    """

    steps: Sequence[Step]
    state: State
    everything: Sequence[Step]
    """What the rules do to all parameters."""

    @property
    def renamed(self) -> bool:
        """Whether only names change."""
        return not any(step.actions for step in self.steps)

    @property
    def telling(self) -> set[int]:
        """The lengths of an array that may hold something for each parameter, element or layer."""
        ids = [id for step in self.steps for id in step.sources]
        changed = [id for step in self.steps if step.actions for id in step.sources]
        specs = self.state.model
        lengths = {len(ids), sum(specs[id].spec.size for id in ids)}
        for step in self.steps:
            if step.actions:
                lengths |= {len(step.sources), len(step.targets)} - {1}
        for id in changed:
            lengths |= {specs[id].spec.size, *specs[id].spec.shape}
        return lengths

    def reordered(self) -> bool:
        """Whether the parameters come in another order, which is that of their names."""
        pairs = [
            (step.sources[0].path, step.targets[0].path) for step in self.steps if step.targets
        ]
        old = sorted(pairs, key=lambda pair: pair[0].split("/"))
        return old != sorted(pairs, key=lambda pair: pair[1].split("/"))

    def in_a_row(self) -> int:
        """The length of all parameters in a row."""
        ids = [id for step in self.steps for id in step.sources]
        return sum(self.state.model[id].spec.size for id in ids)


def scopes(
    paths: Collection[str],
    mirrors: Mapping[str, Collection[Id]],
    steps: Sequence[Step],
    state: State,
) -> dict[str, Scope]:
    """The scope of each of some leaves of the rest; `mirrors`: the parameters in each mirror."""
    by_node: dict[str, set[Id]] = {}
    for prefix, ids in mirrors.items():
        node = prefix
        while node:
            node = node.rpartition("/")[0]
            by_node.setdefault(node, set()).update(ids)
    everything = [step for step in steps if _of_params(step)]
    found: dict[str, Scope] = {}
    known: dict[str, Scope] = {}
    for path in paths:
        node = path.rpartition("/")[0]
        while node and node not in by_node:
            node = node.rpartition("/")[0]
        if node not in known:
            inside = [s for s in everything if by_node.get(node, set()) & {*s.sources}]
            known[node] = Scope(inside if node else everything, state, everything)
        found[path] = known[node]
    return found


def _of_params(step: Step) -> bool:
    return any(id.collection in ("", "params") for id in (*step.sources, *step.targets))


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
    ends = ["/".join(names[n:]) for n in range(1, len(names))]
    if any(end in tree for end in ends):
        return f"`{leaf.path}` has a parameter's name outside of any mirror: {remedy(path, side)}"
    if beside or path.split("/")[0] != OPTIMIZER or is_key(leaf) or not leaf.spec.shape:
        return None
    if names[-1] == _OF_MUON and reshaped(scope.everything, scope.state):
        return (
            f"`{leaf.path}` is Muon's, which chooses its parameters by their number of axes, and "
            f"rules change that: {remedy(path, side)}"
        )
    lengths = {*leaf.spec.shape}
    row = scope.in_a_row()
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
