"""A checkpoint from anywhere as the state of a stage: what `convert` does on disk, in memory.

A script of one's own has saved a `TrainState` of two layers. Training is to go on at stage `nnx`,
where the port calls the layers `up` and `down`:

    in the checkpoint                    in the state {"step", "params", "opt_state"} of that stage
    step                     int64       step                 int32, of the same value
    params/Dense_0/kernel                params/up/kernel
    params/Dense_1/kernel                params/down/kernel
    opt_state/0/mu/Dense_0/kernel        opt_state/0/0/mu/up/kernel
    ...                                  ...
    epoch                                left out, and named

Three things happen one after another, each by the code that does it elsewhere: `disk.state` sorts
the tree into the model and the rest, whatever its layout; a rule book leads from its names to those
of the ladder, if they differ; and `move` takes it from one form of the model to another. Here they
are for one layer, by `Ladder.load`:

    >>> import jax.numpy as jnp, tempfile
    >>> from flax import linen as nn, nnx, serialization
    >>> from linen_nnx import Ladder, RuleBook, Twin
    >>> class Port(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.up = nnx.Linear(2, 3, use_bias=False, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.up(x)
    >>> twin = Twin(lambda: nn.Dense(3, use_bias=False), Port, lambda: (jnp.ones((1, 2)),))
    >>> rules = {"version": 1, "rules": [{"linen": "params/kernel", "nnx": "up/kernel"}]}
    >>> ladder = Ladder(twin, RuleBook.from_dict(rules), say=print)
    >>> state = {"step": 7, "params": {"kernel": jnp.ones((2, 3))}, "epoch": 2}
    >>> file = Path(tempfile.mkdtemp(), "old.msgpack")
    >>> _ = file.write_bytes(serialization.to_bytes(state))
    >>> like = {"step": np.zeros((), np.int32), **ladder.at("nnx").abstract()}
    >>> loaded = ladder.load(file, "nnx", like)
    left out, as nothing here is called so: `epoch`
    >>> loaded["step"], loaded["step"].dtype, loaded["params"]["up"]["kernel"].shape
    (array(7, dtype=int32), dtype('int32'), (2, 3))
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from linen_nnx.book.moves import Move
from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.specs import Side, Spec
from linen_nnx.book.stages import Forms
from linen_nnx.book.tree import flatten, unflatten
from linen_nnx.disk.beside import items_beside
from linen_nnx.disk.carry import carry
from linen_nnx.disk.finding import find
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.mirrors import owner
from linen_nnx.disk.places import Place
from linen_nnx.disk.runs import NO_RUNS, Runs
from linen_nnx.disk.sides import guess_side
from linen_nnx.disk.state import OPTIMIZER, Form, State, read_state, unruled
from linen_nnx.ladder.forms import FittedBook, differences
from linen_nnx.ladder.move import move
from linen_nnx.ladder.nesting import renamed

_OTHER: dict[Side, Side] = {"linen": "nnx", "nnx": "linen"}
Say = Callable[[str], None]
Specs = dict[str, Spec]


class Checkpoint:
    """A checkpoint that is to be continued on a ladder.

    Attributes:
      path: the folder of the step, or the file.
      step: how many steps its training has made.
      entries: what it holds beside the model, by the first names: `step`, `opt_state`, `ema`.
      notes: what a person should know of how it was found.
    """

    def __init__(
        self,
        book: FittedBook,
        path: str | Path,
        rules: RuleBook | None = None,
        runs: Runs = NO_RUNS,
    ) -> None:
        """Finds a checkpoint, and reads no array but its step.

        Args:
          book: the ladder's rule book, fitted to its model.
          path: any checkpoint that `convert` reads.
          rules: leads from the names of the checkpoint to those of the ladder. The checkpoint's
            stand on the side that it is of (`linen`, say). The ladder's stand on the other side,
            in either form. None where the names are the same.
          runs: what a training code says of its runs.

        Raises:
          StoreError: if there is no checkpoint, or it cannot be read.
          RuleError: if its layout is not clear.
        """
        self._book, self._rules = book, rules
        self._source = find(path, runs=runs)
        self.path = self._source.folder
        self.notes = list(self._source.notes)
        # The tree alone: what a checkpoint holds, and from which step it goes on, is said before
        # gigabytes are read.
        self._state = self._read()
        self.entries = set(self._by_entry())
        self.step = self._step()

    def load(self, stage: str, forms: Forms, like: Any, fresh: Collection[str], say: Say) -> Any:
        """The arrays of the checkpoint as a state of a stage.

        Args:
          stage: its name, for messages; `forms`: the form of each part there.
          like: a pytree of arrays or shapes: a `TrainState`, a dict. Its entries are `params`, the
            model's collections, `step`, `opt_state`, and others that the checkpoint has.
          fresh: entries that are not read: there the result has what `like` has.
          say: is told what was assumed and what is left out, a line each.

        Returns:
          A tree like `like`, of numpy arrays.

        Raises:
          RuleError: naming everything that is missing, misshapen, or cannot be taken along.
        """
        due = {path: leaf for path, leaf in _named(like).items() if _entry(path) not in fresh}
        problems: list[str] = []
        rest = self._chosen(due, fresh, problems, say)
        moves, before = self._moves(rest, say)
        specs: Specs = {}
        for one in moves:
            specs.update(zip(one.targets, one.specs, strict=True))
        problems += self._misfits(specs, due, before)
        # A script may nest its chain of optax in another way than the run that goes on with it.
        places: dict[str, str] = {}
        if any(_entry(name) == OPTIMIZER for name in specs):
            try:
                places = renamed(
                    _below(specs, OPTIMIZER),
                    _below(due, OPTIMIZER),
                    _below(specs, "params").keys(),
                    _below(self._book.abstract(forms), "params").keys(),
                )
            except RuleError as error:
                problems += error.problems
        # All that shapes can tell is refused together, before the first array is read.
        self._refuse(problems)

        tree = unflatten(self._arrays(moves))
        if dict(before) != dict(forms):
            tree = move(self._book, tree, before, forms, stage, say)
        found: dict[str, Any] = {}
        for path, array in flatten(tree).items():
            head, _, below = path.partition("/")
            found[f"{head}/{_placed(below, places)}" if head == OPTIMIZER else path] = array
        if "step" in due:
            found["step"] = _as_step(found.get("step", self.step), due["step"])
        self._refuse(differences(found, due))

        # An entry that is not read keeps what `like` has, which may be arrays or shapes.
        def pick(path: Any, leaf: Any) -> Any:
            return found.get(_name(path), leaf)

        return jax.tree_util.tree_map_with_path(pick, like)

    def _refuse(self, problems: Sequence[str]) -> None:
        if problems:
            raise RuleError(f"{self.path} cannot be continued", problems)

    def _read(self) -> State:
        """The tree of the checkpoint, sorted into the model and the rest."""
        source, said = self._source, self._source.said
        # A checkpoint of a ladder says the form of each part, so nothing has to be guessed.
        if said is not None and self._rules is None:
            form = Form("linen", said.stage, said.forms)
            return read_state(source.leaves, form, self._book.rules)
        if said is not None and "nnx" in said.forms.values():
            raise RuleError(
                f"{self.path} is at stage {said.stage}",
                ["rules lead from the names of one framework: translate it to stage linen first"],
            )
        known = self._rules or self._book.rules
        side = guess_side(source.leaves, known)
        sides: list[Side] = ["linen", "nnx"] if side is None else [side]
        states = [read_state(source.leaves, Form(side), known) for side in sides]
        # Where names and rule book fit both forms, shapes may tell: nnx stores a fused kernel where
        # Linen has several.
        return min(states, key=self._foreign_leaves)

    def _foreign_leaves(self, state: State) -> int:
        """How many leaves of a model in stock form the ladder does not know."""
        known: Specs = {}
        for name, spec in self._book.specs[state.form.side].items():
            known[name.split("/", 1)[1]] = spec
        count = 0
        for id, leaf in state.model.items():
            spec = known.get(id.path)
            count += spec is None or not leaf.spec.same(spec)
        return count

    def _step(self) -> int:
        """How many steps have been made: as it is saved, else as the folder says, else none."""
        leaf = self._state.rest.get("step")
        if leaf is not None and leaf.zarr is not None and not leaf.spec.shape:
            return int(self._source.reader.read([leaf])[0])
        # Some keep no count: then the folder's name is one, as in `checkpoints/400`.
        chosen = self._source.step
        counted = int(chosen.number) if chosen is not None and chosen.is_counted else None
        said = "no step has been made" if counted is None else f"it is step {counted}, as named"
        self.notes.append(f"{self.path} holds no count of steps: {said}")
        return counted or 0

    def _chosen(
        self, due: Mapping[str, Any], fresh: Collection[str], problems: list[str], say: Say
    ) -> dict[str, Leaf]:
        """The leaves of the rest that are taken, by the path that they get.

        Of entries that are not taken, those that the result needs go to `problems`, and `say` is
        told of the others.
        """
        entries = self._by_entry()
        collections = {_entry(name) for name in self._book.specs["linen"]}
        # In the order of the result, in which people look for them.
        wanted = list(dict.fromkeys([_entry(path) for path in due]))
        taken: dict[str, Leaf] = {}
        for entry in wanted:
            if entry in collections or entry == "step":
                # A collection may lie beside the node that the model is read from: then it is rest,
                # too. The step need not be there, as the folder may have it.
                taken |= entries.pop(entry, {})
                continue
            name = entry if entry in entries else self._average(entries, wanted)
            if name is None:
                problems.append(f"it has no `{entry}`")
                continue
            if name != entry:
                say(f"`{name}` mirrors the parameters, and is taken for `{entry}`")
            for path, leaf in entries.pop(name).items():
                taken[entry + path.removeprefix(name)] = leaf
        left = [*entries, *[f"item {name}" for name in items_beside(self._source)]]
        said = [f"`{entry}`" for entry in left if entry not in fresh]
        if said and self._source.said is not None:
            # A checkpoint that says its stage is continued exactly: nothing of it may be lost.
            problems += [f"{entry} has no place here" for entry in said]
        elif said:
            say(f"left out, as nothing here is called so: {', '.join(said)}")
        return taken

    def _by_entry(self) -> dict[str, dict[str, Leaf]]:
        """The arrays beside the model, `{entry: {path: leaf}}`."""
        entries: dict[str, dict[str, Leaf]] = {}
        for path, leaf in self._state.rest.items():
            if leaf.zarr is not None:
                own = path.removeprefix("../")
                entries.setdefault(_entry(own), {})[own] = leaf
        return entries

    def _average(
        self, entries: Mapping[str, Mapping[str, Leaf]], wanted: Sequence[str]
    ) -> str | None:
        """The one entry of another name that mirrors the parameters; None if there are several.

        Such an entry is an average of the parameters, whatever it is called: `ema_params`, say.
        """
        model = {id.path: leaf for id, leaf in self._state.model.items()}
        found: list[str] = []
        for name, leaves in entries.items():
            if name in wanted:
                continue
            for path, leaf in leaves.items():
                mirrored = model.get(path.removeprefix(f"{name}/"))
                if mirrored is None or not leaf.spec.same(mirrored.spec):
                    break
            else:
                found.append(name)
        return found[0] if len(found) == 1 else None

    def _moves(self, rest: dict[str, Leaf], say: Say) -> tuple[list[Move[Leaf, str]], Forms]:
        """What leaves become, by their names on the ladder, and the form that each part is in.

        rest: the leaves beside the model that are taken, by path.
        """
        if self._rules is not None:
            return self._ruled(self._rules, rest, say)
        form, model = self._state.form, dict(self._state.model)
        if not form.flat:
            # A state of nnx may hold what is no variable of the model, such as the counts of its
            # random streams.
            for what, ids in unruled(self._state, self._book.rules):
                say(f"{what}: {', '.join(model.pop(id).path for id in ids)}")
        named = {name.split("/", 1)[1]: name for name in self._book.specs["nnx"]}
        params = {id.path for id in model if id.collection == "params"}
        moves: list[Move[Leaf, str]] = []
        for path, leaf in rest.items():
            moves.append(Move((leaf,), (_without_level(path, params),), specs=(leaf.spec,)))
        for id, leaf in model.items():
            if leaf.zarr is None:
                continue  # an empty node
            if form.flat:
                name = f"{id.collection}/{id.path}"
            else:
                # A state of nnx does not say the collection of a leaf: the ladder knows it.
                name = named.get(id.path, f"params/{id.path}")
            moves.append(Move((leaf,), (name,), specs=(leaf.spec,)))
        return moves, form.parts or dict.fromkeys(self._book.parts, form.side)

    def _ruled(
        self, rules: RuleBook, rest: dict[str, Leaf], say: Say
    ) -> tuple[list[Move[Leaf, str]], Forms]:
        """The same where rules lead from the names of the checkpoint to those of the ladder."""
        state = State(self._state.form, self._state.layout, self._state.model, rest)
        carried = carry(state, Form(_OTHER[state.form.side]), rules)
        for note in carried.notes:
            say(note)
        paths: list[str] = []
        for one in carried.moves:
            paths += [place.id.path for place in one.targets if place.id is not None]
        side = self._side_of(paths)
        moves: list[Move[Leaf, str]] = []
        for one in carried.moves:
            if not one.targets or any(leaf.zarr is None for leaf in one.sources):
                continue  # a leaf that a rule drops, or an empty node
            specs = one.specs if one.actions else tuple([leaf.spec for leaf in one.sources])
            names = tuple([self._ladder_name(place, side) for place in one.targets])
            moves.append(Move(one.sources, names, one.actions, specs, one.rule))
        return moves, dict.fromkeys(self._book.parts, side)

    def _side_of(self, paths: Sequence[str]) -> Side:
        """The form of the ladder whose names the rules have led to: the one that has more of them.

        paths: where the rules lead to, `collection/path` for a Linen name, `path` for an nnx name.
        """
        if self._state.form.side == "nnx":
            return "linen"
        linen = self._book.specs["linen"]
        nnx = {name.split("/", 1)[1] for name in self._book.specs["nnx"]}
        of_linen = sum(path in linen for path in paths)
        of_nnx = sum(path in nnx for path in paths)
        return "linen" if of_linen > of_nnx else "nnx"

    def _ladder_name(self, place: Place, side: Side) -> str:
        """The name of a place that rules have led to: `collection/part/path`, or its own path.

        A rule may say `params/torso/kernel` on the nnx side, where a Linen name of the ladder is
        meant. Then a moment is at `mu/params/torso/kernel`, and loses the level `params`.
        """
        # From nnx the rules lead to Linen names, which have their collection in the path.
        from_linen = self._state.form.side == "linen"
        if place.id is not None:
            collection, path = place.id
            return path if side == "linen" and from_linen else f"{collection}/{path}"
        mirrored = list(place.mirrored)
        if side == "linen" and from_linen and mirrored:
            mirrored = mirrored[1:]
        names = [key.name for key in place.prefix]
        return "/".join([*names, *mirrored, *(key.name for key in place.tail)])

    def _misfits(self, specs: Specs, due: Mapping[str, Any], before: Forms) -> list[str]:
        """Every difference between the model in the checkpoint and the ladder's.

        The collections that the result does not ask for are not compared.
        """
        collections = {_entry(name) for name in self._book.specs["linen"]}
        compared = collections & {_entry(path) for path in due}
        expected = self._book.abstract(before)
        return differences(
            {name: spec for name, spec in specs.items() if _entry(name) in compared},
            {name: spec for name, spec in expected.items() if _entry(name) in compared},
        )

    def _arrays(self, moves: Sequence[Move[Leaf, str]]) -> dict[str, Any]:
        """The arrays by their names on the ladder."""
        leaves: list[Leaf] = []
        for one in moves:
            leaves += one.sources
        # All at once, as reading overlaps.
        read = iter(self._source.reader.read(leaves))
        arrays: dict[str, Any] = {}
        for one in moves:
            results = one.run([next(read) for _ in one.sources])
            arrays.update(zip(one.targets, results, strict=True))
        return arrays


def _entry(path: str) -> str:
    return path.split("/")[0]


def _below(leaves: Mapping[str, Any], entry: str) -> dict[str, Any]:
    """The leaves of one entry, by the path below it."""
    start = f"{entry}/"
    return {p.removeprefix(start): leaf for p, leaf in leaves.items() if p.startswith(start)}


def _without_level(path: str, params: Collection[str]) -> str:
    """The path of a leaf without the level `params` that a mirror of the parameters may have.

    `TrainState.params` may hold `{"params": ...}`, and then every moment does.

    Example:
      >>> _without_level("opt_state/0/mu/params/Dense_0/kernel", ["Dense_0/kernel"])
      'opt_state/0/mu/Dense_0/kernel'
    """
    head, level, below = path.partition("/params/")
    return f"{head}/{below}" if level and owner(below, params) is not None else path


def _placed(path: str, places: Mapping[str, str]) -> str:
    """The path of a leaf of an optimizer's state in another one.

    places: where each field of the one is in the other, as `renamed` says.

    Example:
      >>> _placed("1/0/mu/up/kernel", {"1/0/mu": "0/mu"})
      '0/mu/up/kernel'
    """
    # A field may be a moment with many leaves below it: the longest path that is known counts.
    field = path
    while field and field not in places:
        field = field.rpartition("/")[0]
    return places.get(field, field) + path.removeprefix(field)


def _as_step(value: Any, due: Any) -> np.ndarray:
    """A count of steps, whatever type of integers it has been kept in."""
    # A Python int in TrainState, uint32 in nnx.Optimizer, int32 in optax.
    array = np.asarray(value)
    return array.astype(due.dtype) if array.dtype.kind in "iu" and not array.shape else array


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _named(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by path; a number is an array."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_name(p): leaf if hasattr(leaf, "shape") else np.asarray(leaf) for p, leaf in leaves}
