"""Which side a stock tree is of: Linen or nnx.

Names alone do not say: `nnx.State` may lie below a key `params`, and Linen's boxes end in `value`
as nnx's do. The rule book knows the paths of both sides, and so each reading is tried. With one
rule `{linen: params/d/{leaf}, nnx: a/{leaf}}`, the tree

    state/params/d/kernel, state/params/d/bias, state/step

has two leaves that the book knows as Linen's (below `state`), and none that it knows as nnx's. The
reading under which more leaves match a rule is right.
"""

from collections import Counter
from collections.abc import Sequence

from linen_nnx.book.rules import RuleBook
from linen_nnx.book.specs import Side
from linen_nnx.disk.leaves import DICT, Leaf

_DEPTH = 3  # how deep below the root the model may lie


def guess_side(leaves: Sequence[Leaf], book: RuleBook) -> Side | None:
    """The side that a tree is of, or None where both readings are as good.

    Where the book knows as many leaves of either reading (one of equal names on both sides, say),
    a level `params` speaks for Linen, and a last level `value` for nnx.

    Example:
      >>> from linen_nnx.disk.leaves import Key
      >>> keys = (Key("params", DICT), Key("d", DICT), Key("kernel", DICT))
      >>> rules = [{"linen": "params/d/{leaf}", "nnx": "a/{leaf}"}]
      >>> book = RuleBook.from_dict({"version": 1, "rules": rules})
      >>> guess_side([Leaf(keys, "jax.Array")], book)
      'linen'
    """
    linen, nnx = _known_linen(leaves, book), _known_nnx(leaves, book)
    if linen != nnx:
        return "linen" if linen > nnx else "nnx"
    has_level = any("params" in leaf.path.split("/")[:_DEPTH] for leaf in leaves)
    # Most leaves: one parameter may be called `value`, and an epoch beside a state has no box.
    boxed = sum(leaf.keys[-1] == ("value", DICT) for leaf in leaves)
    mostly_boxed = 2 * boxed > len(leaves)
    if has_level == mostly_boxed:
        return None
    return "linen" if has_level else "nnx"


def _known_linen(leaves: Sequence[Leaf], book: RuleBook) -> int:
    """How many leaves the book knows as Linen's, at the node where it knows most.

    At one node: an average beside the parameters has the same paths, and would count twice.
    """
    collections = {"params"}
    for rule in book.rules:
        collections |= {pattern.text.split("/")[0] for pattern in rule.linen}
    counts: Counter[tuple[str, ...] | None] = Counter()
    for leaf in leaves:
        names = _names(leaf)
        for n, name in enumerate(names[:_DEPTH]):
            if name in collections and book.hits("linen", "/".join(names[n:])):
                counts[names[:n]] += 1
        # Bare parameters are at no node that has `params`.
        if "params" not in names[:_DEPTH] and book.hits("linen", "/".join(("params", *names))):
            counts[None] += 1
    return max(counts.values(), default=0)


def _known_nnx(leaves: Sequence[Leaf], book: RuleBook) -> int:
    """How many leaves the book knows as nnx's, at the node where it knows most."""
    counts: Counter[tuple[str, ...]] = Counter()
    for leaf in leaves:
        names = _names(leaf)
        # The state of the model is the root, or a child of it: {"model": nnx.State, ...}.
        for n in range(min(2, len(names))):
            if book.hits("nnx", "/".join(names[n:])):
                counts[names[:n]] += 1
    return max(counts.values(), default=0)


def _names(leaf: Leaf) -> tuple[str, ...]:
    """The names of a leaf's keys without the last level of a box."""
    keys = leaf.keys
    if len(keys) > 1 and keys[-1] == ("value", DICT):
        keys = keys[:-1]
    return tuple([key.name for key in keys])
