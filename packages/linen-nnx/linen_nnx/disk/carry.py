"""Carries a rule book over from the model to everything that was saved with it.

A training state of four leaves, and a book whose one rule is about the kernel: it moves
`params/d/kernel` to `a/w` and transposes it.

    params/d/kernel            (6, 3)    the model     a/w                    (3, 6)
    opt_state/0/mu/d/kernel    (6, 3)    a mirror      opt_state/0/mu/a/w     (3, 6)
    step                       ()        plain         step                   ()
    opt_state/0/count          ()        plain         opt_state/0/count      ()

1. The rules say what becomes of the model (`model_moves.py`).
2. A subtree below which lie only paths of the model is a mirror of it (`mirrors.py`). Nobody says
   that `mu` is a moment: that it holds `d/kernel`, and nothing else, shows it.
3. What a rule does to a leaf of the model it does to that leaf of every mirror (`follow.py`).
4. What mirrors nothing is plain: it goes along as it is, where that is right (`unmirrored.py`).

Each leaf so gets a move, from itself to a place. Whatever has no home on the other side is a
problem, and all problems are raised together. Nothing is left out unless a rule drops it, or a
note says so, as of the random streams of nnx.

    >>> from linen_nnx.book.specs import Spec
    >>> from linen_nnx.disk.state import read_state
    >>> from linen_nnx.disk.leaves import dict_keys
    >>> from linen_nnx.disk.zarr_metadata import fresh_metadata
    >>> def saved(path, *shape):
    ...     zarr = fresh_metadata(Spec(shape, "float32"), zarr3=False)
    ...     return Leaf(dict_keys(*path.split("/")), "np.ndarray", zarr=zarr)
    >>> tree = [saved("params/d/kernel", 6, 3), saved("opt_state/0/mu/d/kernel", 6, 3)]
    >>> tree += [saved("step"), saved("opt_state/0/count")]
    >>> turned = {"op": "transpose", "perm": [1, 0]}
    >>> rule = {"linen": "params/d/kernel", "nnx": "a/w", "ops": [turned]}
    >>> book = RuleBook.from_dict({"version": 1, "rules": [rule]})
    >>> for move in carry(read_state(tree, Form("linen"), book), Form("nnx"), book).moves:
    ...     print(f"{move.sources[0].path:<24}", move.targets[0], *move.actions)
    params/d/kernel          a/w Permute(perm=(1, 0))
    opt_state/0/mu/d/kernel  opt_state/0/mu/a/w Permute(perm=(1, 0))
    step                     step
    opt_state/0/count        opt_state/0/count
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from linen_nnx.book.moves import Move, targets_of
from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.tree import branches_of
from linen_nnx.disk.follow import Mirror
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.mirrors import ModelPaths, Subtree, factorings, find_subtrees, prefix_keys
from linen_nnx.disk.model_moves import model_moves, path_in_book
from linen_nnx.disk.moments import FACTORED
from linen_nnx.disk.places import Place
from linen_nnx.disk.state import OPTIMIZER, Form, Id, State, unruled
from linen_nnx.disk.unmirrored import check_plain, ruled, scopes
from linen_nnx.errors import quoted

_SHOWN = 5  # leaves named in a note


class Carried(NamedTuple):
    """What becomes of a state, leaf for leaf, and what a person should know of it."""

    moves: list[Move[Leaf, Place]]
    as_they_are: list[str]
    """The arrays that mirror nothing, by path: they go along as they are."""
    notes: list[str]
    of_model: list[Move[Id, Id]]
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
    """Every move that takes a whole training state to another form.

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
    carrying = _Carrying(state.model, state.rest, state, to)
    if reset_optimizer:
        carrying.drop_optimizer()
    # What has no home in any Linen model goes first: left in, no rule would match it, and the book
    # would be said not to fit.
    carrying.drop_empty_nodes()
    if not state.form.flat:
        carrying.drop_unruled(book)
    # Rules about single leaves beside the model. They match none of the model's, and its plan must
    # not report them for that. At a stage the rest is the same on both sides, and needs no rule.
    idle: frozenset[int] = frozenset()
    if not (state.form.stage or to.stage):
        idle = carrying.settle_by_rule(book)
    # The shapes that are due let the book say what is missing, and fill what only the target has.
    if like is not None:
        specs = {path_in_book(id, like.form.flat): leaf.spec for id, leaf in like.model.items()}
    of_model = carrying.carry_model(book, specs, idle)
    carrying.carry_rest(of_model, like or origin)
    return carrying.done(of_model, f"The checkpoint cannot go to {to}")


