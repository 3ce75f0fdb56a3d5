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

from linen_nnx.book.actions import Action, Fill, Multiply
from linen_nnx.book.moves import Move
from linen_nnx.book.specs import Spec
from linen_nnx.book.tree import branches_of
from linen_nnx.disk.leaves import Keys, Leaf
from linen_nnx.disk.mirrors import Subtree, prefix_keys
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
from linen_nnx.disk.places import Place
from linen_nnx.disk.state import OPTIMIZER, Form, Id, State, names_of
from linen_nnx.errors import quoted


def remedy(path: str, side: str) -> str:
    """What to do about a leaf of the rest that cannot come along.

    Example:
      >>> remedy("opt_state/0/mu", "linen")
      'go on with a fresh optimizer (--reset-optimizer)'
      >>> remedy("../ema", "linen")
      "drop it by a rule, {linen: 'ema', ops: [{op: drop}]}"
    """
    if path.split("/")[0] == OPTIMIZER:
        return "go on with a fresh optimizer (--reset-optimizer)"
    named = path.removeprefix("../")
    return f"drop it by a rule, {{{side}: {named!r}, ops: [{{op: drop}}]}}"


def reshaped(of_model: Sequence[Move[Id, Id]], state: State) -> set[Id]:
    """The leaves of a model that have another number of axes afterwards."""
    found: set[Id] = set()
    for move in of_model:
        if not move.actions:
            continue
        for id in move.sources:
            before = len(state.model[id].spec.shape)
            if any(len(spec.shape) != before for spec in move.specs):
                found.add(id)
    return found


