"""Whole training states: what a rule book for the model means for everything saved with it.

A checkpoint's tree is sorted into a `State`: the *model* (parameters and collections), known by
`(collection, path)`, and the *rest* (step, optimizer, EMA, keys), known by neutral paths that mean
the same on both sides (`step`, `opt_state/1/0/mu/...`). Layouts: stock Linen (`TrainState`,
variables, bare parameters), stock nnx (`nnx.State` of a model, of `nnx.Optimizer`), and a stage of
the ladder: plain nested dicts, in which each part of the model has a form of its own.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from linen_nnx.book.ops import Side
from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.stages import WHOLE, Forms
from linen_nnx.disk.leaves import DICT, SEQUENCE, Key, Leaf

OPTIMIZER = "opt_state"
Names = tuple[str, ...]


class Id(NamedTuple):
    """A model leaf: its collection, and its path below that (in nnx form, its attribute path)."""

    collection: str
    path: str


@dataclass(frozen=True)
class Form:
    """How a tree is laid out: as stock Linen or stock nnx, or as at a stage of the ladder.

    Attributes:
      side: which of the two stock layouts; at a stage, where collections have names as in Linen,
        `linen`.
      stage: the stage's name, if it is one.
      parts: the form of each part at the stage.
    """

    side: Side
    stage: str | None = None
    parts: Forms = field(default_factory=dict, hash=False)

    def part_of(self, id: Id) -> str:
        """The part that a leaf belongs to; its own first name where there is no such part."""
        return WHOLE if WHOLE in self.parts else id.path.split("/")[0]

    @property
    def flat(self) -> bool:
        """Whether model leaves lie below the names of their collections."""
        return self.stage is not None or self.side == "linen"

    def __str__(self) -> str:
        return f"stage {self.stage}" if self.stage else self.side


@dataclass(frozen=True)
class State:
    """A sorted tree. In stock nnx form a leaf's collection is not on disk: there it is `""`."""

    form: Form
    layout: str
    model: dict[Id, Leaf] = field(default_factory=dict)
    rest: dict[str, Leaf] = field(default_factory=dict)
    """By neutral path; what lies outside of the training state's node begins with `../`."""


def read_state(leaves: Sequence[Leaf], form: Form, book: RuleBook) -> State:
    """Sorts a tree. Raises `RuleError` if it does not say clearly where the model is."""
    tree = without_boxes(leaves, lambda path: bool(book.hits(form.side, path)))
    return _read_flat(tree, form, book) if form.flat else _read_nnx(tree, book)


def names_of(path: str) -> list[str]:
    """The key names of a neutral path."""
    return path.removeprefix("../").split("/")


def is_key(leaf: Leaf) -> bool:
    """Whether a leaf looks like a random key: a typed one, or the raw words of one."""
    spec = leaf.spec
    return str(spec.dtype).startswith("key<") or (
        str(spec.dtype) == "uint32" and spec.shape in ((2,), (4,))
    )


def unruled(state: State, book: RuleBook) -> Iterator[tuple[str, list[Id]]]:
    """The leaves of an nnx model that no rule matches and that no Linen model has; and why.

    A Dropout with a stream of its own holds `drop/rngs/key` and `drop/rngs/count`; a module may
    hold arrays that are no `nnx.Variable`, which a state saves without a box around them.
    """
    alone = [id for id in state.model if not book.hits("nnx", id.path)]
    random = [id for id in alone if _is_random(id, state.model)]
    if random:
        yield "the random state of nnx is left out, as Linen takes its keys in each call", random
    boxed = any(leaf.keys[-1].name == "value" for leaf in state.model.values())
    plain = [id for id in alone if state.model[id].keys[-1].name != "value" and id not in random]
    if boxed and plain:
        yield "constants of modules (arrays that are no nnx.Variable) are left out", plain


def _is_random(id: Id, model: Mapping[Id, Leaf]) -> bool:
    """Whether a leaf is the key of an nnx random stream, or its count."""
    node, slash, name = id.path.rpartition("/")
    key, count = (model.get(Id(id.collection, f"{node}{slash}{n}")) for n in ("key", "count"))
    if name not in ("key", "count") or key is None or count is None:
        return False
    if key.zarr is None or count.zarr is None:
        return False
    return is_key(key) and str(count.spec.dtype) == "uint32"


def without_boxes(leaves: Sequence[Leaf], known: Callable[[str], bool]) -> list[tuple[Names, Leaf]]:
    """The key names of each leaf without the level `value` of `nnx.State` and of boxes.

    That level is the only child of its parent, and the last or before the numbers of a list. A
    parameter of that name may be, too: then the rule book knows the path with it and not the path
    without.
    """
    count = _children(leaves) if any(_box_in(leaf.keys) for leaf in leaves) else {}
    tree = []
    for leaf in leaves:
        names = tuple([key[0] for key in leaf.keys])
        at = _box_in(leaf.keys)
        if at and count[leaf.keys[:at]] == 1:
            starts = range(len(names) - 1)
            last = at == len(names) - 1
            # Most boxes are known by the first question, which is asked again of every leaf.
            own = (
                last
                and not any(known("/".join(names[n:-1])) for n in starts)
                and any(known("/".join(names[n:])) for n in starts)
            )
            names = names if own else (*names[:at], *names[at + 1 :])
        tree.append((names, leaf))
    return tree