def carry_beside(
    item: State, model: State, to: Form, of_model: Sequence[Move[Id, Id]], given: State | None
) -> Carried | None:
    """Every move of what lies beside a model, by what becomes of the model (`Carried.of_model`).

    Args:
      item: what lies beside it, a state without a model; `model`: the state with it.
      given: a tree that the result must equal, or came from, if there is one.

    Returns:
      None if nothing of it mirrors the model, so that it may stay as it is.

    Raises:
      RuleError: with everything that does not fit.
    """
    carrying = _Carrying(model.model, item.rest, item, to)
    carrying.carry_rest(of_model, given)
    carried = carrying.done(of_model, f"An item beside the training state cannot go to {to}")
    found = any(place.mirrored for place in targets_of(carried.moves))
    return carried if found else None


class _Carrying:
    """One state on its way: what is left of it to be carried, and what has been found so far.

    Each method takes some leaves and adds their moves. The order of the calls is that of the moves,
    and so the order of the leaves in the result, where no given tree has one.
    """

    def __init__(
        self, model: Mapping[Id, Leaf], rest: Mapping[str, Leaf], read: State, to: Form
    ) -> None:
        # Copies, since leaves are taken out of them.
        self.state = State(read.form, read.layout, dict(model), dict(rest))
        self.to = to
        self.moves: list[Move[Leaf, Place]] = []
        self.as_they_are: list[str] = []
        self.notes: list[str] = []
        self.problems: list[str] = []

    def done(self, of_model: Sequence[Move[Id, Id]], refusal: str) -> Carried:
        """The result. Raises `RuleError` with all problems there are."""
        if self.problems:
            raise RuleError(refusal, self.problems)
        return Carried(self.moves, self.as_they_are, self.notes, list(of_model))

    def drop_optimizer(self) -> None:
        """Leaves out the optimizer's state."""
        inside = [path for path in self.state.rest if path.split("/")[0] == OPTIMIZER]
        for path in inside:
            self._drop(self.state.rest.pop(path))

    def drop_empty_nodes(self) -> None:
        """Leaves out empty nodes of the model: a collection without leaves has nothing to carry."""
        empty = [id for id, leaf in self.state.model.items() if leaf.empty]
        for id in empty:
            self._drop(self.state.model.pop(id))

    def drop_unruled(self, book: RuleBook) -> None:
        """Leaves out what lies in an nnx state and in no Linen model, and says so in a note."""
        # All is found before anything is taken away: what is random is told by its neighbours.
        for what, ids in list(unruled(self.state, book)):
            for id in ids:
                self._drop(self.state.model.pop(id))
            self.notes.append(f"{what}: {_some([id.path for id in ids])}")

    def settle_by_rule(self, book: RuleBook) -> frozenset[int]:
        """Carries the single leaves of the rest that a rule names; returns these rules' numbers."""
        model = (path_in_book(id, self.state.form.flat) for id in self.state.model)
        settled = ruled(self.state, model, book, self.to.side, self.problems)
        self.moves += settled.moves
        for path in settled.paths:
            del self.state.rest[path]
        return settled.rules

    def carry_model(
        self, book: RuleBook, specs: Mapping[str, Any] | None, idle: frozenset[int]
    ) -> list[Move[Id, Id]]:
        """Carries the model; returns what becomes of it, which the rest follows."""
        of_model = model_moves(self.state, self.to, book, specs, self.problems, idle)
        for move in of_model:
            sources = tuple([self.state.model[id] for id in move.sources])
            places = tuple([Place(id) for id in move.targets])
            self.moves.append(Move(sources, places, move.actions, move.specs, move.rule))
        return of_model

    def carry_rest(self, of_model: Sequence[Move[Id, Id]], given: State | None) -> None:
        """Carries everything beside the model: first what mirrors it, then what does not.

        Args:
          of_model: what becomes of the model.
          given: a tree that the result must equal, or came from. It settles what the source alone
            cannot: which parameters have moments there, and below which names.
        """
        trees = _mirrorable(of_model, self.state.form)
        subtrees, plain = find_subtrees(self.state.rest, trees)
        # Adafactor's `v_row`, `v_col` and `v` show together what none of them shows alone.
        factoring = factorings(subtrees, self.state)
        arrays = None
        if given is not None:
            arrays = {path: leaf.zarr is not None for path, leaf in given.rest.items()}
        for subtree in subtrees:
            mirror = Mirror(
                subtree=subtree,
                state=self.state,
                to=self.to,
                level=_has_level(subtree.prefix, of_model, arrays),
                factoring=factoring.get(subtree.node) if subtree.field in FACTORED else None,
                given=arrays,
                problems=self.problems,
                notes=self.notes,
            )
            self.moves += mirror.moves(of_model)
        self._carry_plain(plain, subtrees, of_model, trees)

    def _carry_plain(
        self,
        plain: Sequence[str],
        subtrees: Sequence[Subtree],
        of_model: Sequence[Move[Id, Id]],
        trees: Mapping[str, ModelPaths],
    ) -> None:
        """Carries what mirrors nothing, as it is; refuses what may depend on the model's form."""
        # Where no name and no shape changes, nothing can depend on it: plain arrays are not asked
        # about. So a state that only changes its layout is never refused for them.
        inert = all(move.sources == move.targets and not move.actions for move in of_model)
        # An array of an optimizer may depend on the parameters that its neighbours mirror.
        inside = {}
        for subtree in subtrees:
            inside[subtree.prefix] = {subtree.paths[path] for path in subtree.held}
        around = scopes(plain, inside, of_model, self.state)
        names = set[str]()
        for tree in trees.values():
            names.update(tree)
        for path in plain:
            leaf = self.state.rest[path]
            place = Place(path=path, prefix=prefix_keys(path, leaf))
            self.moves.append(Move((leaf,), (place,)))
            if inert:
                continue
            beside = path.startswith("../")
            side = self.state.form.side
            problem = check_plain(path, leaf, names, around[path], side, beside)
            if problem is not None:
                self.problems.append(problem)
            elif leaf.zarr is not None and leaf.spec.shape:
                # Named in the report: whoever knows the optimizer should see that nothing was done.
                self.as_they_are.append(leaf.path)

    def _drop(self, leaf: Leaf) -> None:
        self.moves.append(Move((leaf,), ()))


