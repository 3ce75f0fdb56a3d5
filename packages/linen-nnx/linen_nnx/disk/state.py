"""Whole training states: what a rule book for the model means for everything saved with it.

A checkpoint's tree is sorted into a `State`: the *model* (parameters and collections), known by
`(collection, path)`, and the *rest* (step, optimizer, EMA, keys), known by neutral paths that mean
the same on both sides (`step`, `opt_state/1/0/mu/...`). Three leaves, as each layout has them:

    stock Linen     params/d/kernel   step             opt_state/0/mu/d/kernel
    stock nnx       d/kernel/value    optimizer/step   optimizer/opt_state/0/mu/d/kernel/value
    a stage         as stock Linen, with each part of the model in a form of its own
    sorted          Id("params",      rest: step       rest: opt_state/0/mu/d/kernel
                    "d/kernel")

Nobody says where in a tree the model is. In Linen's layouts it is at the node that has a child
`params`, in nnx's at the node below which rules match most leaves.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.specs import Side
from linen_nnx.book.stages import WHOLE, Forms
from linen_nnx.disk.leaves import DICT, SEQUENCE, Key, Leaf
from linen_nnx.errors import quoted

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

    Example:
      >>> hybrid = Form("linen", "nnx_in_linen", {"torso": "nnx", "critic": "linen"})
      >>> hybrid.part_of(Id("params", "torso/out/kernel")), hybrid.flat, str(hybrid)
      ('torso', True, 'stage nnx_in_linen')
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
    """The key names of a neutral path.

    Example:
      >>> names_of("../epoch"), names_of("opt_state/0/count")
      (['epoch'], ['opt_state', '0', 'count'])
    """
    return path.removeprefix("../").split("/")


def is_key(leaf: Leaf) -> bool:
    """Whether a leaf looks like a random key: a typed one, or the raw words of one."""
    spec = leaf.spec
    if str(spec.dtype).startswith("key<"):
        return True
    # Two words are a key of threefry, four one of rbg.
    return str(spec.dtype) == "uint32" and spec.shape in ((2,), (4,))


def unruled(state: State, book: RuleBook) -> Iterator[tuple[str, list[Id]]]:
    """The leaves of an nnx model that no rule matches and that no Linen model has; and why.

    A Dropout with a stream of its own holds `drop/rngs/key` and `drop/rngs/count`; a module may
    hold arrays that are no `nnx.Variable`, which a state saves without a box around them.
    """
    random: list[Id] = []
    plain: list[Id] = []
    for id, leaf in state.model.items():
        if book.hits("nnx", id.path):
            continue
        if _is_random(id, state.model):
            random.append(id)
        elif not _has_box(leaf):
            plain.append(id)
    if random:
        yield "the random state of nnx is left out, as Linen takes its keys in each call", random
    # In a pure dict no leaf has a box: there it tells nothing of a leaf that it has none.
    if plain and any(map(_has_box, state.model.values())):
        yield "constants of modules (arrays that are no nnx.Variable) are left out", plain


def _has_box(leaf: Leaf) -> bool:
    """Whether a leaf lies in a box, as `nnx.State` has one around each variable."""
    return leaf.keys[-1].name == "value"


def _is_random(id: Id, model: Mapping[Id, Leaf]) -> bool:
    """Whether a leaf is the key of an nnx random stream, or its count.

    A parameter may be called `key`, as in attention. Only a stream has a `count` beside it, and
    the two of the types that nnx gives them.
    """
    node, slash, name = id.path.rpartition("/")
    if name not in ("key", "count"):
        return False
    key = model.get(Id(id.collection, f"{node}{slash}key"))
    count = model.get(Id(id.collection, f"{node}{slash}count"))
    if key is None or count is None or key.zarr is None or count.zarr is None:
        return False
    return is_key(key) and str(count.spec.dtype) == "uint32"


def without_boxes(leaves: Sequence[Leaf], known: Callable[[str], bool]) -> list[tuple[Names, Leaf]]:
    """The key names of each leaf without the level `value` of `nnx.State` and of boxes.

    That level is the only child of its parent, and the last or before the numbers of a list. A
    parameter of that name may be, too: then the rule book knows the path with it and not the path
    without.

    Args:
      leaves: the tree. `known`: whether the rule book knows a path.
    """
    count = _children(leaves) if any(_box_in(leaf.keys) for leaf in leaves) else {}
    tree = []
    for leaf in leaves:
        names = tuple([key[0] for key in leaf.keys])
        at = _box_in(leaf.keys)
        if at and count[leaf.keys[:at]] == 1 and not _is_own_name(names, at, known):
            names = (*names[:at], *names[at + 1 :])
        tree.append((names, leaf))
    return tree


def _is_own_name(names: Names, at: int, known: Callable[[str], bool]) -> bool:
    """Whether the level `value` at `at` is a parameter of that name, and no box."""
    if at != len(names) - 1:
        return False
    # The model may lie at any node: the book is asked for what is below each of them. The first
    # question settles most leaves, since most boxes are known without their last level.
    starts = range(len(names) - 1)
    if any(known("/".join(names[n:-1])) for n in starts):
        return False
    return any(known("/".join(names[n:])) for n in starts)


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
    # Moments mirror a whole dict of variables further down: `opt_state/0/mu/params/...`.
    heads = _outermost_with("params", tree)
    if not heads:
        model = {Id("params", "/".join(names)): leaf for names, leaf in tree}
        return State(form, "bare parameters", model)
    if len(heads) > 1:
        raise _ambiguous(
            *[f"`{'/'.join((*h, 'params'))}` may be the parameters" for h in sorted(heads)]
        )
    head = heads.pop()
    depth = len(head)
    base, layout = head, "variables"
    if any(names[: depth + 2] == (*head, "params", "params") for names, _ in tree):
        # `TrainState.params` that holds all of `model.init(...)`.
        base, layout = (*head, "params"), "variables below `params`"
    in_model = _collections(book)
    model, rest = {}, {}
    for names, leaf in tree:
        below = names[len(base) :]
        if names[: len(base)] == base and len(below) > 1 and in_model(below):
            model[Id(below[0], "/".join(below[1:]))] = leaf
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
        # A rule may also name one leaf of the optimizer, which makes no collection of it.
        heads.discard(OPTIMIZER)
        (kept if rule.nnx or rule.init else dropped).update(heads)
    dropped -= kept

    def is_of_model(names: Names) -> bool:
        if names[0] in kept:
            return True
        return names[0] in dropped and bool(book.hits("linen", "/".join(names)))

    return is_of_model


def _read_nnx(tree: list[tuple[Names, Leaf]], book: RuleBook) -> State:
    """`nnx.State` trees: the optimizer is the node with `opt_state`, the model what rules match."""
    owner = _owner_of_optimizer(tree)
    model, rest = [], {}
    for names, leaf in tree:
        if owner is not None and _is_owned(names, owner):
            rest["/".join(names[len(owner) :])] = leaf
        else:
            model.append((names, leaf))
    head = _head_of_model([names for names, _ in model], book)
    boxed = any(_has_box(leaf) for _, leaf in model)
    layout = f"nnx.State{'' if boxed else ' as a pure dict'} of the model"
    layout += f" in `{head[0]}`" if head else ""
    layout += f", and of its optimizer in `{'/'.join(owner)}`" if owner else ""
    state = State(Form("nnx"), layout, rest=rest)
    for names, leaf in model:
        path = "/".join(names)
        # Beside a bare state of a model, a single number or array without a box is no variable.
        single = boxed and not head and not _has_box(leaf) and len(names) == 1
        if names[: len(head)] == head and not (single and not book.hits("nnx", names[0])):
            state.model[Id("", "/".join(names[len(head) :]))] = leaf
        elif path in rest:
            raise _ambiguous(f"`{path}` occurs twice")
        else:
            rest[path] = leaf
    return state


def _owner_of_optimizer(tree: Sequence[tuple[Names, Leaf]]) -> Names | None:
    """The node that has the optimizer's state as its child; None if there is no optimizer."""
    # Wrappers of optax hold states of optax: `opt_state/inner/opt_state`.
    owners = _outermost_with(OPTIMIZER, tree)
    if len(owners) > 1:
        shown = quoted(map("/".join, sorted(owners)))
        raise _ambiguous(f"several optimizers: {shown}")
    if owners:
        return owners.pop()
    # An optimizer that keeps no state has a step.
    keeps_none = any(names == ("optimizer", "step") for names, _ in tree)
    return ("optimizer",) if keeps_none else None


