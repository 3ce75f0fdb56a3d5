"""What becomes of a subtree that mirrors the model, by what rules do to the model itself.

A rule for `d/kernel` moves the kernel's leaf of every mirror as it moves the kernel. Where it also
reshapes the kernel, `moments.py` says what that means for what is kept of it:

    opt_state/0/mu/d/kernel       of the kernel's shape: the same actions
    opt_state/0/v_row/d/kernel    of the kernel without an axis: those of `factored_actions`
    memory/d/kernel               of the kernel's behind an axis of its own: those of `shifted`
    opt_state/0/mu/e/scale        of a parameter that the rule fills: what optax starts it with

What no such rule is known for is refused, with what to do about it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from linen_nnx.book.ops import Action, Fill, Multiply, Spec
from linen_nnx.book.tree import branches_of
from linen_nnx.disk.leaves import Key, Leaf
from linen_nnx.disk.mirrors import prefix_keys
from linen_nnx.disk.moments import (
    Factoring,
    Shape,
    Unknown,
    common_dtype,
    common_lead,
    factored_actions,
    factored_shape,
    first_value,
    shifted,
)
from linen_nnx.disk.moves import Move, Place, Step
from linen_nnx.disk.state import OPTIMIZER, Form, Id, State, names_of


def remedy(path: str, side: str) -> str:
    """What to do about a leaf of the rest that cannot come along."""
    if path.split("/")[0] == OPTIMIZER:
        return "go on with a fresh optimizer (--reset-optimizer)"
    named = path.removeprefix("../")
    return f"drop it by a rule, {{{side}: {named!r}, ops: [{{op: drop}}]}}"


def reshaped(steps: Sequence[Step], state: State) -> set[Id]:
    """The leaves of a model that have another number of axes afterwards."""
    found: set[Id] = set()
    for step in steps:
        for id in step.sources:
            before = len(state.model[id].spec.shape)
            if step.actions and any(len(spec.shape) != before for spec in step.specs):
                found.add(id)
    return found


@dataclass(frozen=True)
class Mirror:
    """One subtree of the rest that mirrors the model.

    Attributes:
      prefix: its path; `names`: the path below it of each leaf of the model.
      tree: what it mirrors: a collection, or `""` for all.
      level: whether its targets lie below the names of their collections.
      factoring: how the optimizer factors, if this is one of the moments of Adafactor.
      given: the paths of a tree that the result must equal, if there is one, and whether each is an
        array.
      problems, notes: where to put what does not fit, and what was assumed.
    """

    prefix: str
    tree: str
    names: Mapping[Id, str]
    state: State
    to: Form
    held: Mapping[str, Mapping[str, Leaf]]
    """By the model's path and by tail: `""`, or `1` of a list that is kept for each parameter."""
    holes: Mapping[str, Leaf]
    """The empty nodes that stand for a branch of the model, by path."""
    level: bool
    factoring: Factoring | None
    given: Mapping[str, bool] | None
    problems: list[str]
    notes: list[str]

    def moves(self, steps: Sequence[Step]) -> Iterator[Move[Leaf, Place]]:
        """The moves of this subtree."""
        self._note_choice(steps)
        yield from self._branches(steps)
        for step in steps:
            if step.sources:
                moves = self._follow(step)
            elif self.tree in ("", step.targets[0].collection):
                moves = self._fill(step)
            else:
                continue
            for move in moves:
                yield move._replace(rule=step.rule)

    @property
    def field(self) -> str:
        """Its own name."""
        return self.prefix.rpartition("/")[2]

    @property
    def in_optimizer(self) -> bool:
        return self.prefix.split("/")[0] == OPTIMIZER

    def _note_choice(self, steps: Sequence[Step]) -> None:
        """Notes where an optimizer keeps moments of some parameters, and may now choose others."""
        chosen = self.in_optimizer and self.given is None and len(self._pairs) < len(self.names)
        if chosen and any(id in self._pairs for id in reshaped(steps, self.state)):
            self.notes.append(
                f"`{self.prefix}` is kept for some parameters, whose number of axes rules change: "
                "if they were chosen by it, give a fresh checkpoint of the target's form with "
                "--like, which is compared, or go on with a fresh optimizer (--reset-optimizer)"
            )

    def _refuse(self, what: str) -> None:
        self.problems.append(f"{what}: {remedy(self.prefix, self.state.form.side)}")

    def _follow(self, step: Step) -> Iterator[Move[Leaf, Place]]:
        """The moves of what mirrors the sources of one step."""
        paths = [self.names.get(id, "") for id in step.sources]
        found = [self.held[path] for path in paths if path in self.held]
        if not found:
            return  # of another collection, or masked away
        tails = found[0].keys()
        same = all(leaves.keys() == tails for leaves in found)
        empty = {leaf.empty for leaves in found for leaf in leaves.values()}
        if len(found) < len(paths) or not same or len(empty) > 1:
            shown = ", ".join(f"`{self.prefix}/{path}`" for path in paths)
            self._refuse(f"{shown} would be joined, but only some are masked")
        elif True in empty:
            leaf = next(iter(found[0].values()))
            yield from (Move((leaf,), (self._place(self._target(id)),)) for id in step.targets)
        else:
            for tail in tails:
                yield from self._changed(step, tuple(leaves[tail] for leaves in found), tail)

    def _changed(
        self, step: Step, leaves: tuple[Leaf, ...], tail: str
    ) -> Iterator[Move[Leaf, Place]]:
        """The move of the leaves that have the same tail behind each source of a step."""
        keys = leaves[0].keys[len(leaves[0].keys) - len(tail.split("/")) :] if tail else ()
        targets = tuple(self._place(self._target(id), tail=keys) for id in step.targets)
        if not step.actions:
            yield Move(leaves, targets)
            return
        shown = ", ".join(f"`{leaf.path}` ({leaf.spec})" for leaf in leaves[:3])
        try:
            yield self._acted(step, leaves, targets, tail)
        except Unknown as unknown:
            self._refuse(f"{shown} {unknown}")

    def _acted(
        self, step: Step, leaves: tuple[Leaf, ...], targets: tuple[Place, ...], tail: str
    ) -> Move[Leaf, Place]:
        """The same through actions. Raises `Unknown` for what they mean nothing for."""
        if self.in_optimizer and any(isinstance(action, Multiply) for action in step.actions):
            raise Unknown("follows a rule that changes values")
        dtypes = {str(leaf.spec.dtype) for leaf in leaves}
        if len(dtypes) > 1:
            raise Unknown(f"would be joined, but are of {' and '.join(sorted(dtypes))}")
        dtype = leaves[0].spec.dtype
        params = [self.state.model[id].spec.shape for id in step.sources]
        if self.factoring is not None:
            actions, shapes = self._refactored(step, leaves, params)
        elif [leaf.spec.shape for leaf in leaves] == params and not tail:
            actions, shapes = step.actions, [spec.shape for spec in step.specs]
        elif self._lead is not None:
            actions = shifted(step.actions, self._lead)
            shapes = [(*self._lead, *spec.shape) for spec in step.specs]
        else:
            raise Unknown(
                f"follows parameters that a rule reshapes, but is not of their shape "
                f"{list(params[0])}"
            )
        return Move(leaves, targets, actions, tuple(Spec(shape, dtype) for shape in shapes))

    def _refactored(
        self, step: Step, leaves: Sequence[Leaf], params: Sequence[Shape]
    ) -> tuple[tuple[Action, ...], list[Shape]]:
        """The actions on a moment of Adafactor, and the shapes of their results."""
        assert self.factoring is not None
        before, after = params[0], step.specs[0].shape
        kept = leaves[0].spec.shape
        split = len(before) > 1 and kept == factored_shape(self.field, before, True)
        name = step.targets[0].path
        both = split, self.factoring.factors(after, self.notes, name)
        actions = factored_actions(self.field, step.actions, before, after, both)
        return actions, [factored_shape(self.field, after, both[1])] * len(step.targets)

    @cached_property
    def _pairs(self) -> dict[Id, Spec]:
        """What the mirror holds of each parameter that it has; lists aside."""
        return {
            id: self.held[path][""].spec
            for id, path in self.names.items()
            if "" in self.held.get(path, ()) and not self.held[path][""].empty
        }

    @cached_property
    def _lead(self) -> Shape | None:
        model = self.state.model
        return common_lead([(spec.shape, model[id].spec.shape) for id, spec in self._pairs.items()])

    def _fill(self, step: Step) -> Iterator[Move[Leaf, Place]]:
        """The move of what a new parameter gets here."""
        (id,), (fill,) = step.targets, step.actions
        assert isinstance(fill, Fill)
        path = f"{self.prefix}/{self._target(id)}"
        if self.given is not None:
            if not self.given.get(path):
                return  # masked, or absent: where it is due, laying out says so
        elif len(self._pairs) < len(self.names):
            self._refuse(
                f"`{path}` may be masked, as others of `{self.prefix}` are: give a checkpoint of "
                "the target's form with --like, or else"
            )
            return
        try:
            spec = self._kept(step.specs[0], id.path)
            one = fill if not self.in_optimizer else first_value(self.field, fill, spec)
            filled = replace(one, spec=spec)
        except Unknown as unknown:
            self._refuse(f"`{path}` {unknown}")
            return
        yield Move((), (self._place(self._target(id)),), (filled,), (spec,))

    def _kept(self, new: Spec, name: str) -> Spec:
        """What is kept here of a new parameter. Raises `Unknown` where that cannot be told."""
        own = {id.path: self.state.model[id].spec for id in self._pairs}
        kept = {id.path: spec for id, spec in self._pairs.items()}
        dtype = common_dtype(kept, own, new)
        if self.factoring is not None:
            split = self.factoring.factors(new.shape, self.notes, name)
            return Spec(factored_shape(self.field, new.shape, split), dtype)
        if all(kept[path].shape == own[path].shape for path in kept):
            return Spec(new.shape, dtype)
        if self._lead is not None:
            return Spec((*self._lead, *new.shape), dtype)
        if kept and all(spec.shape == () for spec in kept.values()):
            return Spec((), dtype)
        raise Unknown("has a form that does not follow from the parameter's")

    def _branches(self, steps: Sequence[Step]) -> Iterator[Move[Leaf, Place]]:
        """The moves of empty nodes that stand for masked branches of the model."""
        for branch, hole in self.holes.items():
            inside, outside = set[str](), set[str]()
            for step in steps:
                paths = [self.names[id] for id in step.sources if id in self.names]
                under = {path.startswith(f"{branch}/") for path in paths}
                targets = {self._target(id) for id in step.targets}
                inside |= targets if True in under else set()
                outside |= targets if False in under else set()
            nodes = branches_of(inside) - branches_of(outside)
            if branch in nodes:
                nodes = {branch}
            if len(nodes) == 1 and not inside & outside:
                yield Move((hole,), (self._place(nodes.pop(), branch=True),))
            else:
                self._refuse(f"`{hole.path}` is masked as a whole, and becomes no whole")

    def _target(self, id: Id) -> str:
        """The path of a target below the prefix."""
        below = self.to.flat and not self.tree
        return f"{id.collection}/{id.path}" if self.level or below else id.path

    def _place(self, path: str, branch: bool = False, tail: tuple[Key, ...] = ()) -> Place:
        full = "/".join([self.prefix, path, *(key.name for key in tail)])
        return Place(path=full, prefix=self._keys, branch=branch, tail=tail)

    @cached_property
    def _keys(self) -> tuple[Key, ...]:
        """The keys of the prefix."""
        groups = [(path, tail, leaf) for path, g in self.held.items() for tail, leaf in g.items()]
        groups += [(path, "", leaf) for path, leaf in self.holes.items()]
        path, tail, leaf = groups[0]
        full = "/".join(filter(None, [self.prefix, path, tail]))
        return prefix_keys(full, leaf)[: len(names_of(self.prefix))]