def _some(texts: Sequence[str]) -> str:
    """The first of some texts, and how many there are in all if that is more."""
    more = f", ... ({len(texts)})" if len(texts) > _SHOWN else ""
    return quoted(texts[:_SHOWN]) + more


def _has_level(
    prefix: str, of_model: Sequence[Move[Id, Id]], given: Mapping[str, bool] | None
) -> bool:
    """Whether a mirror's targets lie below the names of their collections, by a given tree.

    They do where `TrainState.params` holds `{"params": ...}`. Then a moment of `d/kernel` is
    `opt_state/0/mu/params/d/kernel`, and the level `params` means nothing.
    """
    if given is None:
        return False
    # Nodes and leaves: a masked parameter is an empty node, and what SM3 keeps of one is a list.
    nodes = branches_of(given) | given.keys()
    with_level = without_level = False
    for move in of_model:
        for id in move.targets:
            if id.collection:
                with_level |= f"{prefix}/{id.collection}/{id.path}" in nodes
                without_level |= f"{prefix}/{id.path}" in nodes
    return with_level and not without_level


def _mirrorable(of_model: Sequence[Move[Id, Id]], form: Form) -> dict[str, ModelPaths]:
    """What a subtree of the rest may mirror: one collection, or the model as a whole (`""`).

    Moments mirror the collection `params`, and so it comes first. An average of parameters and
    statistics together, `ema/params/...` and `ema/batch_stats/...`, mirrors the whole.
    """
    trees: dict[str, dict[str, Id]] = {"params": {}}
    everything = {}
    for move in of_model:
        for id in move.sources:
            # In stock nnx form a leaf has no collection: its target's is its own. One that is
            # dropped may be a parameter, and then its moments are dropped with it.
            collection = next((one.collection for one in (id, *move.targets) if one.collection), "")
            trees.setdefault(collection or "params", {})[id.path] = id
            everything[path_in_book(id, form.flat)] = id
    return {**trees, "": everything}
