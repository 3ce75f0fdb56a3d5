"""Items of a step beside the training state's own: averages, or an optimizer's state by itself.

    Composite(state=..., ema=...)                        `ema` mirrors the parameters of `state`
    Composite(model_state=..., optimizer_state=...)      `--item model_state`: the other has moments

Each is carried by the rules of the training state's model, and stays an item of its own.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from linen_nnx.disk.layouts import Change
from linen_nnx.disk.leaves import DICT, SEQUENCE, Key, Leaf, make_key
from linen_nnx.disk.sources import Source
from linen_nnx.disk.state import OPTIMIZER, Form, State, without_boxes
from linen_nnx.disk.store import is_item


def items_beside(source: Source) -> dict[str, Path]:
    """The items of the chosen step that are no part of the training state's, by name."""
    return {path.name: path for path in source.beside if path.is_dir() and is_item(path)}


def source_of(source: Source, path: Path) -> Source:
    """An item of a step as a source of its own."""
    return replace(source, paths=(path,), names=(path.name,), said=None, passed=())


def head_of(name: str, leaves: Sequence[Leaf], side: str) -> tuple[Key, ...]:
    """Where an item's tree would lie in a whole training state.

    An optimizer's state lies below `opt_state`, as a chain of optax does by itself (a tuple, or
    one state with a `count`); anything else below the item's name.
    """
    tops = {leaf.keys[0] for leaf in leaves}
    names = {key.name for key in tops}
    above = ("optimizer",) if side == "nnx" else ()
    if OPTIMIZER in names:
        return _dicts(*above)
    is_chain = all(key.kind == SEQUENCE or key.name.isdigit() for key in tops)
    if is_chain or "count" in names:
        return _dicts(*above, OPTIMIZER)
    return _dicts(name)


def head_in(head: tuple[Key, ...], side: str) -> tuple[Key, ...]:
    """The head that an item has on the other side."""
    if not is_optimizer(head):
        return head
    below = tuple(key for key in head if key.name != "optimizer")
    return (*(_dicts("optimizer") if side == "nnx" else ()), *below)


def without_head(change: Change, sources: int, targets: int) -> Change:
    """A change with the first keys of its leaves taken off."""
    return change._replace(
        sources=tuple([leaf.at(leaf.keys[sources:]) for leaf in change.sources]),
        targets=tuple([leaf.at(leaf.keys[targets:]) for leaf in change.targets]),
    )


def is_optimizer(head: Sequence[Key]) -> bool:
    """Whether an item with such a head is an optimizer's state."""
    return not head or head[0].name == "optimizer" or head[-1].name == OPTIMIZER


def read_beside(leaves: Sequence[Leaf], head: tuple[Key, ...], form: Form) -> State:
    """An item's tree as a state without a model. The leaves' keys get the head in front."""
    placed = [leaf.at((*head, *leaf.keys)) for leaf in leaves]
    rest = {}
    for names, leaf in without_boxes(placed, lambda path: False):
        above = names[:1] == ("optimizer",) and form.side == "nnx"
        rest["/".join(names[1:] if above else names)] = leaf
    return State(form, "an item beside the training state", {}, rest)


def _dicts(*names: str) -> tuple[Key, ...]:
    return tuple([make_key(name, DICT) for name in names])