@dataclass(frozen=True)
class Mirror:
    """One subtree of the rest that mirrors the model.

    Attributes:
      subtree: where it is, what it mirrors, and what it holds.
      state: the whole state that it is part of; `to`: the form that this one gets.
      below_collections: whether its targets lie below the names of their collections.
      factoring: how the optimizer factors, if this is one of the moments of Adafactor.
      given: the paths of a given tree in the target's form, if there is one, and whether each is an
        array; see `carry._Carrying.carry_rest`.
      problems, notes: where to put what does not fit, and what was assumed.
    """

    subtree: Subtree
    state: State
    to: Form
    below_collections: bool
    factoring: Factoring | None
    given: Mapping[str, bool] | None
    problems: list[str]
    notes: list[str]

    def moves(self, of_model: Sequence[Move[Id, Id]]) -> Iterator[Move[Leaf, Place]]:
        """The moves of this subtree, by those of the model."""
        self._note_choice(of_model)
        # A masked branch first: it is one leaf here, and many moves of the model are about it.
        yield from self._branches(of_model)
        for rule_move in of_model:
            if rule_move.sources:
                moves = self._follow(rule_move)
            elif self.subtree.tree in ("", rule_move.targets[0].collection):
                moves = self._fill(rule_move)
            else:
                continue  # the new leaf is of another collection than this mirror
            for move in moves:
                yield move._replace(rule=rule_move.rule)

    @property
    def prefix(self) -> str:
        return self.subtree.prefix

    @property
    def field(self) -> str:
        return self.subtree.field

    @property
    def in_optimizer(self) -> bool:
        return self.prefix.split("/")[0] == OPTIMIZER

    @cached_property
    def _names(self) -> dict[Id, str]:
        """The path below the prefix of each leaf of the model."""
        return {id: path for path, id in self.subtree.paths.items()}

    @property
    def _has_all(self) -> bool:
        """Whether it holds an array of every parameter, so that none is masked."""
        return len(self._kept) == len(self.subtree.paths)

    def _note_choice(self, of_model: Sequence[Move[Id, Id]]) -> None:
        """Notes where an optimizer keeps moments of some parameters, and may now choose others.

        A mask such as `lambda params: tree.map(lambda p: p.ndim > 1, params)` chooses by the number
        of axes. A stack of biases has two, and would be chosen by a fresh optimizer.
        """
        if not self.in_optimizer or self.given is not None or self._has_all:
            return
        if self._kept.keys() & reshaped(of_model, self.state):
            self.notes.append(
                f"`{self.prefix}` is kept for some parameters, whose number of axes rules change: "
                "if they were chosen by it, give a fresh checkpoint of the target's form with "
                "--like, which is compared, or go on with a fresh optimizer (--reset-optimizer)"
            )

    def _refuse(self, what: str) -> None:
        self.problems.append(f"{what}: {remedy(self.prefix, self.state.form.side)}")

    def _follow(self, rule_move: Move[Id, Id]) -> Iterator[Move[Leaf, Place]]:
        """The moves of what mirrors the sources of one move of the model."""
        held = self.subtree.held
        paths = [self._names.get(id, "") for id in rule_move.sources]
        found = [held[path] for path in paths if path in held]
        if not found:
            return  # the sources are of another collection, or masked away
        # Two leaves become one only if each is here in the same way: an array, an empty node, or a
        # list of as many.
        tails = found[0].keys()
        same = all(leaves.keys() == tails for leaves in found)
        empty = {leaf.empty for leaves in found for leaf in leaves.values()}
        if len(found) < len(paths) or not same or len(empty) > 1:
            shown = quoted([f"{self.prefix}/{path}" for path in paths])
            self._refuse(f"{shown} would be joined, but only some are masked")
        elif True in empty:
            # All are masked, so each target is: one empty node is as good as another.
            leaf = next(iter(found[0].values()))
            for id in rule_move.targets:
                yield Move((leaf,), (self._place(self._target(id)),))
        else:
            for tail in tails:
                leaves = tuple(leaves[tail] for leaves in found)
                yield from self._changed(rule_move, leaves, tail)

    def _changed(
        self, rule_move: Move[Id, Id], leaves: tuple[Leaf, ...], tail: str
    ) -> Iterator[Move[Leaf, Place]]:
        """The move of the leaves that have the same tail behind each source of a move."""
        # The keys of the tail are the last ones: a tail `1` is the element of a list.
        count = len(tail.split("/")) if tail else 0
        keys = leaves[0].keys[len(leaves[0].keys) - count :]
        targets = tuple(self._place(self._target(id), tail=keys) for id in rule_move.targets)
        if not rule_move.actions:
            yield Move(leaves, targets)
            return
        try:
            yield self._acted(rule_move, leaves, targets, tail)
        except Unknown as unknown:
            shown = ", ".join(f"`{leaf.path}` ({leaf.spec})" for leaf in leaves[:3])
            self._refuse(f"{shown} {unknown}")

    def _acted(
        self,
        rule_move: Move[Id, Id],
        leaves: tuple[Leaf, ...],
        targets: tuple[Place, ...],
        tail: str,
    ) -> Move[Leaf, Place]:
        """The move of leaves whose parameters a rule reshapes.

        Raises `Unknown` where it is not known what the rule means for what is kept of them.
        """
        # A parameter that is halved has a gradient twice as large, and an Adam moment `nu` four
        # times as large. No optimizer says by which power its fields go.
        if self.in_optimizer and any(isinstance(one, Multiply) for one in rule_move.actions):
            raise Unknown("follows a rule that changes values")
        dtypes = sorted({str(leaf.spec.dtype) for leaf in leaves})
        if len(dtypes) > 1:
            raise Unknown(f"would be joined, but are of {' and '.join(dtypes)}")
        params = [self.state.model[id].spec.shape for id in rule_move.sources]
        actions, shapes = self._actions(rule_move, leaves, params, tail)
        # The rule's dtypes are the parameters'; a moment may be kept in another.
        specs = [Spec(shape, leaves[0].spec.dtype) for shape in shapes]
        return Move(leaves, targets, actions, tuple(specs))

    def _actions(
        self,
        rule_move: Move[Id, Id],
        leaves: Sequence[Leaf],
        params: Sequence[Shape],
        tail: str,
    ) -> tuple[tuple[Action, ...], list[Shape]]:
        """The actions on what is kept of parameters of the shapes `params`, and the new shapes."""
        # Adafactor's come first, since an array of theirs may have its parameter's shape by chance:
        # a bias (1,) and its placeholder (1,).
        if self.factoring is not None:
            return self._refactored(rule_move, leaves, params)
        after = [spec.shape for spec in rule_move.specs]
        if [leaf.spec.shape for leaf in leaves] == params and not tail:
            return rule_move.actions, after
        if self._lead is not None:
            shapes = [(*self._lead, *shape) for shape in after]
            return shifted(rule_move.actions, self._lead), shapes
        raise Unknown(
            f"follows parameters that a rule reshapes, but is not of their shape {list(params[0])}"
        )

    def _refactored(
        self, rule_move: Move[Id, Id], leaves: Sequence[Leaf], params: Sequence[Shape]
    ) -> tuple[tuple[Action, ...], list[Shape]]:
        """The actions on a moment of Adafactor, and the shapes of their results."""
        assert self.factoring is not None
        before, after = params[0], rule_move.specs[0].shape
        # What lies there says whether the parameter was factored; of the new one it is foretold.
        was = len(before) > 1 and leaves[0].spec.shape == factored_shape(self.field, before, True)
        name = rule_move.targets[0].path
        will_be = self.factoring.factors(after, self.notes, name)
        actions = factored_actions(self.field, rule_move.actions, before, after, (was, will_be))
        return actions, [factored_shape(self.field, after, will_be)] * len(rule_move.targets)

    @cached_property
    def _kept(self) -> dict[Id, Spec]:
        """What the mirror holds of each parameter that it has one array for; lists aside."""
        kept = {}
        for path, id in self.subtree.paths.items():
            leaf = self.subtree.held.get(path, {}).get("")
            if leaf is not None and not leaf.empty:
                kept[id] = leaf.spec
        return kept

    @cached_property
    def _pairs(self) -> list[tuple[Spec, Spec]]:
        """What the mirror holds of each such parameter, and the parameter."""
        return [(spec, self.state.model[id].spec) for id, spec in self._kept.items()]

    @cached_property
    def _lead(self) -> Shape | None:
        """The axes that all its arrays have in front of their parameters' own."""
        return common_lead([(kept.shape, own.shape) for kept, own in self._pairs])

    def _fill(self, rule_move: Move[Id, Id]) -> Iterator[Move[Leaf, Place]]:
        """The move of what a new parameter gets here."""
        (id,), (fill,) = rule_move.targets, rule_move.actions
        assert isinstance(fill, Fill)
        path = f"{self.prefix}/{self._target(id)}"
        if self.given is not None:
            if not self.given.get(path):
                return  # masked, or absent: where it is due, laying out says so
        elif not self._has_all:
            self._refuse(
                f"`{path}` may be masked, as others of `{self.prefix}` are: give a checkpoint of "
                "the target's form with --like, or else"
            )
            return
        try:
            spec = self._spec_of_new(rule_move.specs[0], id.path)
            # An average, or a copy of the parameters, starts as they do. What an optimizer keeps
            # has a start of its own.
            one = first_value(self.field, fill, spec) if self.in_optimizer else fill
        except Unknown as unknown:
            self._refuse(f"`{path}` {unknown}")
            return
        yield Move((), (self._place(self._target(id)),), (replace(one, spec=spec),), (spec,))

    def _spec_of_new(self, new: Spec, name: str) -> Spec:
        """What is kept here of a new parameter. Raises `Unknown` where that cannot be told."""
        dtype = common_dtype(self._pairs, new)
        if self.factoring is not None:
            factored = self.factoring.factors(new.shape, self.notes, name)
            return Spec(factored_shape(self.field, new.shape, factored), dtype)
        if all(kept.shape == own.shape for kept, own in self._pairs):
            return Spec(new.shape, dtype)
        if self._lead is not None:
            return Spec((*self._lead, *new.shape), dtype)
        if self._pairs and all(kept.shape == () for kept, _ in self._pairs):
            return Spec((), dtype)  # one number for each parameter, as NovoGrad has
        raise Unknown("has a form that does not follow from the parameter's")

    def _branches(self, of_model: Sequence[Move[Id, Id]]) -> Iterator[Move[Leaf, Place]]:
        """The moves of empty nodes that stand for masked branches of the model.

        A hole `mu/d` stands for `d/kernel` and `d/bias`. If rules move both below `a`, and nothing
        else there, then it becomes the hole `mu/a`.
        """
        for branch, hole in self.subtree.holes.items():
            inside, outside = self._around(branch, of_model)
            nodes = branches_of(inside) - branches_of(outside)
            if branch in nodes:
                nodes = {branch}
            if len(nodes) == 1 and not inside & outside:
                yield Move((hole,), (self._place(nodes.pop(), branch=True),))
            else:
                self._refuse(f"`{hole.path}` is masked as a whole, and becomes no whole")

    def _around(self, branch: str, of_model: Sequence[Move[Id, Id]]) -> tuple[set[str], set[str]]:
        """Where rules move the leaves of a branch, and where they move all others."""
        inside, outside = set[str](), set[str]()
        for move in of_model:
            targets = {self._target(id) for id in move.targets}
            for id in move.sources:
                path = self._names.get(id)
                if path is None:
                    continue
                elsewhere = not path.startswith(f"{branch}/")
                (outside if elsewhere else inside).update(targets)
        return inside, outside

    def _target(self, id: Id) -> str:
        """The path of a target below the prefix."""
        # What mirrors the whole of a Linen state has the collections below it, as that one has:
        # `ema/params/d/kernel` and `ema/batch_stats/n/mean`.
        below = self.to.flat and not self.subtree.tree
        return f"{id.collection}/{id.path}" if self.below_collections or below else id.path

    def _place(self, path: str, branch: bool = False, tail: Keys = ()) -> Place:
        full = "/".join([self.prefix, path, *(key.name for key in tail)])
        return Place(path=full, prefix=self._keys, branch=branch, tail=tail)

    @cached_property
    def _keys(self) -> Keys:
        """The keys of the prefix, as any one of the leaves has them."""
        below, leaf = self._any_leaf()
        return prefix_keys(f"{self.prefix}/{below}", leaf)[: len(names_of(self.prefix))]

    def _any_leaf(self) -> tuple[str, Leaf]:
        """One leaf or hole, with its path below the prefix."""
        for path, leaves in self.subtree.held.items():
            for tail, leaf in leaves.items():
                return (f"{path}/{tail}" if tail else path), leaf
        return next(iter(self.subtree.holes.items()))
