"""Lays a translated training state out as the tree that a stock reader of its form expects.

What `carry.py` says of a leaf is its place. Where a place lies on disk depends on the layout:

    place                        as a TrainState of Linen    as states of nnx
    d/kernel in `params`         params/d/kernel             model/d/kernel/value
    step                         step                        optimizer/step/value
    d/kernel in the mirror `mu`  opt_state/0/mu/d/kernel     optimizer/opt_state/0/mu/d/kernel/value

A model that was saved without anything beside it is `variables` there, and the bare state of the
model here. At a stage of the ladder the tree is the same as before, with other names in it.

Three things the source cannot tell: which levels of an optimizer's chain are tuples (nnx writes
their indices as names), where optax has an empty state (nnx saves none), and which dtype the step
has. They come from a given tree: one that the result must be `like`, or its own origin. The leaf of
that tree that is at a place is called the *mould* of the leaf that goes there.
"""

from collections.abc import Sequence

from linen_nnx.book.actions import Cast
from linen_nnx.book.moves import Move, targets_of
from linen_nnx.book.plan import RuleError
from linen_nnx.book.specs import Spec
from linen_nnx.disk.leaves import (
    DICT,
    SEQUENCE,
    Keys,
    Leaf,
    common_sharding,
    dict_keys,
    make_key,
    repeated,
)
from linen_nnx.disk.places import Place
from linen_nnx.disk.state import OPTIMIZER, Form, Id, State


def lay_out(
    moves: Sequence[Move[Leaf, Place]],
    source: Form,
    to: Form,
    like: State | None = None,
    origin: State | None = None,
) -> list[Move[Leaf, Leaf]]:
    """The moves on disk, in the order of `like`, of `origin`, or of the moves given.

    Args:
      moves: what becomes of each leaf of a state in the form `source`.
      to: the form of the result.
      like: a tree that the result must equal, leaf for leaf.
      origin: a tree that the state once was, if there is no `like`.

    Raises:
      RuleError: if the result differs from `like`, or if names collide.
    """
    given = _by_place(like or origin, to)
    layout = _Layout(moves, source, to, given, strict=like is not None)
    laid_out = [layout.laid_out(move) for move in moves]
    laid_out += layout.left_in_given()
    problems = layout.problems
    for name, count in repeated([leaf.name for leaf in targets_of(laid_out)]):
        problems.append(f"{count} leaves would have the name `{name}` on disk")
    if problems:
        wanted = f"as {to}" if like is None else "like the given tree (--like), leaf for leaf"
        raise RuleError(f"The result cannot be laid out {wanted}", problems)
    if given:
        numbers = {leaf.name: number for number, leaf in enumerate(given.values())}
        laid_out.sort(key=lambda move: _first_number(move, numbers))
    return laid_out


def _first_number(move: Move[Leaf, Leaf], numbers: dict[str, int]) -> int:
    """The smallest number of a target's name; what the given tree lacks comes first."""
    return min((numbers.get(leaf.name, 0) for leaf in move.targets), default=0)


