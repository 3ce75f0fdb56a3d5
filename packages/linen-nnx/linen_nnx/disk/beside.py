"""Items of a step beside the training state's own: averages, or an optimizer's state by itself.

    Composite(state=..., ema=...)                        `ema` mirrors the parameters of `state`
    Composite(model_state=..., optimizer_state=...)      `--item model_state`: the other has moments

Each is carried by the rules of the training state's model, and stays an item of its own.

To be carried, an item is placed where it would lie in a whole training state: its leaves get a
head, the keys in front of their own. On the other side the head is another, and comes off again:

    item `ema`, of Linen     fc/kernel      head (ema)         ema/fc/kernel
    the result, of nnx       fc/kernel      head (ema)         ema/fc/kernel
    an optimizer, of nnx     0/mu/fc/...    head (optimizer opt_state)
                                                               optimizer/opt_state/0/mu/fc/...
    the result, of Linen     0/mu/fc/...    head (opt_state)   opt_state/0/mu/fc/...
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from linen_nnx.book.moves import Move
from linen_nnx.disk.item import is_item
from linen_nnx.disk.leaves import SEQUENCE, Key, Keys, Leaf, dict_keys
from linen_nnx.disk.sources import Source
from linen_nnx.disk.state import OPTIMIZER, Form, State, without_boxes


def items_beside(source: Source) -> dict[str, Path]:
    """The items of the chosen step that are no part of the training state's, by name."""
    items = {}
    for path in source.beside:
        if path.is_dir() and is_item(path):
            items[path.name] = path
    return items


def source_of(source: Source, path: Path) -> Source:
    """An item of a step as a source of its own."""
    # What the checkpoint says, and what was passed over, is of the training state.
    return replace(source, paths=(path,), names=(path.name,), said=None, passed=())


def head_of(name: str, leaves: Sequence[Leaf], side: str) -> Keys:
    """The keys in front of an item's tree, if it lay in a whole training state.

    An optimizer's state lies below `opt_state`, as a chain of optax does by itself (a tuple, or
    one state with a `count`); anything else below the item's name.

    Example:
      >>> kernel = Leaf(dict_keys("fc", "kernel"), "jax.Array")
      >>> [key.name for key in head_of("ema", [kernel], "linen")]
      ['ema']
      >>> count = Leaf((Key("0", SEQUENCE), *dict_keys("count")), "jax.Array")
      >>> [key.name for key in head_of("optimizer_state", [count], "nnx")]
      ['optimizer', 'opt_state']
    """
    tops = {leaf.keys[0] for leaf in leaves}
    names = {key.name for key in tops}
    above = ["optimizer"] if side == "nnx" else []
    # The item has the level `opt_state` itself.
    if OPTIMIZER in names:
        return dict_keys(*above)
    # Flax writes a tuple as a dict whose keys are digits.
    is_chain = all(key.kind == SEQUENCE or key.name.isdigit() for key in tops)
    if is_chain or "count" in names:
        return dict_keys(*above, OPTIMIZER)
    return dict_keys(name)


def head_in(head: Keys, side: str) -> Keys:
    """The head that an item has on the other side."""
    if not is_optimizer(head):
        return head
    below = [key for key in head if key.name != "optimizer"]
    above = dict_keys("optimizer") if side == "nnx" else ()
    return (*above, *below)


def without_head(move: Move[Leaf, Leaf], sources: int, targets: int) -> Move[Leaf, Leaf]:
    """A move whose leaves have lost their first keys: `sources` and `targets` of them."""
    return move._replace(
        sources=_cut(move.sources, sources),
        targets=_cut(move.targets, targets),
    )


def _cut(leaves: Sequence[Leaf], count: int) -> tuple[Leaf, ...]:
    """The leaves without their first keys, `count` of each."""
    return tuple([leaf.at(leaf.keys[count:]) for leaf in leaves])


def is_optimizer(head: Sequence[Key]) -> bool:
    """Whether an item with such a head is an optimizer's state."""
    return not head or head[0].name == "optimizer" or head[-1].name == OPTIMIZER


def read_beside(leaves: Sequence[Leaf], head: Keys, form: Form) -> State:
    """An item's tree as a state without a model. The leaves' keys get the head in front."""
    placed = [leaf.at((*head, *leaf.keys)) for leaf in leaves]
    rest = {}
    # A state calls what lies in `optimizer` of nnx by the same path as Linen's: `opt_state/...`.
    for names, leaf in without_boxes(placed, lambda path: False):
        above = names[:1] == ("optimizer",) and form.side == "nnx"
        rest["/".join(names[1:] if above else names)] = leaf
    return State(form, "an item beside the training state", {}, rest)
