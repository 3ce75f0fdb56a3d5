"""Carries a rule book over from the model to everything saved with it.

Rules are written for the model. They follow (`follow.py`) into every subtree of the rest that
mirrors one of its collections (`mirrors.py`); what mirrors nothing goes along as it is where that
is right (`fields.py`). What has no home on the other side is an error until a rule drops it.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from linen_nnx.book.ops import Side, Spec
from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.stages import WHOLE
from linen_nnx.book.tree import branches_of
from linen_nnx.disk.fields import check_plain, ruled, scopes
from linen_nnx.disk.follow import Mirror
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.mirrors import factorings, find_mirrors, group, prefix_keys
from linen_nnx.disk.moves import Move, Place, Step
from linen_nnx.disk.state import OPTIMIZER, Form, Id, State, unruled

_SHOWN = 5  # leaves named in a note


class Carried(NamedTuple):
    """What becomes of a state."""

    moves: list[Move[Leaf, Place]]
    as_they_are: list[str]
    """The arrays that mirror nothing, by path: they go along as they are."""
    notes: list[str]
    steps: list[Step]
    """What becomes of the model alone."""


def carry(
    state: State,
    to: Form,
    book: RuleBook,
    like: State | None = None,
    reset_optimizer: bool = False,
    origin: State | None = None,
    specs: Mapping[str, Any] | None = None,
) -> Carried:
    """Every move that takes `state` to the form `to`.

    Args:
      state: what is there. `to`: the form that it gets.
      book: the rules, for the model.
      like: a tree of that form whose shapes and dtypes the model must get.
      reset_optimizer: leave the optimizer's state out.
      origin: a tree of that form which `state` came from, if there is one and no `like`.
      specs: the target's shapes and dtypes by path, where they are known without a tree.

    Raises:
      RuleError: with everything that does not fit.
    """
    problems: list[str] = []
    notes: list[str] = []
    moves: list[Move[Leaf, Place]] = []
    rest = dict(state.rest)
    if reset_optimizer:
        for path in [path for path in rest if path.split("/")[0] == OPTIMIZER]:
            moves.append(Move((rest.pop(path),), ()))
    state = _without_unruled(State(state.form, state.layout, state.model, rest), book, moves, notes)
    idle: frozenset[int] = frozenset()
    if not (state.form.stage or to.stage):
        model = (_path(id, state.form.flat) for id in state.model)
        settled = ruled(state, model, book, to.side, problems)
        moves += settled.moves
        idle = settled.rules
        rest = {path: leaf for path, leaf in rest.items() if path not in settled.paths}
    if like is not None:
        specs = {_path(id, like.form.flat): leaf.spec for id, leaf in like.model.items()}
    steps = list(_steps(state, to, book, specs, problems, idle))
    for step in steps:
        sources = tuple([state.model[id] for id in step.sources])
        places = tuple([Place(id) for id in step.targets])
        moves.append(Move(sources, places, step.actions, step.specs, step.rule))
    given = like or origin
    as_they_are = _carry_rest(state, rest, to, steps, given, moves, problems, notes)
    if problems:
        raise RuleError(f"The checkpoint cannot go to {to}", problems)
    return Carried(moves, as_they_are, notes, steps)


def carry_beside(
    item: State, model: State, to: Form, steps: Sequence[Step], given: State | None
) -> Carried | None:
    """Every move of what lies beside a model, by what becomes of the model (`Carried.steps`).

    Args:
      item: what lies beside it, a state without a model; `model`: the state with it.
      given: a tree that the result must equal, or came from, if there is one.

    Returns:
      None if nothing of it mirrors the model, so that it may stay as it is.

    Raises:
      RuleError: with everything that does not fit.
    """
    state = State(item.form, item.layout, model.model, item.rest)
    problems: list[str] = []
    notes: list[str] = []
    moves: list[Move[Leaf, Place]] = []
    as_they_are = _carry_rest(state, item.rest, to, steps, given, moves, problems, notes)
    if problems:
        raise RuleError(f"An item beside the training state cannot go to {to}", problems)
    if not any(place.mirrored for move in moves for place in move.targets):
        return None
    return Carried(moves, as_they_are, notes, list(steps))


def _without_unruled(
    state: State, book: RuleBook, moves: list[Move[Leaf, Place]], notes: list[str]
) -> State:
    """The state without empty nodes in the model, and without what in nnx is no variable of it.

    The latter is left out, and `notes` says so.
    """
    model = dict(state.model)
    for id in [id for id, leaf in model.items() if leaf.empty]:
        moves.append(Move((model.pop(id),), ()))
    if state.form.flat:
        return State(state.form, state.layout, model, state.rest)
    for what, ids in unruled(state, book):
        for id in ids:
            moves.append(Move((model.pop(id),), ()))
        notes.append(f"{what}: {_few([id.path for id in ids])}")
    return State(state.form, state.layout, model, state.rest)


def _few(texts: Sequence[str]) -> str:
    more = f", ... ({len(texts)})" if len(texts) > _SHOWN else ""
    return ", ".join(f"`{text}`" for text in texts[:_SHOWN]) + more


def _carry_rest(
    state: State,
    rest: Mapping[str, Leaf],
    to: Form,
    steps: Sequence[Step],
    given: State | None,
    moves: list[Move[Leaf, Place]],
    problems: list[str],
    notes: list[str],
) -> list[str]:
    """Adds the moves of the rest; returns the arrays that go along as they are."""
    trees = _trees(steps, state.form)
    specs = {path: None if leaf.zarr is None else leaf.spec for path, leaf in rest.items()}
    found, plain = find_mirrors(specs, trees)
    outside = set(plain)
    paths = [path for path in rest if path not in outside]
    groups = {}
    for (prefix, tree), inside in zip(found, _below([p for p, _ in found], paths), strict=True):
        groups[prefix] = group(prefix, trees[tree], rest, inside)
    mirrored = {prefix: trees[tree] for prefix, tree in found}
    factoring = factorings({prefix: held for prefix, (held, _) in groups.items()}, mirrored, state)
    targets = (
        None if given is None else {p: leaf.zarr is not None for p, leaf in given.rest.items()}
    )
    for prefix, tree in found:
        held, holes = groups[prefix]
        node, _, field = prefix.rpartition("/")
        mirror = Mirror(
            prefix=prefix,
            tree=tree,
            names={id: path for path, id in trees[tree].items()},
            state=state,
            to=to,
            held=held,
            holes=holes,
            level=_has_level(prefix, steps, targets),
            factoring=factoring.get(node) if field in ("v_row", "v_col", "v") else None,
            given=targets,
            problems=problems,
            notes=notes,
        )
        moves += mirror.moves(steps)
    return _carry_plain(state, rest, plain, steps, groups, mirrored, moves, problems)


def _carry_plain(
    state: State,
    rest: Mapping[str, Leaf],
    plain: Sequence[str],
    steps: Sequence[Step],
    groups: Mapping[str, Any],
    mirrored: Mapping[str, Mapping[str, Id]],
    moves: list[Move[Leaf, Place]],
    problems: list[str],
) -> list[str]:
    """Adds the moves of what mirrors nothing; returns the arrays among it."""
    inert = all(step.sources == step.targets and not step.actions for step in steps)
    inside = {
        prefix: {mirrored[prefix][path] for path in held} for prefix, (held, _) in groups.items()
    }
    around = scopes(plain, inside, steps, state)
    called = {path for tree in _trees(steps, state.form).values() for path in tree}
    as_they_are: list[str] = []
    for path in plain:
        leaf = rest[path]
        moves.append(Move((leaf,), (Place(path=path, prefix=prefix_keys(path, leaf)),)))
        if inert:
            continue
        beside = path.startswith("../")
        problem = check_plain(path, leaf, called, around[path], state.form.side, beside)
        if problem is not None:
            problems.append(problem)
        elif leaf.zarr is not None and leaf.spec.shape:
            as_they_are.append(leaf.path)
    return as_they_are


def _below(prefixes: Sequence[str], paths: Sequence[str]) -> list[list[str]]:
    """The paths below each of some disjoint prefixes."""
    found: dict[str, list[str]] = {prefix: [] for prefix in prefixes}
    for path in paths:
        node = path
        while node not in found:
            node = node.rpartition("/")[0]
        found[node].append(path)
    return list(found.values())


def _has_level(prefix: str, steps: Sequence[Step], given: Mapping[str, bool] | None) -> bool:
    """Whether a mirror's targets lie below the names of their collections, by a given tree.

    They do where `TrainState.params` holds `{"params": ...}`: then moments do so, too.
    """
    ids = [id for step in steps for id in step.targets if id.collection]
    if given is None:
        return False
    nodes = branches_of(given) | given.keys()
    below = any(f"{prefix}/{id.collection}/{id.path}" in nodes for id in ids)
    return below and not any(f"{prefix}/{id.path}" in nodes for id in ids)


def _steps(
    state: State,
    to: Form,
    book: RuleBook,
    specs: Mapping[str, Any] | None,
    problems: list[str],
    idle: frozenset[int],
) -> Iterator[Step]:
    """The model's steps: of the whole book, or of each part whose form changes."""
    if not (state.form.stage or to.stage):
        yield from _planned(state.model, state.form.side, to.side, book, specs, problems, idle)
        return
    # From a stage to a stock layout, or the other way round, one of the two has no parts.
    parts = state.form.parts or to.parts
    staged = state.form if state.form.parts else to
    models: dict[str, dict[Id, Leaf]] = {part: {} for part in parts}
    for id, leaf in state.model.items():
        part = staged.part_of(id)
        if part in models:
            models[part][id] = leaf
        else:
            known = ", ".join(parts)
            problems.append(f"`{id.collection}/{id.path}` lies in none of the parts ({known})")
    for part, model in models.items():
        before = state.form.parts.get(part, state.form.side)
        after = to.parts.get(part, to.side)
        if before == after:
            yield from (Move((id,), (id,)) for id in model)
        else:
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
) -> Iterator[Step]:
    """The steps of one plan."""
    if side == to:
        problems.append(f"the checkpoint is in {to} form already")
        return
    ids = {_path(id, side == "linen"): id for id in model}
    bare = {path: model[id].value_type for path, id in ids.items() if model[id].zarr is None}
    if bare:
        problems += [f"`{path}` is a {kind}, expected an array" for path, kind in bare.items()]
        return
    specs: dict[str, Spec] = {path: model[id].spec for path, id in ids.items()}
    try:
        plan = book.plan(specs, to, target, idle=idle)
    except RuleError as error:
        problems += error.problems
        return
    for step in plan.steps:
        sources = tuple([ids[path] for path in step.sources])
        if to == "linen":
            targets = tuple([Id(*path.split("/", 1)) for path in step.targets])
        else:
            init = step.rule.init
            known = init.collection if init is not None else None
            collection = sources[0].collection if sources else known or "params"
            targets = tuple([Id(collection, path) for path in step.targets])
        known = {id.collection for id in sources} - {""}
        if known and len(known | {id.collection for id in targets}) > 1:
            problems.append(f"{step.rule} moves {step.sources} to another collection")
        yield Move(sources, targets, step.actions, step.specs, step.rule)


def _path(id: Id, flat: bool) -> str:
    return f"{id.collection}/{id.path}" if flat else id.path


def _trees(steps: Sequence[Step], form: Form) -> dict[str, dict[str, Id]]:
    """What a subtree may mirror: the paths of one collection (parameters first), or `""`: all."""
    trees: dict[str, dict[str, Id]] = {"params": {}}
    everything = {}
    for step in steps:
        for id in step.sources:
            # A leaf that stock nnx drops may be a parameter: its moments are dropped with it.
            named = [i.collection for i in (id, *step.targets) if i.collection]
            trees.setdefault(named[0] if named else "params", {})[id.path] = id
            everything[_path(id, form.flat)] = id
    return {**trees, "": everything}
