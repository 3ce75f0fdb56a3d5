"""Moves a whole training state in memory from stage to stage: the code that converts one on disk.

Of a `TrainState` for a model of one `Dense`, to a stage where the port calls it `out`:

    step                            goes along as it is
    params/Dense_0/kernel           params/out/kernel
    opt_state/0/count               goes along as it is
    opt_state/0/mu/Dense_0/kernel   opt_state/0/mu/out/kernel
    opt_state/0/nu/Dense_0/kernel   opt_state/0/nu/out/kernel

`params`, `opt_state/0/mu` and `opt_state/0/nu` mirror the model; `disk.carry` finds such subtrees
by what is in them and says what becomes of each leaf. Here they are taken out of their containers
(dataclasses, tuples, optax's states) and put back, whatever these are.
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
from linen_nnx.disk.carry import carry_beside
from linen_nnx.disk.leaves import DICT, SEQUENCE, Key, Leaf
from linen_nnx.disk.state import Form, Id, State
from linen_nnx.ladder.forms import Book, part_of

_ROOT = "tree"  # the name of a tree that itself mirrors the model


class _Node(NamedTuple):
    """An array of a tree in memory, or an empty node, with its keys."""

    keys: tuple[Key, ...]
    value: Any

    @property
    def path(self) -> str:
        return "/".join(key.name for key in self.keys)

    @property
    def leaf(self) -> Leaf:
        """It as `disk` knows leaves."""
        if not _is_leaf(self.value):
            return Leaf(self.keys, "Dict")
        return _described(self.keys, Spec.of(_array(self.value)))


def move(
    book: Book, tree: Any, before: Forms, after: Forms, name: str, say: Callable[[str], None]
) -> Any:
    """The tree with each subtree that mirrors the model in the forms `after`.

    Args:
      book: the rules, fitted to the model.
      tree: any pytree; containers keep their types.
      name: the stage that it goes to, for messages.
      say: is told what was assumed, and which arrays go along as they are.

    Raises:
      RuleError: with everything that has no home, or may not go along as it is.
    """
    inside = {_ROOT: tree}
    nodes = {node.path: node for node in _nodes(inside, ())}
    model = {Id(*n.split("/", 1)): _described((), s) for n, s in book.abstract(before).items()}
    if {f"{_ROOT}/{id.path}" for id in model} & nodes.keys():
        return _moved(book, inside, nodes, model, before, after, name, say)[_ROOT]
    nodes = {node.path: node for node in _nodes(tree, ())}
    return _moved(book, tree, nodes, model, before, after, name, say)


def _moved(
    book: Book,
    tree: Any,
    nodes: Mapping[str, _Node],
    model: dict[Id, Leaf],
    before: Forms,
    after: Forms,
    name: str,
    say: Callable[[str], None],
) -> Any:
    side = "nnx" if "nnx" in before.values() else "linen"
    item = State(Form(side, "memory"), "memory", rest={p: node.leaf for p, node in nodes.items()})
    whole = State(item.form, item.layout, model)
    of_model = list(_of_model(book, before, after))
    carried = carry_beside(item, whole, Form(side, name), of_model, None)
    if carried is None:
        lost = [f"`{p}` mirrors nothing of the model" for p, n in nodes.items() if _solid(n)]
        if lost:
            raise RuleError(f"The tree cannot go to stage {name}", lost)
        return tree
    for note in carried.notes:
        say(note)
    if carried.as_they_are:
        say(f"arrays that mirror nothing go along as they are: {', '.join(carried.as_they_are)}")
    mirrors: dict[str, dict[str, Any]] = {}
    for one in carried.moves:
        arrays = one.run([nodes[leaf.path].value for leaf in one.sources])
        for place, array in zip(one.targets, arrays, strict=True):
            if place.mirrored:
                prefix = "/".join(key.name for key in place.prefix)
                mirror = mirrors.setdefault(prefix, {})
                if place.tail:
                    node = _at(tree, one.sources[0].keys[: -len(place.tail)])
                    _put_in(mirror, place.mirrored, node, place.tail, array)
                else:
                    _put(mirror, place.mirrored, array)
    return _rebuilt(tree, (), mirrors)


def _of_model(book: Book, before: Forms, after: Forms) -> Iterator[Move[Id, Id]]:
    """What becomes of the model, leaf for leaf."""
    for name in book.abstract(before):
        part = part_of(name, before)
        if before[part] == after[part]:
            id = Id(*name.split("/", 1))
            yield Move((id,), (id,))
    for side in ("linen", "nnx"):
        for way in book.ways[side]:
            if before[way.part] != after[way.part] == side:
                sources = tuple(Id(*name.split("/", 1)) for name in way.move.sources)
                targets = tuple(Id(*name.split("/", 1)) for name in way.move.targets)
                yield Move(sources, targets, way.move.actions, way.move.specs, way.move.rule)


def _nodes(tree: Any, keys: tuple[Key, ...]) -> Iterator[_Node]:
    """The leaves and the empty nodes of a tree."""
    children = _children(tree)
    if _is_leaf(tree) or not children:
        yield _Node(keys, tree)
        return
    for key, child in children:
        yield from _nodes(child, (*keys, key))


def _rebuilt(tree: Any, keys: tuple[Key, ...], mirrors: Mapping[str, Any]) -> Any:
    """The tree with the nodes at some paths replaced."""
    path = "/".join(key.name for key in keys)
    if path in mirrors:
        new = mirrors[path]
        return FrozenDict(new) if isinstance(tree, FrozenDict) else new
    children = _children(tree)
    if _is_leaf(tree) or not children:
        return tree
    _, structure = jax.tree.flatten(tree, is_leaf=lambda node: node is not tree)
    return structure.unflatten([_rebuilt(child, (*keys, key), mirrors) for key, child in children])


def _children(tree: Any) -> list[tuple[Key, Any]]:
    """The children of a container, with their keys."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)
    return [(_key(path[0]), child) for path, child in found if path]


def _key(entry: Any) -> Key:
    name = jax.tree_util.keystr((entry,), simple=True)
    return Key(name, SEQUENCE if isinstance(entry, jax.tree_util.SequenceKey) else DICT)


def _put(tree: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value


def _put_in(
    tree: dict[str, Any], path: Sequence[str], old: Any, tail: tuple[Key, ...], value: Any
) -> None:
    """Puts one of several values that are kept for a parameter, in a container like the old one."""
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    name = "/".join(key.name for key in tail)
    node = tree.get(path[-1], old)
    tree[path[-1]] = _rebuilt(node, (), {name: value})


def _at(tree: Any, keys: tuple[Key, ...]) -> Any:
    """The node of a tree below some keys."""
    for key in keys:
        tree = dict(_children(tree))[key]
    return tree


def _is_leaf(value: Any) -> bool:
    return jax.tree_util.all_leaves([value])


def _array(value: Any) -> Any:
    return value if hasattr(value, "shape") else np.asarray(value)


def _solid(node: _Node) -> bool:
    return _is_leaf(node.value) and bool(_array(node.value).shape)


def _described(keys: tuple[Key, ...], spec: Spec) -> Leaf:
    """A leaf of `disk` for an array in memory."""
    kind = {"zarr_format": 3, "data_type": str(spec.dtype), "shape": list(spec.shape)}
    return Leaf(keys, "jax.Array", zarr=kind)
