"""Carries a rule book over from the model to everything saved with it.

Rules are written for the model. They follow into every subtree of the rest that mirrors one of
its collections (moments, traces, EMA, accumulated gradients), found by its structure and never by
its name. Everything that has no home on the other side is an error until a rule drops it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from linen_nnx.book.ops import Action, Fill, Multiply, Spec
from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.disk.state import HALVES, OPTIMIZER, Form, Id, State, names_of
from linen_nnx.disk.store import Key, Leaf

Source = TypeVar("Source")
Target = TypeVar("Target")
_RESET = "drop it by a rule, or go on with a fresh optimizer (--reset-optimizer)"


class Place(NamedTuple):
    """Where a target leaf goes: to `id` in the model, or to the neutral `path` in the rest.

    The first elements of a path are the rest's own structure: `prefix` has them with the key
    types that the source gives them. Those behind it mirror the model.
    """

    id: Id | None = None
    path: str = ""
    prefix: tuple[Key, ...] = ()
    branch: bool = False
    """Whether it is an empty node in place of a branch of the model."""

    @property
    def in_optimizer(self) -> bool:
        return self.id is None and self.path.split("/")[0] == OPTIMIZER

    @property
    def mirrored(self) -> tuple[str, ...]:
        """The elements of the path that mirror the model."""
        return tuple(names_of(self.path)[len(self.prefix) :])


class Move(NamedTuple, Generic[Source, Target]):
    """What becomes of some leaves: `sources`, through `actions`, go to `targets`.

    No target: dropped. No source: filled. No action: only names change.
    """

    sources: tuple[Source, ...]
    targets: tuple[Target, ...]
    actions: tuple[Action, ...] = ()
    specs: tuple[Spec, ...] = ()
    """Shape and dtype of each target after the last action, where there are actions."""


_Step: TypeAlias = Move[Id, Id]
"""A step of a rule book's plan: from the source's model to the target's."""


def carry(
    state: State, to: Form, book: RuleBook, like: State | None, reset_optimizer: bool
) -> list[Move[Leaf, Place]]:
    """Every move that takes `state` to the form `to`.

    `like` is a tree of that form whose shapes and dtypes the model must get; `reset_optimizer`
    leaves the optimizer's state out. Raises `RuleError` with everything that does not fit.
    """
    problems: list[str] = []
    steps = list(_steps(state, to, book, like, problems))
    moves: list[Move[Leaf, Place]] = []
    for old, new, actions, specs in steps:
        sources = tuple([state.model[id] for id in old])
        moves.append(Move(sources, tuple([Place(id) for id in new]), actions, specs))
    rest = dict(state.rest)
    if reset_optimizer:
        for path in [path for path in rest if path.split("/")[0] == OPTIMIZER]:
            moves.append(Move((rest.pop(path),), ()))
    trees = _trees(steps, state.form)
    mirrors, plain = _find_mirrors(rest, trees)
    for prefix, tree in mirrors:
        names = {id: path for path, id in trees[tree].items()}
        moves += _Mirror(prefix, tree, names, state, to, rest, problems).moves(steps)
    inert = all(step.sources == step.targets and not step.actions for step in steps)
    for path in plain:
        moves.append(Move((rest[path],), (Place(path=path, prefix=_prefix(path, rest[path])),)))
        if not inert:
            beside = path.startswith("../") or not (state.form.flat or OPTIMIZER in path)
            _check_plain(path, rest[path], trees, beside, problems)
    if problems:
        raise RuleError(f"The checkpoint cannot go to {to}", problems)
    return moves


def _steps(
    state: State, to: Form, book: RuleBook, like: State | None, problems: list[str]
) -> Iterator[_Step]:
    """The model's steps: of the whole book, or of each half whose form changes."""
    if not (state.form.stage or to.stage):
        yield from _planned(state.model, state.form.side, to.side, book, like, problems)
        return
    halves: dict[str, dict[Id, Leaf]] = {half: {} for half in HALVES}
    for id, leaf in state.model.items():
        half = id.path.split("/")[0]
        if half in halves:
            halves[half][id] = leaf
        else:
            problems.append(f"`{id.collection}/{id.path}` lies in neither half ({HALVES})")
    for half, model in halves.items():
        if state.form.of(half) == to.of(half):
            yield from (Move((id,), (id,)) for id in model)
        else:
            side = state.form.of(half)
            yield from _planned(model, side, to.of(half), book.within(half), None, problems)