def _children(leaves: Sequence[Leaf]) -> Counter[tuple[Key, ...]]:
    """How many children each inner node has."""
    seen: set[tuple[Key, ...]] = set()
    count: Counter[tuple[Key, ...]] = Counter()
    for leaf in leaves:
        node = leaf.keys
        while node and node not in seen:
            seen.add(node)
            node = node[:-1]
            count[node] += 1
    return count


_BOX = Key("value", DICT)


def _box_in(keys: tuple[Key, ...]) -> int | None:
    """Where a key path has the level of a box, if it has: last, or before the numbers of a list."""
    at = len(keys) - 1
    while at > 0 and keys[at].kind == SEQUENCE:
        at -= 1
    return at if keys[at] == _BOX else None


def _read_flat(tree: list[tuple[Names, Leaf]], form: Form, book: RuleBook) -> State:
    """Linen trees and those of a stage: collections by name, at the node that has `params`."""
    heads = {names[: names.index("params")] for names, _ in tree if "params" in names}
    if not heads:
        model = {Id("params", "/".join(names)): leaf for names, leaf in tree}
        return State(form, "bare parameters", model)
    depth = min(map(len, heads))
    heads = {head for head in heads if len(head) == depth}
    if len(heads) > 1:
        raise RuleError(
            "The layout is ambiguous",
            [f"`{'/'.join((*h, 'params'))}` may be the parameters" for h in sorted(heads)],
        )
    head = heads.pop()
    base, layout = head, "variables"
    if any(names[: depth + 2] == (*head, "params", "params") for names, _ in tree):
        base, layout = (*head, "params"), "variables below `params`"
    known = _collections(book)
    model, rest = {}, {}
    for names, leaf in tree:
        inside = len(names) > len(base) + 1 and names[: len(base)] == base
        if inside and known(names[len(base) :]):
            model[Id(names[len(base)], "/".join(names[len(base) + 1 :]))] = leaf
        elif names[:depth] == head:
            rest["/".join(names[depth:])] = leaf
        else:
            rest["../" + "/".join(names)] = leaf
    if form.stage:
        layout = f"a state at stage {form.stage}"
    elif any(path.split("/")[0] == OPTIMIZER for path in rest):
        layout = "TrainState" if layout == "variables" else f"TrainState, {layout}"
    where = f" in `{'/'.join(head)}`" if head else ""
    return State(form, layout + where, model, rest)


def _collections(book: RuleBook) -> Callable[[Names], bool]:
    """Says of a path whether it is one of the model, by the first of its names.

    What rules know only to drop is a collection as far as they drop it: the rest of such a field
    of a training state stays in it.
    """
    kept, dropped = {"params"}, set[str]()
    for rule in book.rules:
        heads = {pattern.text.split("/")[0] for pattern in rule.linen if "/" in pattern.text}
        (kept if rule.nnx or rule.init else dropped).update(heads - {OPTIMIZER})
    dropped -= kept
    return lambda names: (
        names[0] in kept or (names[0] in dropped and bool(book.hits("linen", "/".join(names))))
    )


def _read_nnx(tree: list[tuple[Names, Leaf]], book: RuleBook) -> State:
    """`nnx.State` trees: the optimizer is the node with `opt_state`, the model what rules match."""
    owners = {names[: names.index(OPTIMIZER)] for names, _ in tree if OPTIMIZER in names}
    if not owners and any(names == ("optimizer", "step") for names, _ in tree):
        owners = {("optimizer",)}  # one that keeps no state
    owners = {owner for owner in owners if len(owner) == min(map(len, owners))}
    if len(owners) > 1:
        shown = ", ".join(f"`{'/'.join(owner)}`" for owner in sorted(owners))
        raise RuleError("The layout is ambiguous", [f"several optimizers: {shown}"])
    owner = owners.pop() if owners else None
    model, rest = [], {}
    for names, leaf in tree:
        if (
            owner is not None
            and names[:-1][: len(owner)] == owner
            and (owner or names[0] in (OPTIMIZER, "step"))
        ):
            rest["/".join(names[len(owner) :])] = leaf
        else:
            model.append((names, leaf))
    counts = {(): 0} | {names[:1]: 0 for names, _ in model if len(names) > 1}
    for names, _ in model:
        for head in ((), names[:1]):
            known = bool(book.hits("nnx", "/".join(names[len(head) :])))
            counts[head] = counts.get(head, 0) + known
    head = max(counts, key=lambda head: (counts[head], head == ("model",), -len(head)))
    boxed = any(leaf.keys[-1].name == "value" for _, leaf in model)
    layout = f"nnx.State{'' if boxed else ' as a pure dict'} of the model"
    layout += f" in `{head[0]}`" if head else ""
    layout += f", and of its optimizer in `{'/'.join(owner)}`" if owner else ""
    state = State(Form("nnx"), layout, rest=rest)
    for names, leaf in model:
        # Beside a bare state of a model, a single number or array without a box is no variable.
        single = boxed and not head and leaf.keys[-1].name != "value" and len(names) == 1
        if names[: len(head)] == head and not (single and not book.hits("nnx", names[0])):
            state.model[Id("", "/".join(names[len(head) :]))] = leaf
        elif "/".join(names) in rest:
            raise RuleError("The layout is ambiguous", [f"`{'/'.join(names)}` occurs twice"])
        else:
            rest["/".join(names)] = leaf
    return state
