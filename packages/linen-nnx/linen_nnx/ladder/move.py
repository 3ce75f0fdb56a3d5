"""Moves a whole training state in memory from stage to stage: the code that converts one on disk.

A `TrainState` of a model with two layers, which the port calls `up` and `down`:

    step                            goes along as it is
    params/Dense_0/kernel           params/up/kernel
    params/Dense_1/kernel           params/down/kernel
    opt_state/0/count               goes along as it is
    opt_state/0/mu/Dense_0/kernel   opt_state/0/mu/up/kernel
    opt_state/0/mu/Dense_1/kernel   opt_state/0/mu/down/kernel
    opt_state/0/nu/...              the same

`params`, `opt_state/0/mu` and `opt_state/0/nu` mirror the model: the paths below them are those of
parameters. `disk.carry` finds such subtrees by what is in them, and says what becomes of each leaf.
Here the arrays are taken out of their containers (dataclasses, tuples, states of optax) and put
back into containers of the same types:

    >>> import jax.numpy as jnp, optax
    >>> from flax import linen as nn, nnx
    >>> from linen_nnx import Ladder, RuleBook, Twin
    >>> class Linen(nn.Module):
    ...     @nn.compact
    ...     def __call__(self, x):
    ...         h = nn.Dense(3, use_bias=False)(x)
    ...         return nn.Dense(2, use_bias=False)(h)
    >>> class Port(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.up = nnx.Linear(2, 3, use_bias=False, rngs=rngs)
    ...         self.down = nnx.Linear(3, 2, use_bias=False, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.down(self.up(x))
    >>> rules = [{"linen": "params/Dense_0/kernel", "nnx": "up/kernel"},
    ...          {"linen": "params/Dense_1/kernel", "nnx": "down/kernel"}]
    >>> ladder = Ladder(Twin(Linen, Port, lambda: (jnp.ones((1, 2)),)),
    ...                 RuleBook.from_dict({"version": 1, "rules": rules}))
    >>> params = {"Dense_0": {"kernel": jnp.ones((2, 3))}, "Dense_1": {"kernel": jnp.ones((3, 2))}}
    >>> moved = ladder.move(optax.adam(0.1).init(params), "linen", "nnx")
    >>> type(moved[0]).__name__, sorted(moved[0].mu), moved[0].mu["down"]["kernel"].shape
    ('ScaleByAdamState', ['down', 'up'], (3, 2))
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.core import FrozenDict

from linen_nnx.book.moves import Move
from linen_nnx.book.plan import RuleError
from linen_nnx.book.specs import Spec
from linen_nnx.book.stages import Forms
from linen_nnx.disk.carry import Carried, carry_beside
from linen_nnx.disk.leaves import DICT, SEQUENCE, Key, Leaf
from linen_nnx.disk.state import Form, Id, State
from linen_nnx.ladder.forms import FittedBook, part_of

_ROOT = "tree"  # the name of a tree that itself mirrors the model


class _Node(NamedTuple):
    """An array of a tree in memory, or an empty node, with its keys."""

    keys: tuple[Key, ...]
    value: Any

    @property
    def path(self) -> str:
        return _path(self.keys)

    @property
    def leaf(self) -> Leaf:
        """The node as `disk` knows leaves."""
        if not _is_leaf(self.value):
            return Leaf(self.keys, "Dict")
        return _described(self.keys, Spec.of(_array(self.value)))

    @property
    def is_array(self) -> bool:
        """Whether it is an array with axes, and not a count or an empty node."""
        return _is_leaf(self.value) and bool(_array(self.value).shape)


def move(
    book: FittedBook, tree: Any, before: Forms, after: Forms, name: str, say: Callable[[str], None]
) -> Any:
    """The tree with each subtree that mirrors the model in other forms.

    Args:
      book: the rules, fitted to the model.
      tree: any pytree; containers keep their types.
      before: the form of each part in the tree; `after`: the form that each part gets.
      name: the stage that the tree goes to, for messages.
      say: is told what was assumed, and which arrays go along as they are.

    Raises:
      RuleError: with everything that has no home, or may not go along as it is.
    """
    model: dict[Id, Leaf] = {}
    for leaf, spec in book.abstract(before).items():
        model[_id(leaf)] = _described((), spec)
    # A mirror is known by the path of its root. Where the tree itself is one, as `params` handed in
    # alone is, its root has no path: then it gets one level more.
    inside = {_ROOT: tree}
    nodes = _by_path(inside)
    if any(f"{_ROOT}/{id.path}" in nodes for id in model):
        return _moved(book, inside, nodes, model, before, after, name, say)[_ROOT]
    return _moved(book, tree, _by_path(tree), model, before, after, name, say)


def _by_path(tree: Any) -> dict[str, _Node]:
    return {node.path: node for node in _nodes(tree, ())}


def _moved(
    book: FittedBook,
    tree: Any,
    nodes: Mapping[str, _Node],
    model: dict[Id, Leaf],
    before: Forms,
    after: Forms,
    name: str,
    say: Callable[[str], None],
) -> Any:
    # The moves say what becomes of each leaf; the side only shows in advice, as in which side of a
    # rule to write.
    side = "nnx" if "nnx" in before.values() else "linen"
    rest = {path: node.leaf for path, node in nodes.items()}
    item = State(Form(side, "memory"), "memory", rest=rest)
    whole = State(item.form, item.layout, model)
    of_model = list(_of_model(book, before, after))
    carried = carry_beside(item, whole, Form(side, name), of_model, None)
    if carried is None:
        lost = [f"`{path}` mirrors nothing of the model" for path in nodes if nodes[path].is_array]
        if lost:
            raise RuleError(f"The tree cannot go to stage {name}", lost)
        return tree  # counts and empty states alone, as plain SGD has
    for note in carried.notes:
        say(note)
    if carried.as_they_are:
        say(f"arrays that mirror nothing go along as they are: {', '.join(carried.as_they_are)}")
    return _rebuilt(tree, (), _mirrors(tree, nodes, carried))


def _mirrors(tree: Any, nodes: Mapping[str, _Node], carried: Carried) -> dict[str, dict[str, Any]]:
    """`{path of a mirror: its new subtree}`."""
    mirrors: dict[str, dict[str, Any]] = {}
    for one in carried.moves:
        arrays = one.run([nodes[leaf.path].value for leaf in one.sources])
        for place, array in zip(one.targets, arrays, strict=True):
            if not place.mirrored:
                continue
            mirror = mirrors.setdefault(_path(place.prefix), {})
            *above, last = place.mirrored
            node = _branch(mirror, above)
            if place.tail:
                # SM3 keeps a list for each parameter: the container is one like the old one, into
                # which the values come one after another.
                old = _at(tree, one.sources[0].keys[: -len(place.tail)])
                container = node.get(last, old)
                node[last] = _rebuilt(container, (), {_path(place.tail): array})
            else:
                node[last] = array
    return mirrors


def _of_model(book: FittedBook, before: Forms, after: Forms) -> Iterator[Move[Id, Id]]:
    """What becomes of the model, leaf by leaf."""
    for name in book.abstract(before):
        part = part_of(name, before)
        if before[part] == after[part]:
            yield Move((_id(name),), (_id(name),))
    for side in ("linen", "nnx"):
        for way in book.ways[side]:
            if before[way.part] != after[way.part] == side:
                sources = tuple(map(_id, way.move.sources))
                targets = tuple(map(_id, way.move.targets))
                yield Move(sources, targets, way.move.actions, way.move.specs, way.move.rule)


def _id(name: str) -> Id:
    """The leaf `collection/path` as `disk` knows it."""
    collection, _, path = name.partition("/")
    return Id(collection, path)


def _nodes(tree: Any, keys: tuple[Key, ...]) -> Iterator[_Node]:
    """The leaves and the empty nodes of a tree."""
    children = _children(tree)
    if _is_leaf(tree) or not children:
        yield _Node(keys, tree)
        return
    for key, child in children:
        yield from _nodes(child, (*keys, key))


def _rebuilt(tree: Any, keys: tuple[Key, ...], replaced: Mapping[str, Any]) -> Any:
    """The tree with the nodes at some paths replaced."""
    path = _path(keys)
    if path in replaced:
        new = replaced[path]
        return FrozenDict(new) if isinstance(tree, FrozenDict) else new
    children = _children(tree)
    if _is_leaf(tree) or not children:
        return tree
    _, structure = jax.tree.flatten(tree, is_leaf=lambda node: node is not tree)
    built = [_rebuilt(child, (*keys, key), replaced) for key, child in children]
    return structure.unflatten(built)


def _children(tree: Any) -> list[tuple[Key, Any]]:
    """The children of a container, with their keys."""
    # Everything below the root counts as a leaf, so that jax opens one level and no more.
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    return [(_key(path[0]), child) for path, child in found if path]


def _key(entry: Any) -> Key:
    name = jax.tree_util.keystr((entry,), simple=True)
    return Key(name, SEQUENCE if isinstance(entry, jax.tree_util.SequenceKey) else DICT)


def _path(keys: Sequence[Key]) -> str:
    return "/".join([key.name for key in keys])


def _branch(tree: dict[str, Any], path: Sequence[str]) -> dict[str, Any]:
    """The node of nested dicts at a path, made if need be."""
    for name in path:
        tree = tree.setdefault(name, {})
    return tree


def _at(tree: Any, keys: tuple[Key, ...]) -> Any:
    """The node of a tree below some keys."""
    for key in keys:
        tree = dict(_children(tree))[key]
    return tree


def _is_leaf(value: Any) -> bool:
    return jax.tree_util.all_leaves([value])


def _array(value: Any) -> Any:
    return value if hasattr(value, "shape") else np.asarray(value)


def _described(keys: tuple[Key, ...], spec: Spec) -> Leaf:
    """A leaf of `disk` for an array in memory."""
    kind = {"zarr_format": 3, "data_type": str(spec.dtype), "shape": list(spec.shape)}
    return Leaf(keys, "jax.Array", zarr=kind)