def _planned(
    model: Mapping[Id, Leaf],
    side: str,
    to: Any,
    book: RuleBook,
    like: State | None,
    problems: list[str],
) -> Iterator[_Step]:
    if side == to:
        problems.append(f"the checkpoint is in {to} form already")
        return
    ids = {_path(id, side == "linen"): id for id in model}
    target = None
    if like is not None:
        target = {_path(id, like.form.flat): leaf.spec for id, leaf in like.model.items()}
    try:
        plan = book.plan({path: model[id].spec for path, id in ids.items()}, to, target)
    except RuleError as error:
        problems += error.problems
        return
    for step in plan.steps:
        sources = tuple([ids[path] for path in step.sources])
        if to == "linen":
            targets = tuple([Id(*path.split("/", 1)) for path in step.targets])
        else:
            collection = sources[0].collection if sources else "params"
            targets = tuple([Id(collection, path) for path in step.targets])
        known = {id.collection for id in sources} - {""}
        if known and len(known | {id.collection for id in targets}) > 1:
            problems.append(f"{step.rule} moves {step.sources} to another collection")
        yield Move(sources, targets, step.actions, step.specs)


def _prefix(path: str, leaf: Leaf) -> tuple[Key, ...]:
    """The keys of a leaf of the rest that make up its neutral path."""
    names = names_of(path)
    keys = leaf.keys if leaf.keys[-1].name == names[-1] else leaf.keys[:-1]  # without a box
    return keys[len(keys) - len(names) :]


def _path(id: Id, flat: bool) -> str:
    return f"{id.collection}/{id.path}" if flat else id.path


def _trees(steps: Sequence[_Step], form: Form) -> dict[str, dict[str, Id]]:
    """What a subtree may mirror: the paths of one collection (parameters first), or `""`: all."""
    trees: dict[str, dict[str, Id]] = {"params": {}}
    everything = {}
    for step in steps:
        for id in step.sources:
            # A leaf that stock nnx drops may be a parameter: its moments are dropped with it.
            named = [i.collection for i in (id, *step.targets) if i.collection]
            trees.setdefault(named[0] if named else "params", {})[id.path] = id
            everything[_path(id, form.flat)] = id
    return {**trees, "": everything}


def _find_mirrors(
    rest: Mapping[str, Leaf], trees: Mapping[str, Mapping[str, Id]]
) -> tuple[list[tuple[str, str]], list[str]]:
    """The subtrees of `rest` that mirror a tree, as (path, tree), and the leaves in none.

    A subtree mirrors a tree if all its leaves have paths of that tree; masked ones may lack, or
    be one empty node in place of a branch. A single path proves little: then it must be the whole
    tree, or an array and not a scalar.
    """
    mirrors: list[tuple[str, str]] = []
    plain: list[str] = []

    @cache
    def branches(name: str) -> set[str]:
        return _branches(trees[name])

    def fits(prefix: str, path: str, name: str) -> bool:
        full = f"{prefix}/{path}"
        return path in trees[name] or (rest[full].empty and path in branches(name))

    def visit(prefix: str, paths: list[str]) -> None:
        below = [path[len(prefix) + 1 :] for path in paths] if prefix else []
        for name in sorted(trees, key=lambda name: below != [] and set(below) != set(trees[name])):
            whole = set(below) == set(trees[name])
            solid = any(rest[p].zarr is None or rest[p].spec.shape for p in paths)
            if below and all(fits(prefix, path, name) for path in below) and (whole or solid):
                mirrors.append((prefix, name))
                return
        groups: dict[str, list[str]] = {}
        for path in paths:
            start = len(prefix) + 1 if prefix else 0
            end = path.find("/", start)
            if end < 0:
                plain.append(path)
            else:
                groups.setdefault(path[:end], []).append(path)
        for head, members in groups.items():
            visit(head, members)

    visit("", list(rest))
    return mirrors, plain


def _branches(paths: Iterable[str]) -> set[str]:
    """Every inner node above some paths."""
    split = (path.split("/") for path in paths)
    return {"/".join(names[:n]) for names in split for n in range(1, len(names))}


