"""What a rule book does to the model alone: the moves of its leaves, before all that follows them.

    TrainState of stock Linen, to stock nnx   one plan of the whole book
    stage nnx_in_linen, to stage nnx          one plan for each part whose form changes;
                                              a part that is nnx at both keeps its names
    stage linen, to stock nnx                 the stage's parts, each to nnx

A book speaks of paths. The moves made here speak of `Id`s, since what mirrors the model mirrors one
of its collections.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from linen_nnx.book.moves import Move
from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.specs import Side, Spec
from linen_nnx.book.stages import WHOLE
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.state import Form, Id, State


def path_in_book(id: Id, flat: bool) -> str:
    """The path by which rules name a leaf: in flat forms it begins with the collection.

    Example:
      >>> path_in_book(Id("params", "d/kernel"), flat=True)
      'params/d/kernel'
      >>> path_in_book(Id("params", "d/kernel"), flat=False)
      'd/kernel'
    """
    return f"{id.collection}/{id.path}" if flat else id.path


def model_moves(
    state: State,
    to: Form,
    book: RuleBook,
    specs: Mapping[str, Any] | None,
    problems: list[str],
    idle: frozenset[int] = frozenset(),
) -> list[Move[Id, Id]]:
    """The moves of every leaf of the model, from its `Id` to that of its home in the form `to`.

    Args:
      state: what is there; its model must hold arrays alone.
      specs: the target's shapes and dtypes by path, where they are known.
      problems: gets everything that does not fit.
      idle: numbers of rules that need not match a leaf of the model, as they are for other leaves.
    """
    if state.form.stage or to.stage:
        return list(_part_by_part(state, to, book, problems, idle))
    return list(_planned(state.model, state.form.side, to.side, book, specs, problems, idle))


def _part_by_part(
    state: State, to: Form, book: RuleBook, problems: list[str], idle: frozenset[int]
) -> Iterator[Move[Id, Id]]:
    """The moves of a model whose parts are told apart by at least one of the two forms."""
    # From a stage to a stock layout, or the other way round, one of the two has no parts.
    staged = state.form if state.form.parts else to
    models: dict[str, dict[Id, Leaf]] = {part: {} for part in staged.parts}
    for id, leaf in state.model.items():
        part = staged.part_of(id)
        if part in models:
            models[part][id] = leaf
        else:
            known = ", ".join(staged.parts)
            problems.append(f"`{id.collection}/{id.path}` lies in none of the parts ({known})")
    for part, model in models.items():
        before = state.form.parts.get(part, state.form.side)
        after = to.parts.get(part, to.side)
        if before == after:
            for id in model:
                yield Move((id,), (id,))
        else:
            # Only the rules of this part: the others would be reported as matching no leaf.
            inside = book if part == WHOLE else book.within(part)
            yield from _planned(model, before, after, inside, None, problems, idle)


def _planned(
    model: Mapping[Id, Leaf],
    side: Side,
    to: Side,
    book: RuleBook,
    target: Mapping[str, Any] | None,
    problems: list[str],
    idle: frozenset[int],
) -> Iterator[Move[Id, Id]]:
    """The moves of one plan, with `Id`s in place of the book's paths."""
    # Parts of one form on both sides never come here. A whole model does, if its side was said
    # wrongly.
    if side == to:
        problems.append(f"the checkpoint is in {to} form already")
        return
    ids: dict[str, Id] = {}
    specs: dict[str, Spec] = {}
    for id, leaf in model.items():
        path = path_in_book(id, flat=side == "linen")
        ids[path] = id
        if leaf.zarr is None:
            problems.append(f"`{path}` is a {leaf.value_type}, expected an array")
        else:
            specs[path] = leaf.spec
    if len(specs) < len(ids):
        return
    try:
        plan = book.plan(specs, to, target, idle=idle)
    except RuleError as error:
        problems += error.problems
        return
    for move in plan.moves:
        sources = tuple([ids[path] for path in move.sources])
        targets = _ids_of(move, sources, to)
        # What mirrors the parameters mirrors them all: the moment of a parameter that became a
        # statistic would have no home.
        before = {id.collection for id in sources} - {""}
        after = {id.collection for id in targets}
        if before and len(before | after) > 1:
            problems.append(f"{move.rule} moves {move.sources} to another collection")
        yield Move(sources, targets, move.actions, move.specs, move.rule)


def _ids_of(move: Move[str, str], sources: tuple[Id, ...], to: Side) -> tuple[Id, ...]:
    """The `Id`s of a move's targets."""
    if to == "linen":
        return tuple([Id(*path.split("/", 1)) for path in move.targets])
    # An nnx path does not begin with a collection: a leaf stays in that of its source. What is
    # filled is a parameter, unless its `init` rule says otherwise.
    collection = "params"
    if sources:
        collection = sources[0].collection
    elif move.rule is not None and move.rule.init is not None:
        collection = move.rule.init.collection or "params"
    return tuple([Id(collection, path) for path in move.targets])