class _Layout:
    """One result, with the leaves of the given tree that nothing fills yet."""

    def __init__(
        self,
        moves: Sequence[Move[Leaf, Place]],
        source: Form,
        to: Form,
        given: dict[Id | str, Leaf],
        strict: bool,
    ) -> None:
        """`strict`: whether the result must equal the given tree."""
        self.source, self.to, self.strict = source, to, strict
        self.problems: list[str] = []
        self._open = dict(given)
        places = list(targets_of(moves))
        self._has_optimizer = any(place.in_optimizer for place in places)
        self._has_rest = any(place.id is None for place in places)
        # New arrays lie where the others do: a restore puts them on the same devices.
        self._sharding = _any_sharding(moves)
        # Plain SGD has a state of empty nodes alone, of which nnx keeps nothing: then no leaf in
        # the source says that there is an optimizer.
        self._hollow = all(leaf.empty for key, leaf in given.items() if _is_of_optimizer(key))

    def laid_out(self, move: Move[Leaf, Place]) -> Move[Leaf, Leaf]:
        """The move with a leaf for each place. A step may have to be cast on the way."""
        actions, specs = move.actions, move.specs
        targets: list[Leaf] = []
        for number, place in enumerate(move.targets):
            mould = self._mould(place)
            if mould is None and self._is_lost(move, place):
                continue
            keys = mould.keys if mould else self._keys(place)
            kind = self._new_kind(move, place, mould)
            if kind is not None:
                value_type, dtype = kind
                actions, specs = (Cast(dtype),), (Spec((), dtype),)
                leaf = self._scalar(keys, value_type)
            elif move.sources and not move.actions:
                leaf = move.sources[0].at(keys)
            else:
                sharding = common_sharding(move.sources) or self._sharding
                leaf = _array(keys, move.specs[number].shape, sharding)
            # What lies outside of the training state may be more than the given tree has.
            is_extra = mould is None and place.path.startswith("../")
            if self.strict and not is_extra:
                due = specs[number] if actions else None
                self.problems += _unlike(leaf, due, mould)
            targets.append(leaf)
        return Move(move.sources, tuple(targets), actions, specs, move.rule)

    def left_in_given(self) -> list[Move[Leaf, Leaf]]:
        """The moves that fill what is left of the given tree: its empty nodes, from nothing."""
        moves: list[Move[Leaf, Leaf]] = []
        for key, mould in self._open.items():
            # The empty states of an optimizer are due where the result has an optimizer.
            wanted = self._has_optimizer or self._hollow or not _is_of_optimizer(key)
            if mould.empty and wanted:
                moves.append(Move((), (mould,)))
            elif self.strict:
                self.problems.append(f"nothing fills `{mould.path}` of the tree to be like")
        return moves

    def _mould(self, place: Place) -> Leaf | None:
        """The leaf of the given tree at a place, which then counts as filled."""
        if not self._open:
            return None
        # A field may lie beside the training state in one layout and in it in the other.
        return self._open.pop(_key(place, self.to), None) or self._open.pop(
            f"../{place.path}", None
        )

    def _is_lost(self, move: Move[Leaf, Place], place: Place) -> bool:
        """Whether a leaf is an empty state of an optimizer, of which nnx.Optimizer keeps none.

        Masked parameters are empty nodes as well, and these it keeps.
        """
        empty = bool(move.sources) and move.sources[0].empty
        return empty and place.in_optimizer and not self.to.flat and not place.mirrored

    def _new_kind(
        self, move: Move[Leaf, Place], place: Place, mould: Leaf | None
    ) -> tuple[str, str] | None:
        """The value type and dtype that the step must get; None if it has them, and for others."""
        if place.path != "step" or not move.sources or move.actions:
            return None
        leaf = move.sources[0]
        if leaf.zarr is None or leaf.spec.shape != ():
            return None
        own = str(leaf.spec.dtype)
        if mould is not None:
            kind = mould.value_type, str(mould.spec.dtype)
        elif not self.to.flat and self._has_optimizer:
            kind = "jax.Array", "uint32"  # what nnx.Optimizer has
        elif own == "uint32" and not self.to.stage:
            kind = "scalar", "int64"  # what TrainState.create has
        else:
            return None
        return kind if "int" in own and kind[1] != own else None

    def _scalar(self, keys: Keys, value_type: str) -> Leaf:
        """A number as Orbax saves one of some type: a Python number has no sharding."""
        if value_type == "jax.Array":
            return _array(keys, (), self._sharding)
        return Leaf(keys, value_type)

    def _keys(self, place: Place) -> Keys:
        """The key path of a leaf that no given tree settles."""
        if place.id is not None:
            return self._keys_in_model(place.id)
        prefix, mirrored = place.prefix, place.mirrored
        in_optimizer = place.in_optimizer or (self._has_optimizer and place.path == "step")
        if self.to.flat:
            if not self.source.flat and in_optimizer:
                prefix = _with_sequences(prefix)
            return (*prefix, *dict_keys(*mirrored), *place.tail)
        if not (in_optimizer or mirrored):
            return (*prefix, *place.tail)
        names = [key.name for key in prefix]
        if in_optimizer:
            names.insert(0, "optimizer")
        # A masked branch is an empty node; everything else in nnx is a variable in its box.
        box = () if place.branch else ("value",)
        return (*dict_keys(*names, *mirrored, *box), *place.tail)

    def _keys_in_model(self, id: Id) -> Keys:
        collection, path = id
        if self.to.flat:
            return dict_keys(collection, *path.split("/"))
        # With anything beside it the model has a level of its own: {"model": ..., "optimizer": ...}
        level = ("model",) if self._has_rest else ()
        return dict_keys(*level, *path.split("/"), "value")


def _any_sharding(moves: Sequence[Move[Leaf, Place]]) -> str | None:
    """The sharding of the first source that has one."""
    for move in moves:
        for leaf in move.sources:
            if leaf.sharding:
                return leaf.sharding
    return None


def _is_of_optimizer(key: Id | str) -> bool:
    """Whether a leaf of a given tree is one of the optimizer's state."""
    return isinstance(key, str) and key.split("/")[0] == OPTIMIZER


def _array(keys: Keys, shape: tuple[int, ...], sharding: str | None) -> Leaf:
    """An array with new bytes.

    In a tree of numpy arrays it is one of those: Orbax restores no `jax.Array` that has no
    sharding, unless it is told one.
    """
    if sharding is None:
        return Leaf(keys, "np.ndarray")
    return Leaf(keys, "jax.Array", sharding=sharding, write_shape=shape)


def _with_sequences(keys: Keys) -> Keys:
    """The keys of a chain of optax, with digits as indices: chains are tuples, and nnx has names.

    Example:
      >>> _with_sequences(dict_keys("opt_state", "0"))
      (Key(name='opt_state', kind=2), Key(name='0', kind=1))
    """
    return tuple(make_key(key.name, SEQUENCE if key.name.isdigit() else DICT) for key in keys)


def _unlike(leaf: Leaf, due: Spec | None, mould: Leaf | None) -> list[str]:
    """How a target differs from the leaf of the tree that it must be like.

    `due`: the shape and dtype that actions give it; None where it keeps its source's.
    """
    if mould is None:
        return [f"the tree to be like has no `{leaf.path}`"]
    if mould.zarr is not None and (due is not None or leaf.zarr is not None):
        spec = due or leaf.spec
        return [] if spec.same(mould.spec) else [f"`{leaf.path}` would be {spec}, not {mould.spec}"]
    if leaf.value_type != mould.value_type:
        return [f"`{leaf.path}` would be a {leaf.value_type}, not a {mould.value_type}"]
    return []


def _key(place: Place, to: Form) -> Id | str:
    """What a place is called in `_by_place`."""
    if place.id is None:
        return place.path
    return place.id if to.flat else Id("", place.id.path)


def _by_place(state: State | None, to: Form) -> dict[Id | str, Leaf]:
    """The leaves of a given tree by what `_key` says of a place; empty if none is given."""
    if state is None:
        return {}
    # A state in stock nnx form does not say the collections of its leaves.
    model = {id if to.flat else Id("", id.path): leaf for id, leaf in state.model.items()}
    return {**model, **state.rest}