def _outermost_with(child: str, tree: Sequence[tuple[Names, Leaf]]) -> set[Names]:
    """The nodes that have a child of some name, of which none lies deeper than another."""
    nodes = {names[: names.index(child)] for names, _ in tree if child in names}
    least = min(map(len, nodes), default=0)
    return {node for node in nodes if len(node) == least}


def _ambiguous(*why: str) -> RuleError:
    return RuleError("The layout is ambiguous", why)


def _is_owned(names: Names, owner: Names) -> bool:
    """Whether a leaf is one of the optimizer that is at the node `owner`."""
    if names[:-1][: len(owner)] != owner:
        return False
    # An optimizer that is the whole tree has nothing but these; anything else is the model's.
    return bool(owner) or names[0] in (OPTIMIZER, "step")


def _head_of_model(paths: Sequence[Names], book: RuleBook) -> Names:
    """The node that is the model: the root, or that child of it below which rules match most."""
    counts: dict[Names, int] = {(): 0}
    counts |= {names[:1]: 0 for names in paths if len(names) > 1}
    for names in paths:
        for head in ((), names[:1]):
            known = bool(book.hits("nnx", "/".join(names[len(head) :])))
            counts[head] = counts.get(head, 0) + known
    # Of equals the usual name wins, then the root: an EMA of all parameters matches as many.
    return max(counts, key=lambda head: (counts[head], head == ("model",), -len(head)))
