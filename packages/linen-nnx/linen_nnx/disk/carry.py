"""Plans where each leaf of a training state goes, by a rule book that speaks of the model alone.

A leaf is an array of a checkpoint, or an empty node. A form is Linen's, nnx's, or that of a stage:
a state on the way, of which some parts have one form and some the other (`state.py`). How a form is
laid out on disk, `layouts.py` says later. A training state of four leaves, and a book whose one
rule is about the kernel: it moves `params/d/kernel` to `a/w` and transposes it.

    leaf                       shape     what it is    its place in nnx       shape
    params/d/kernel            (6, 3)    the model     a/w                    (3, 6)
    opt_state/0/mu/d/kernel    (6, 3)    a mirror      opt_state/0/mu/a/w     (3, 6)
    step                       ()        plain         step                   ()
    opt_state/0/count          ()        plain         opt_state/0/count      ()

1. What nothing needs is dropped: see below.
2. A rule may name one leaf of the *rest*, which is all but the model (`unmirrored.py`).
3. The other rules say what becomes of the model (`model_moves.py`).
4. A subtree of the rest whose leaves all have the path of a parameter, or lie below one, mirrors
   the model (`mirrors.py`). Nobody says that `mu` is a moment: that it holds `d/kernel`, and
   nothing else, shows it. What a rule does to a parameter it does to its leaf in every mirror
   (`follow.py`).
5. What mirrors nothing is plain. It goes along as it is. Refused is an array of the optimizer that
   may depend on the order or the shapes of the parameters, and any array that has a parameter's
   name outside of a mirror (`unmirrored.py`).

So each leaf gets a move: its path, the actions on it, and its place (`places.py`), or none if it is
dropped. What does not fit is a problem, and all problems are raised together. A leaf is left out
only if a rule drops it, if it is an empty node of the model, if `reset_optimizer` asks for it, or
if it exists only in nnx (random streams, for instance). Only the last gets a note.

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
from linen_nnx.book.specs import Spec
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
    """What becomes of a state, leaf for leaf, and what a person should know of it.

    The order of the moves is that of the leaves in the result, unless a given tree has one.
    """

    moves: list[Move[Leaf, Place]]
    as_they_are: list[str]
    """The paths of arrays that mirror nothing and may matter: a person should look at them.

    All that mirrors nothing goes along unchanged. Scalars are not listed, nor is anything where the
    model keeps all names and shapes.
    """
    notes: list[str]
    of_model: list[Move[Id, Id]]
    """What becomes of the model alone: from its `Id`s to those of the target."""


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
      state: what is there.
      to: the form that it gets.
      book: the rules, for the model.
      like: a tree of the target's form which the result must be like. The model gets its shapes
        and dtypes; its rest settles what the source does not tell, see `_Carrying.carry_rest`.
      reset_optimizer: leave the optimizer's state out.
      origin: a tree of the target's form that `state` was once made from. It settles the same of
        the rest where there is no `like`, and says nothing of shapes.
      specs: the shapes and dtypes of the target's model by path, as its code has them. Those of
        `like` come first: a note names the leaves that differ.

    Raises:
      RuleError: with everything that does not fit.
    """
    carrying = _Carrying(state.model, state.rest, state, to)
    if reset_optimizer:
        carrying.drop_optimizer()
    carrying.drop_empty_nodes()
    # An nnx state has leaves for which no Linen model has a place. Left in, they would match no
    # rule, and the book would be said not to fit.
    if not state.form.flat:
        carrying.drop_unruled(book)
    # A rule may name a leaf of the rest. It matches none of the model, which must not be reported
    # as a fault. From or to a stage the rest keeps its names, and needs no rule.
    rules_of_rest: frozenset[int] = frozenset()
    if not (state.form.stage or to.stage):
        rules_of_rest = carrying.carry_by_rule(book)
    # With the target's shapes the book can say what is missing, and fill what only the target has.
    if like is not None:
        due = {path_in_book(id, like.form.flat): leaf.spec for id, leaf in like.model.items()}
        carrying.note_differences(due, specs or {})
        specs = due
    of_model = carrying.carry_model(book, specs, rules_of_rest)
    carrying.carry_rest(of_model, like if like is not None else origin)
    return carrying.done(of_model, f"The checkpoint cannot go to {to}")


