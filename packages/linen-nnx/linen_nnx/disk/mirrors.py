"""Which subtrees of everything else that was saved mirror the model, and what each of them holds.

A model of two parameters, `d/kernel` and `d/bias`, and four leaves that a TrainState holds beside
it:

    opt_state/0/count         no path of the model below any node above it     plain
    opt_state/0/mu/d/kernel   below `opt_state/0/mu` lie `d/kernel` and
    opt_state/0/mu/d/bias     `d/bias`, and nothing else                       a mirror
    ema/d/kernel              below `ema` lies `d/kernel`; `d/bias` is masked  a mirror

Mirrors are found by the paths below them, and never by their own names. So an optimizer that nobody
has heard of is carried like Adam.

    >>> paths = ("d/kernel", "d/bias")
    >>> model = {"params": {path: Id("params", path) for path in paths}}
    >>> two, scalar = Spec((2,), "float32"), Spec((), "int32")
    >>> rest = {"opt_state/0/count": scalar, "opt_state/0/mu/d/kernel": two}
    >>> rest |= {"opt_state/0/mu/d/bias": two, "ema/d/kernel": two}
    >>> find_mirrors(rest, model)
    ([('opt_state/0/mu', 'params'), ('ema', 'params')], ['opt_state/0/count'])

An optimizer may keep several arrays for one parameter, such as SM3 with one for each axis: then
`opt_state/0/mu/d/kernel/0` lies below a path of the model, and `0` is its *tail*. What becomes of a
mirror is said in `follow.py`.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from linen_nnx.book.specs import Spec
from linen_nnx.book.tree import branches_of
from linen_nnx.disk.leaves import Key, Keys, Leaf
from linen_nnx.disk.moments import FACTORED, Factoring
from linen_nnx.disk.state import Id, State, names_of

ModelPaths = Mapping[str, Id]
"""The model's leaves by the path that each has in a mirror."""

Held = dict[str, dict[str, Leaf]]
"""The leaves of a mirror by the model's path, and for each by its tail: `""`, or `0` of a list."""


class Subtree(NamedTuple):
    """A subtree of the rest that mirrors the model, and what it holds."""

    prefix: str
    """Its own path: `opt_state/0/mu`."""
    tree: str
    """The name of the tree that it mirrors: a collection, or `""` for the whole model."""
    paths: ModelPaths
    """The leaves of that tree, by the path that each has below the prefix."""
    held: Held
    holes: dict[str, Leaf]
    """The empty nodes that it has in place of a branch of the model, by path below the prefix."""

    @property
    def node(self) -> str:
        """The node above it: `opt_state/0`."""
        return self.prefix.rpartition("/")[0]

    @property
    def field(self) -> str:
        """Its own name: `mu`."""
        return self.prefix.rpartition("/")[2]


def find_subtrees(
    rest: Mapping[str, Leaf], trees: Mapping[str, ModelPaths]
) -> tuple[list[Subtree], list[str]]:
    """The subtrees of `rest` that mirror a tree, with their leaves, and the paths in none."""
    specs: dict[str, Spec | None] = {}
    for path, leaf in rest.items():
        specs[path] = None if leaf.zarr is None else leaf.spec
    found, plain = find_mirrors(specs, trees)
    outside = set(plain)
    below = _below([prefix for prefix, _ in found], [path for path in rest if path not in outside])
    subtrees = []
    for prefix, tree in found:
        held, holes = _grouped(prefix, trees[tree], rest, below[prefix])
        subtrees.append(Subtree(prefix, tree, trees[tree], held, holes))
    return subtrees, plain


def find_mirrors(
    rest: Mapping[str, Spec | None], trees: Mapping[str, ModelPaths]
) -> tuple[list[tuple[str, str]], list[str]]:
    """The subtrees of `rest` that mirror a tree, as (path, tree), and the paths in none.

    A subtree mirrors a tree if each of its leaves has a path of that tree, or lies below one.
    Masked leaves may be missing, or a whole branch may be one empty node. One path by itself could
    be chance, so a lone leaf counts only if it is the whole tree, or an array and not a scalar.

    Args:
      rest: the spec of each leaf by path; None for what is no array (an empty node, a text).
      trees: the trees by name, the likeliest first.
    """
    finder = _Finder(rest, trees)
    finder.visit("", list(rest))
    return finder.mirrors, finder.plain


