"""Lays a translated training state out as the tree that a stock reader of its form expects.

Linen: `TrainState`, or variables; nnx: `{"model": nnx.State, "optimizer": nnx.State of
nnx.Optimizer}`, or the model's state alone; a stage of the ladder: the same tree as before.
What the source cannot tell (the key types of an optimizer chain, its empty nodes, the dtype of
the step) comes from a given tree: one that the result must be `like`, or its own origin.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from linen_nnx.book.ops import Cast, Spec
from linen_nnx.book.plan import RuleError
from linen_nnx.disk.leaves import DICT, SEQUENCE, Key, Leaf, common_sharding, make_key, repeated
from linen_nnx.disk.moves import Move, Place
from linen_nnx.disk.state import OPTIMIZER, Form, Id, State

Change: TypeAlias = Move[Leaf, Leaf]
"""A move on disk: target leaves have keys."""


def lay_out(
    moves: Sequence[Move[Leaf, Place]],
    source: Form,
    to: Form,
    like: State | None = None,
    origin: State | None = None,
) -> list[Change]:
    """The changes on disk, in the order of `like`, of `origin`, or of the moves.

    Raises `RuleError` if the result differs from `like`, or if names collide.
    """
    given = _places(like or origin, to)
    order = {leaf.name: number for number, leaf in enumerate(given.values())}
    # Plain SGD has a state of empty nodes alone, of which nnx keeps nothing.
    hollow = all(mould.empty for key, mould in given.items() if _is_of_optimizer(key))
    places = [place for move in moves for place in move.targets]
    context = _Context(
        source,
        to,
        optimizer=any(place.in_optimizer for place in places),
        nested=any(place.id is None for place in places),
        sharding=next((s.sharding for m in moves for s in m.sources if s.sharding), None),
    )
    problems: list[str] = []
    changes: list[Change] = []
    for move in moves:
        targets: list[Leaf] = []
        change: Change = Move(move.sources, (), move.actions, move.specs, move.rule)
        for number, place in enumerate(move.targets):
            mould = None
            if given:
                mould = given.pop(_key(place, to), None) or given.pop(f"../{place.path}", None)
            empty = bool(move.sources) and move.sources[0].empty
            if mould is None and empty and place.in_optimizer and not (to.flat or place.mirrored):
                continue  # nnx.Optimizer keeps masked parameters, but has no empty states
            leaf, change = context.target(change, place, mould, number)
            if like is not None and not (mould is None and place.path.startswith("../")):
                problems += _unlike(leaf, change, number, mould)
            targets.append(leaf)
        changes.append(change._replace(targets=tuple(targets)))
    for key, mould in given.items():
        if mould.empty and (context.optimizer or hollow or not _is_of_optimizer(key)):
            changes.append(Move((), (mould,)))
        elif like is not None:
            problems.append(f"nothing fills `{mould.path}` of the tree to be like")
    names = [leaf.name for change in changes for leaf in change.targets]
    problems += [f"{n} leaves would have the name `{name}` on disk" for name, n in repeated(names)]
    if problems:
        wanted = f"as {to}" if like is None else "like the given tree (--like), leaf for leaf"
        raise RuleError(f"The result cannot be laid out {wanted}", problems)
    if order:
        changes.sort(key=lambda c: min((order.get(t.name, 0) for t in c.targets), default=0))
    return changes


def _is_of_optimizer(key: Id | str) -> bool:
    """Whether a leaf of a given tree is one of the optimizer's state."""
    return isinstance(key, str) and key.split("/")[0] == OPTIMIZER