@dataclass(frozen=True)
class _Mirror:
    """One subtree of the rest that mirrors `tree`; `names` are the model's paths in it."""

    prefix: str
    tree: str
    names: Mapping[Id, str]
    state: State
    to: Form
    rest: Mapping[str, Leaf]
    problems: list[str]

    def moves(self, steps: Sequence[_Step]) -> Iterator[Move[Leaf, Place]]:
        """The moves of this subtree."""
        yield from self._branches(steps)
        for step in steps:
            yield from self._leaves(step)

    def _leaves(self, step: _Step) -> Iterator[Move[Leaf, Place]]:
        """The moves of one step of the model."""
        paths = [f"{self.prefix}/{self.names.get(id, '')}" for id in step.sources]
        leaves = tuple(self.rest[path] for path in paths if path in self.rest)
        if step.sources and not leaves:
            return  # of another collection, or masked away
        targets = tuple(self._place(self._target(id)) for id in step.targets)
        if len(leaves) < len(paths) or len({leaf.empty for leaf in leaves}) > 1:
            shown = ", ".join(f"`{path}`" for path in paths)
            self.problems.append(f"{shown} would be joined, but only some are masked: {_RESET}")
        elif leaves and leaves[0].empty:
            yield from (Move(leaves[:1], (target,)) for target in targets)
        else:
            self._check(step, leaves)
            dtypes = [leaves[0].spec.dtype if leaves else spec.dtype for spec in step.specs]
            specs = [Spec(s.shape, d) for s, d in zip(step.specs, dtypes, strict=True)]
            yield Move(leaves, targets, step.actions, tuple(specs) if step.actions else ())

    def _branches(self, steps: Sequence[_Step]) -> Iterator[Move[Leaf, Place]]:
        """The moves of empty nodes that stand for masked branches of the model."""
        old = _branches(self.names.values())
        holes = [p for p in self.rest if p.startswith(f"{self.prefix}/") and self.rest[p].empty]
        for hole in holes:
            branch = hole[len(self.prefix) + 1 :]
            if branch not in old:
                continue
            inside, outside = set[str](), set[str]()
            for step in steps:
                paths = [self.names[id] for id in step.sources if id in self.names]
                under = {path.startswith(f"{branch}/") for path in paths}
                targets = {self._target(id) for id in step.targets}
                inside |= targets if True in under else set()
                outside |= targets if False in under else set()
            nodes = _branches(inside) - _branches(outside)
            if branch in nodes:
                nodes = {branch}
            if len(nodes) == 1 and not inside & outside:
                yield Move((self.rest[hole],), (self._place(nodes.pop(), branch=True),))
            else:
                self.problems.append(
                    f"`{hole}` is masked as a whole, and becomes no whole: {_RESET}"
                )

    def _target(self, id: Id) -> str:
        return id.path if self.tree else _path(id, self.to.flat)

    def _place(self, path: str, branch: bool = False) -> Place:
        return Place(path=f"{self.prefix}/{path}", prefix=self._keys, branch=branch)

    @cached_property
    def _keys(self) -> tuple[Key, ...]:
        """The keys of the prefix."""
        some = next(path for path in self.rest if path.startswith(f"{self.prefix}/"))
        return _prefix(some, self.rest[some])[: len(names_of(self.prefix))]

    def _check(self, step: _Step, leaves: Sequence[Leaf]) -> None:
        shown = ", ".join(f"`{leaf.path}` ({leaf.spec})" for leaf in leaves[:3])
        changing = any(isinstance(action, Multiply | Fill) for action in step.actions)
        if changing and self.prefix.split("/")[0] == OPTIMIZER:
            shown = shown or f"`{self.prefix}/.../{step.targets[0].path}`"
            self.problems.append(f"{shown} follows a rule that changes or invents values: {_RESET}")
        elif step.actions and leaves:
            shapes = [self.state.model[id].spec.shape for id in step.sources]
            dtypes = {str(leaf.spec.dtype) for leaf in leaves}
            if [leaf.spec.shape for leaf in leaves] != shapes or len(dtypes) > 1:
                self.problems.append(
                    f"{shown} follows parameters that a rule reshapes, but is not of their shape "
                    f"{list(shapes[0])}: {_RESET}"
                )


def _check_plain(
    path: str,
    leaf: Leaf,
    trees: Mapping[str, Mapping[str, Id]],
    beside: bool,
    problems: list[str],
) -> None:
    """Refuses what mirrors nothing and yet may depend on the model's form.

    What lies `beside` the training state may be anything that is not called like a parameter.
    """
    if leaf.zarr is None:
        return
    names = path.split("/")
    ends = ["/".join(names[n:]) for n in range(1, len(names))]
    spec = leaf.spec
    raw_key = str(spec.dtype) == "uint32" and spec.shape in ((2,), (4,))
    key = raw_key or str(spec.dtype).startswith("key<")
    if any(end in tree for end in ends for tree in trees.values()):
        problems.append(f"`{leaf.path}` has a parameter's name outside of any mirror: {_RESET}")
    elif spec.shape and not key and not beside:
        problems.append(f"no rule matches `{leaf.path}` ({spec}), and it mirrors nothing: {_RESET}")