class _Finder:
    """One search, with what it has found so far."""

    def __init__(self, rest: Mapping[str, Spec | None], trees: Mapping[str, ModelPaths]) -> None:
        self.rest, self.trees = rest, trees
        self.branches = {name: branches_of(tree) for name, tree in trees.items()}
        self.mirrors: list[tuple[str, str]] = []
        self.plain: list[str] = []

    def visit(self, prefix: str, paths: list[str]) -> None:
        """Looks at the node `prefix`, below which `paths` lie, and at the nodes below it.

        The search begins at the root, so that a mirror is as large as can be: `ema` and not the
        `ema/d` in it, which alone would mirror a model with a parameter `kernel` as well.
        """
        # The root is no subtree: a state that mirrored the model as a whole would be the model.
        if prefix and (tree := self._mirrored(prefix, paths)) is not None:
            self.mirrors.append((prefix, tree))
            return
        groups: dict[str, list[str]] = {}
        for path in paths:
            start = len(prefix) + 1 if prefix else 0
            end = path.find("/", start)
            if end < 0:
                self.plain.append(path)
            else:
                groups.setdefault(path[:end], []).append(path)
        for head, members in groups.items():
            self.visit(head, members)

    def _mirrored(self, prefix: str, paths: list[str]) -> str | None:
        """The tree that a node mirrors. One that the node has every leaf of comes before others."""
        # A count beside the model may have the name of a parameter. Scalars alone prove nothing.
        solid = any((spec := self.rest[path]) is None or spec.shape for path in paths)
        found = None
        for name, tree in self.trees.items():
            owners = self._owners(prefix, paths, name)
            if owners is None:
                continue
            if len(owners) == len(tree):
                return name
            if solid and found is None:
                found = name
        return found

    def _owners(self, prefix: str, paths: list[str], name: str) -> set[str] | None:
        """The leaves of a tree that a node has; None if it has anything else."""
        owners: set[str] = set()
        for path in paths:
            below = path[len(prefix) + 1 :]
            known = owner(below, self.trees[name])
            if known is not None:
                owners.add(known)
                continue
            # `optax.masked` leaves one empty node in place of a branch that is masked as a whole.
            is_hole = below in self.branches[name] and self.rest[path] is None
            if not is_hole:
                return None
        return owners


def owner(path: str, tree: Collection[str]) -> str | None:
    """The path of `tree` that `path` is, or lies below.

    Example:
      >>> owner("d/kernel/1", {"d/kernel", "d/bias"})
      'd/kernel'
    """
    while path not in tree:
        path, slash, _ = path.rpartition("/")
        if not slash:
            return None
    return path


def _below(prefixes: Iterable[str], paths: Iterable[str]) -> dict[str, list[str]]:
    """The paths below each of some prefixes, of which none lies below another.

    Example:
      >>> _below(["ema", "opt_state/0/mu"], ["ema/d/bias", "opt_state/0/mu/d/bias"])
      {'ema': ['ema/d/bias'], 'opt_state/0/mu': ['opt_state/0/mu/d/bias']}
    """
    found: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    for path in paths:
        # Up from the path, which takes as many steps as it has levels. Comparing it with each
        # prefix would take as many as there are mirrors.
        node = path
        while node not in found:
            node = node.rpartition("/")[0]
        found[node].append(path)
    return found


def _grouped(
    prefix: str, tree: ModelPaths, rest: Mapping[str, Leaf], paths: Iterable[str]
) -> tuple[Held, dict[str, Leaf]]:
    """What the mirror at `prefix` holds at some paths, which begin with it; and its holes."""
    held: Held = {}
    holes: dict[str, Leaf] = {}
    for path in paths:
        below = path[len(prefix) + 1 :]
        known = owner(below, tree)
        if known is None:
            holes[below] = rest[path]
        else:
            tail = below[len(known) + 1 :]
            held.setdefault(known, {})[tail] = rest[path]
    return held, holes


def factorings(subtrees: Sequence[Subtree], state: State) -> dict[str, Factoring]:
    """How each node that holds the three moments of Adafactor factors, by its path.

    The shapes of the model in `state`, and of what is kept of each parameter, tell it.
    """
    prefixes = {subtree.prefix for subtree in subtrees}
    found: dict[str, Factoring] = {}
    for subtree in subtrees:
        # A field may be called `v` in any optimizer. With `v_row` and `v_col` it is Adafactor's.
        three = {f"{subtree.node}/{name}" for name in FACTORED}
        if subtree.field != "v" or not three <= prefixes:
            continue
        params, kept = [], []
        for path, leaves in subtree.held.items():
            # A masked parameter is an empty node, and shows nothing.
            if "" in leaves and not leaves[""].empty:
                params.append(state.model[subtree.paths[path]].spec.shape)
                kept.append(leaves[""].spec.shape)
        found[subtree.node] = Factoring.of(params, kept)
    return found


def prefix_keys(path: str, leaf: Leaf) -> Keys:
    """The keys of a leaf of the rest that make up its neutral path: all but those of boxes.

    From nnx, `opt_state/0/count` has the keys `optimizer, opt_state, 0, count, value`: the level
    `optimizer` is nnx's own, and `value` is the box around a variable.
    """
    names = list(names_of(path))
    keys: list[Key] = []
    # From the end, since a level above may have the name of one in the path.
    for key in reversed(leaf.keys):
        if names and key.name == names[-1]:
            keys.append(key)
            names.pop()
    return tuple(reversed(keys))