@dataclass(frozen=True)
class _Context:
    """What the place of one leaf depends on beside the leaf."""

    source: Form
    to: Form
    optimizer: bool
    """Whether the result holds an optimizer's state."""
    nested: bool
    """Whether it holds anything beside the model."""
    sharding: str | None

    def target(
        self, change: Change, place: Place, mould: Leaf | None, number: int
    ) -> tuple[Leaf, Change]:
        """One target leaf, and the change that makes it (a step may have to be cast)."""
        sources = change.sources
        keys = mould.keys if mould else self._keys(place)
        if sources and not change.actions:
            kind = self._step_kind(place, sources[0], mould)
            if kind is None:
                return sources[0].at(keys), change
            cast = change._replace(actions=(Cast(kind[1]),), specs=(Spec((), kind[1]),))
            if kind[0] != "jax.Array":
                return Leaf(keys, kind[0]), cast
            return self._array(keys, (), self.sharding), cast
        sharding = common_sharding(sources) or self.sharding
        return self._array(keys, change.specs[number].shape, sharding), change

    def _array(self, keys: tuple[Key, ...], shape: tuple[int, ...], sharding: str | None) -> Leaf:
        """An array with new bytes.

        In a tree of numpy arrays it is one of those: Orbax restores no `jax.Array` that has no
        sharding, unless it is told one.
        """
        if sharding is None:
            return Leaf(keys, "np.ndarray")
        return Leaf(keys, "jax.Array", sharding=sharding, write_shape=shape)

    def _step_kind(self, place: Place, leaf: Leaf, mould: Leaf | None) -> tuple[str, str] | None:
        """The value type and dtype that the step must get, if they are not its own."""
        if place.path != "step" or leaf.zarr is None or leaf.spec.shape != ():
            return None
        own = str(leaf.spec.dtype)
        if mould is not None:
            kind = mould.value_type, str(mould.spec.dtype)
        elif not self.to.flat and self.optimizer:
            kind = "jax.Array", "uint32"  # what nnx.Optimizer has
        elif own == "uint32" and not self.to.stage:
            kind = "scalar", "int64"  # what TrainState.create has
        else:
            return None
        return kind if "int" in own and kind[1] != own else None

    def _keys(self, place: Place) -> tuple[Key, ...]:
        """The key path of a leaf that no given tree settles."""
        if place.id is not None:
            collection, path = place.id
            if self.to.flat:
                return _dicts(collection, *path.split("/"))
            return _dicts(*["model"] * self.nested, *path.split("/"), "value")
        prefix, mirrored = place.prefix, place.mirrored
        in_optimizer = place.in_optimizer or (self.optimizer and place.path == "step")
        if not self.to.flat and (in_optimizer or mirrored):
            names = ["optimizer"] * in_optimizer + [key.name for key in prefix]
            box = ["value"] * (not place.branch)
            return (*_dicts(*names, *mirrored, *box), *place.tail)
        if self.to.flat and not self.source.flat and in_optimizer:
            # Chains are tuples, and a state of nnx has digits for their indices.
            kinds = (SEQUENCE if key.name.isdigit() else DICT for key in prefix)
            prefix = tuple(
                make_key(key.name, kind) for key, kind in zip(prefix, kinds, strict=True)
            )
        return (*prefix, *_dicts(*mirrored), *place.tail)


def _dicts(*names: str) -> tuple[Key, ...]:
    return tuple([make_key(name, DICT) for name in names])


def _unlike(leaf: Leaf, change: Change, number: int, mould: Leaf | None) -> list[str]:
    """How a target differs from the leaf of the tree that it must be like."""
    if mould is None:
        return [f"the tree to be like has no `{leaf.path}`"]
    if mould.zarr is not None and (change.actions or leaf.zarr is not None):
        spec = change.specs[number] if change.actions else leaf.spec
        return [] if spec.same(mould.spec) else [f"`{leaf.path}` would be {spec}, not {mould.spec}"]
    if leaf.value_type != mould.value_type:
        return [f"`{leaf.path}` would be a {leaf.value_type}, not a {mould.value_type}"]
    return []


def _key(place: Place, to: Form) -> Id | str:
    if place.id is None:
        return place.path
    return place.id if to.flat else Id("", place.id.path)


def _places(state: State | None, to: Form) -> dict[Id | str, Leaf]:
    """The leaves of a given tree by what `_key` says of a place; empty if none is given."""
    if state is None:
        return {}
    model = {id if to.flat else Id("", id.path): leaf for id, leaf in state.model.items()}
    return {**model, **state.rest}
