"""Which subtrees of everything else that was saved mirror the model, and what each of them holds.

A model of two parameters, `d/kernel` and `d/bias`, and what a TrainState holds beside it:

    opt_state/0/count                                     nothing of the model: plain
    opt_state/0/mu/d/kernel, opt_state/0/mu/d/bias        `opt_state/0/mu` mirrors the model
    ema/d/kernel, ema/d/bias                              so does `ema`
    opt_state/1/mu/d/kernel/0, opt_state/1/mu/d/kernel/1  so does this, with a list for each array

Mirrors are found by the paths below them and never by their own names. What becomes of them is said
in `follow.py`.
"""

from collections.abc import Collection, Iterable, Mapping

from linen_nnx.book.ops import Spec
from linen_nnx.book.tree import branches_of
from linen_nnx.disk.leaves import Key, Leaf
from linen_nnx.disk.moments import FACTORED, Factoring
from linen_nnx.disk.state import Id, State, names_of

Tree = Mapping[str, Id]
"""The model's leaves by the path that each has in a mirror."""


def find_mirrors(
    rest: Mapping[str, Spec | None], trees: Mapping[str, Tree]
) -> tuple[list[tuple[str, str]], list[str]]:
    """The subtrees of `rest` that mirror a tree, as (path, tree), and the paths in none.

    A subtree mirrors a tree if each of its leaves has a path of that tree, or lies below one;
    masked ones may lack, or be one empty node in place of a branch. A single path proves little:
    then it must be the whole tree, or an array and not a scalar.

    Args:
      rest: the spec of each leaf by path; None for what is no array (an empty node, a text).
      trees: the trees by name, the likeliest first.

    Example:
      >>> import numpy as np
      >>> model = {"params": {path: Id("params", path) for path in ("d/kernel", "d/bias")}}
      >>> two = Spec((2,), np.dtype("float32"))
      >>> find_mirrors({"mu/d/kernel": two, "mu/d/bias": two, "count": two}, model)
      ([('mu', 'params')], ['count'])
    """
    finder = _Finder(rest, trees)
    finder.visit("", list(rest))
    return finder.mirrors, finder.plain


class _Finder:
    """One search, with what it has found so far."""

    def __init__(self, rest: Mapping[str, Spec | None], trees: Mapping[str, Tree]) -> None:
        self.rest, self.trees = rest, trees
        self.branches = {name: branches_of(tree) for name, tree in trees.items()}
        self.mirrors: list[tuple[str, str]] = []
        self.plain: list[str] = []

    def visit(self, prefix: str, paths: list[str]) -> None:
        """Looks at the node `prefix`, below which `paths` lie, and at the nodes below it."""
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
        """The tree that a node mirrors: one of which it is the whole, if there is one."""
        solid = any((spec := self.rest[path]) is None or spec.shape for path in paths)
        found = None
        for name, tree in self.trees.items():
            owners = self._owners(prefix, paths, name)
            if owners is not None and len(owners) == len(tree):
                return name
            if owners is not None and solid and found is None:
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
            elif below not in self.branches[name] or self.rest[path] is not None:
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


def group(
    prefix: str, tree: Tree, rest: Mapping[str, Leaf], paths: Iterable[str]
) -> tuple[dict[str, dict[str, Leaf]], dict[str, Leaf]]:
    """The leaves at `paths` of one mirror: by the model's path and by tail; and its holes."""
    held: dict[str, dict[str, Leaf]] = {}
    holes: dict[str, Leaf] = {}
    for path in paths:
        below = path[len(prefix) + 1 :]
        known = owner(below, tree)
        if known is None:
            holes[below] = rest[path]
        else:
            held.setdefault(known, {})[below[len(known) + 1 :]] = rest[path]
    return held, holes


def factorings(
    mirrors: Mapping[str, Mapping[str, Mapping[str, Leaf]]],
    trees: Mapping[str, Tree],
    state: State,
) -> dict[str, Factoring]:
    """How each node that holds the three moments of Adafactor factors, by its path.

    `mirrors`: what each mirror holds, by its prefix; `trees`: what each mirrors.
    """
    found: dict[str, Factoring] = {}
    for prefix, held in mirrors.items():
        node, _, field = prefix.rpartition("/")
        if field != "v" or not all(f"{node}/{name}" in mirrors for name in FACTORED):
            continue
        whole = {path: leaves[""] for path, leaves in held.items() if "" in leaves}
        paths = [path for path, leaf in whole.items() if not leaf.empty]
        params = [state.model[trees[prefix][path]].spec.shape for path in paths]
        found[node] = Factoring.of(params, [whole[path].spec.shape for path in paths])
    return found


def prefix_keys(path: str, leaf: Leaf) -> tuple[Key, ...]:
    """The keys of a leaf of the rest that make up its neutral path: all but those of boxes."""
    names = list(names_of(path))
    keys: list[Key] = []
    for key in reversed(leaf.keys):
        if names and key.name == names[-1]:
            keys.append(key)
            names.pop()
    return tuple(reversed(keys))