def carry_beside(
    item: State, model: State, to: Form, of_model: Sequence[Move[Id, Id]], given: State | None
) -> Carried | None:
    """Every move of an item that a checkpoint has beside the training state: an average, say.

    Args:
      item: that item, a state without a model.
      model: the training state, with the model that the item may mirror.
      to: the form that the item gets.
      of_model: what becomes of the model (`Carried.of_model`).
      given: the item of the target's form, see `_Carrying.carry_rest`.

    Returns:
      None if nothing of it mirrors the model, so that it may stay as it is.

    Raises:
      RuleError: with everything that does not fit, even if nothing mirrors the model.
    """
    carrying = _Carrying(model.model, item.rest, item, to)
    carrying.carry_rest(of_model, given)
    carried = carrying.done(of_model, f"An item beside the training state cannot go to {to}")
    found = any(place.mirrored for place in targets_of(carried.moves))
    return carried if found else None


class _Carrying:
    """One state on its way, and what has been found so far: moves, notes and problems.

    A method that drops leaves, or carries them by rule, takes them out of `state`. Then the model
    is carried, and last the rest.
    """

    def __init__(
        self, model: Mapping[Id, Leaf], rest: Mapping[str, Leaf], read: State, to: Form
    ) -> None:
        # The two dicts are copied, since leaves are taken out of them.
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
        """Leaves out empty nodes of the model: collections and modules without a leaf."""
        empty = [id for id, leaf in self.state.model.items() if leaf.empty]
        for id in empty:
            self._drop(self.state.model.pop(id))

    def drop_unruled(self, book: RuleBook) -> None:
        """Leaves out what lies in an nnx state and in no Linen model, and says so in a note."""
        # All is found before anything is taken away: a key is known to be that of a random stream
        # by the count beside it.
        for what, ids in list(unruled(self.state, book)):
            for id in ids:
                self._drop(self.state.model.pop(id))
            self.notes.append(f"{what}: {_some([id.path for id in ids])}")

    def note_differences(self, due: Mapping[str, Spec], specs: Mapping[str, Any]) -> None:
        """Notes where the model of the given tree differs from what the target's code says."""
        common = [path for path in due if path in specs]
        differing = [path for path in common if not Spec.of(specs[path]).same(due[path])]
        if differing:
            self.notes.append(
                "shapes and dtypes are those of the checkpoint given by --like, where the model's "
                f"code has others: {_some(differing)}"
            )

    def carry_by_rule(self, book: RuleBook) -> frozenset[int]:
        """Carries or drops the leaves of the rest that rules name; returns these rules' numbers."""
        model = (path_in_book(id, self.state.form.flat) for id in self.state.model)
        settled = ruled(self.state, model, book, self.to.side, self.problems)
        self.moves += settled.moves
        for path in settled.paths:
            del self.state.rest[path]
        return settled.rules

    def carry_model(
        self, book: RuleBook, specs: Mapping[str, Any] | None, rules_of_rest: frozenset[int]
    ) -> list[Move[Id, Id]]:
        """Carries the model; returns what becomes of it, which the rest follows.

        `rules_of_rest` need not match a leaf of the model.
        """
        of_model = model_moves(self.state, self.to, book, specs, self.problems, idle=rules_of_rest)
        for move in of_model:
            sources = tuple([self.state.model[id] for id in move.sources])
            places = tuple([Place(id) for id in move.targets])
            self.moves.append(Move(sources, places, move.actions, move.specs, move.rule))
        return of_model

    def carry_rest(self, of_model: Sequence[Move[Id, Id]], given: State | None) -> None:
        """Carries all that is left of the rest: first what mirrors the model, then what does not.

        Args:
          of_model: what becomes of the model.
          given: a tree in the target's form, if there is one: the one to match (`like`), or the one
            that the source was once made from (`origin`). Only the paths of its rest are used, and
            whether each is an array: they show which parameters have optimizer state, and whether
            the name of a collection stands in their paths.
        """
        trees = _mirrorable(of_model, self.state.form)
        subtrees, plain = find_subtrees(self.state.rest, trees)
        # Adafactor keeps `v_row`, `v_col` and `v`. It takes all three to know which axes of a
        # parameter it has factored.
        factoring = factorings(subtrees, self.state)
        is_array = None
        if given is not None:
            is_array = {path: leaf.zarr is not None for path, leaf in given.rest.items()}
        for subtree in subtrees:
            mirror = Mirror(
                subtree=subtree,
                state=self.state,
                to=self.to,
                below_collections=_are_below_collections(subtree.prefix, of_model, is_array),
                # `FACTORED` has these three names; the node is the one above them.
                factoring=factoring.get(subtree.node) if subtree.field in FACTORED else None,
                given=is_array,
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
        # Where the model keeps all names and shapes, nothing can depend on a change: plain arrays
        # are not asked about. So a state that only changes its layout is never refused for them.
        inert = all(move.sources == move.targets and not move.actions for move in of_model)
        # An array of an optimizer may depend on the parameters in the mirrors next to it.
        mirrored = {}
        for subtree in subtrees:
            mirrored[subtree.prefix] = {subtree.paths[path] for path in subtree.held}
        scope_of = scopes(plain, mirrored, of_model, self.state)
        names = set[str]()
        for tree in trees.values():
            names.update(tree)
        # `path` is the neutral one, equal in all forms; `leaf.path` is the one on disk.
        for path in plain:
            leaf = self.state.rest[path]
            place = Place(path=path, prefix=prefix_keys(path, leaf))
            self.moves.append(Move((leaf,), (place,)))
            if inert:
                continue
            # So begin paths outside of the training state's node.
            beside = path.startswith("../")
            side = self.state.form.side
            problem = check_plain(path, leaf, names, scope_of[path], side, beside)
            if problem is not None:
                self.problems.append(problem)
            elif leaf.zarr is not None and leaf.spec.shape:
                # Whoever knows the optimizer should see that nothing was done to it.
                self.as_they_are.append(leaf.path)

    def _drop(self, leaf: Leaf) -> None:
        self.moves.append(Move((leaf,), ()))


def _some(texts: Sequence[str]) -> str:
    """The first of some texts, and how many there are in all if that is more."""
    more = f", ... ({len(texts)})" if len(texts) > _SHOWN else ""
    return quoted(texts[:_SHOWN]) + more


def _are_below_collections(
    prefix: str, of_model: Sequence[Move[Id, Id]], given: Mapping[str, bool] | None
) -> bool:
    """Whether a mirror's targets lie below the names of their collections, by a given tree.

    They do where `TrainState.params` holds `{"params": ...}`. Then a moment of `d/kernel` is
    `opt_state/0/mu/params/d/kernel`: the level `params` is part of no parameter's path.
    """
    if given is None:
        return False
    # A parameter's path may be a node here, and no leaf: the optimizer SM3 keeps a list for each.
    nodes = branches_of(given) | given.keys()
    with_name = without_name = False
    for move in of_model:
        for id in move.targets:
            if id.collection:
                with_name |= f"{prefix}/{id.collection}/{id.path}" in nodes
                without_name |= f"{prefix}/{id.path}" in nodes
    return with_name and not without_name


def _mirrorable(of_model: Sequence[Move[Id, Id]], form: Form) -> dict[str, ModelPaths]:
    """What a subtree of the rest may mirror: one collection, or the model as a whole (`""`).

    Moments mirror the collection `params`, and so it comes first. An average of parameters and
    statistics together, `ema/params/...` and `ema/batch_stats/...`, mirrors the whole.
    """
    trees: dict[str, dict[str, Id]] = {"params": {}}
    everything = {}
    for move in of_model:
        for id in move.sources:
            # From stock nnx a leaf has no collection (`""`): it belongs to that of its target. One
            # that is dropped has no target and counts as a parameter, so that its moments are
            # dropped with it.
            collection = next((one.collection for one in (id, *move.targets) if one.collection), "")
            trees.setdefault(collection or "params", {})[id.path] = id
            everything[path_in_book(id, form.flat)] = id
    return {**trees, "": everything}
