"""Plans a conversion: what it would do to every leaf, decided before anything is written.

    source    --read_state-->  state    a tree of leaves, sorted into the model and the rest
    state     --carry------->  moves    from each leaf to a place, by the rule book
    moves     --lay_out----->  moves    from each leaf to a leaf with keys on disk
    moves     --settled----->  moves    each target with its metadata, and so with its engine

Items beside the training state's own go the same way, by what becomes of the model. So whatever
does not fit is refused while the disk is as it was.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from linen_nnx.book.grammar import did_you_mean
from linen_nnx.book.moves import Move, targets_of
from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.specs import Side
from linen_nnx.book.stages import STAGES
from linen_nnx.disk.beside import (
    head_in,
    head_of,
    is_optimizer,
    items_beside,
    read_beside,
    source_of,
    without_head,
)
from linen_nnx.disk.carry import Carried, carry, carry_beside
from linen_nnx.disk.complete import check_complete
from linen_nnx.disk.conversion import RULES, Conversion, Options
from linen_nnx.disk.engines import settled
from linen_nnx.disk.finding import find
from linen_nnx.disk.layouts import lay_out
from linen_nnx.disk.leaves import Keys, Leaf
from linen_nnx.disk.origin import Origin, origin_of
from linen_nnx.disk.remote import as_path
from linen_nnx.disk.runs import NO_RUNS, Runs
from linen_nnx.disk.sides import guess_side
from linen_nnx.disk.sources import Source
from linen_nnx.disk.state import Form, State, read_state
from linen_nnx.errors import quoted

MODEL_ALONE = (".safetensors", ".npz")
"""The formats of files that hold arrays by flat names, and so no training state."""


def plan_conversion(
    path: str | Path | Source,
    to: str,
    rules: str | Path | RuleBook | None = None,
    step: float | None = None,
    item: str | None = None,
    like: str | Path | Source | None = None,
    reset_optimizer: bool = False,
    suffix: str = "",
    root: str | None = None,
    prefix: Sequence[str] = (),
    model_only: bool = False,
    side: Side | None = None,
    specs: Mapping[str, Any] | None = None,
    runs: Runs = NO_RUNS,
) -> Conversion:
    """Plans the conversion of the checkpoint at `path`.

    Args:
      path: a run directory, a CheckpointManager's root or step, an Orbax item, or a file; or
        what `finding.find` has found there.
      to: `linen` or `nnx` for stock layouts; of a checkpoint that says the form of its parts
        (`runs.py`), a stage's name. For a whole run directory `linen` and `nnx` are stages, too.
      rules: the rule book, or its file; runs and converted checkpoints have one with them.
      step: which step of a root, if not the latest.
      item: which item of a step holds the state, if several may.
      like: a checkpoint that the result must equal in all but values.
      reset_optimizer: leave the optimizer's state out.
      suffix: of the file to be written, if it is one.
      root: the folder of steps in a run directory, if not that of the latest.
      prefix: which group of steps, where a folder has several: see `finding.find`.
      model_only: leave out all but the model.
      side: which side the checkpoint is of, where neither it nor the rule book tells.
      specs: the shape and dtype of each leaf of the target's model by path, where they are known.
      runs: what a training code says of its runs.

    Raises:
      StoreError: if there is no checkpoint, or it cannot be read.
      RuleError: with everything that does not fit.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> folder = tempfile.TemporaryDirectory()
      >>> source = Path(folder.name, "linen.npz")
      >>> np.savez(source, **{"params/d/kernel": np.ones((6, 3), "float32")})
      >>> rule = {"linen": "params/d/kernel", "nnx": "a/w"}
      >>> plan = plan_conversion(source, "nnx", RuleBook.from_dict({"version": 1, "rules": [rule]}))
      >>> [(move.sources[0].path, move.targets[0].path) for move in plan.moves]
      [('params/d/kernel', 'a/w/value')]
      >>> folder.cleanup()
    """
    options = Options(reset_optimizer, model_only, side, item, step, tuple(prefix))
    source = path if isinstance(path, Source) else find(path, step, item, root, prefix, runs)
    form, target = _forms(source, to)
    book = _rule_book(source, rules)
    if form is None:
        form = Form(_side(source, book, target.side, side))
    state = _chosen(read_state(source.leaves, form, book), suffix, model_only)
    # A tree that the result must equal, and a tree that the state once was: either settles what
    # the state itself cannot tell.
    given = find(like, runs=runs) if isinstance(like, str | Path) else like
    known = origin_of(source, target)
    wanted = None if given is None else read_state(given.leaves, target, book)
    origin = None if known is None else read_state(known.leaves, target, book)
    if model_only:
        wanted, origin = _model_of(wanted), _model_of(origin)
    carried = carry(state, target, book, wanted, reset_optimizer, origin, specs)
    laid_out = lay_out(carried.moves, state.form, target, wanted, origin)
    # Lost bytes are asked for now: reading them where they are missing would give zeros.
    notes = [*source.notes, *check_complete(source.items), *carried.notes]
    notes += _notes(carried, state, target, settled=wanted is not None or origin is not None)
    conversion = Conversion(
        source,
        state,
        target,
        book,
        _settled(laid_out, source),
        to,
        options,
        tuple(carried.as_they_are),
        tuple(notes),
        suffix,
    )
    if form.stage or target.stage:
        return conversion  # a run keeps its whole state in one item
    return _with_items(conversion, carried, given, known)


def _model_of(state: State | None) -> State | None:
    """A state without its rest."""
    return None if state is None else State(state.form, state.layout, state.model)


def _settled(moves: Sequence[Move[Leaf, Leaf]], source: Source) -> tuple[Move[Leaf, Leaf], ...]:
    """The moves with all that decides how their targets are written."""
    zarr3 = bool(source.items) and source.items[0].zarr3
    return tuple(settled(move, zarr3) for move in moves)


def _with_items(
    conversion: Conversion, carried: Carried, like: Source | None, origin: Origin | None
) -> Conversion:
    """The conversion with those of the items beside the state's own, each said in a note."""
    options = conversion.options
    beside: dict[str, Conversion | None] = {}
    notes: list[str] = []
    for name, path in items_beside(conversion.source).items():
        source = source_of(conversion.source, path)
        head = head_of(name, source.leaves, conversion.state.form.side)
        if conversion.suffix and not options.model_only:
            raise RuleError(
                f"a file holds one item, and the step has `{name}` beside it",
                ["write a directory, or leave it out with --model-only"],
            )
        if options.model_only or (options.reset_optimizer and is_optimizer(head)):
            beside[name] = None
            notes.append(f"item `{name}` is left out")
            continue
        known = None if origin is None else origin.beside.get(name)
        found = _item(conversion, source, carried, head, _item_like(like, name), known)
        if found is None:
            notes.append(f"item `{name}` mirrors no parameter, and goes along as it is")
            continue
        beside[name] = found
        notes += [f"item `{name}`: {note}" for note in found.notes]
        count = len(list(targets_of(found.moves)))
        notes.append(f"item `{name}` is converted, too: {count} leaves")
    return replace(conversion, beside=beside, notes=(*conversion.notes, *notes))


def _item_like(like: Source | None, name: str) -> Source | None:
    """The item of a name in a checkpoint that the result must be like."""
    if like is None:
        return None
    path = items_beside(like).get(name)
    return None if path is None else source_of(like, path)


def _item(
    conversion: Conversion,
    source: Source,
    carried: Carried,
    head: Keys,
    like: Source | None,
    origin: Sequence[Leaf] | None,
) -> Conversion | None:
    """The conversion of an item beside the state's; None if nothing in it mirrors the model.

    Args:
      conversion: that of the state. `carried`: what becomes of the state.
      source: the item. `head`: where its tree would lie in the state.
      like: the item of that name that the result must equal; `origin`: the one that it once was.
    """
    form, target = conversion.state.form, conversion.to
    state = read_beside(source.leaves, head, form)
    new = head_in(head, target.side)
    wanted = None if like is None else read_beside(like.leaves, new, target)
    known = None if origin is None else read_beside(origin, new, target)
    given = known if wanted is None else wanted
    found = carry_beside(state, conversion.state, target, carried.of_model, given)
    if found is None:
        return None
    # The head was put in front for the sake of the rules alone.
    moves = []
    for move in lay_out(found.moves, form, target, wanted, known):
        moves.append(without_head(move, len(head), len(new)))
    return replace(
        conversion,
        source=source,
        state=state,
        moves=_settled(moves, source),
        as_they_are=tuple(found.as_they_are),
        notes=(*check_complete(source.items), *found.notes),
        beside={},
    )


def _side(source: Source, book: RuleBook, target: Side, given: Side | None) -> Side:
    """The side that a stock checkpoint is of: as it was given, or as it looks."""
    # Said by hand it counts more than how it looks: names of both sides may be equal.
    side = given or guess_side(source.leaves, book)
    if side is None:
        raise RuleError(
            f"{source.path} may be of either form",
            ["names and rule book fit both: say which with --from linen or --from nnx"],
        )
    if side == target:
        how = "is said to be in" if given else "looks like"
        hint = "" if given else "; if it is not, say so with --from"
        text = f"it {how} {side} form already{hint}"
        raise RuleError(f"{source.path} cannot go to {target}", [text])
    return side


def _chosen(state: State, suffix: str, model_only: bool) -> State:
    """The part of a state that was asked for. Refuses what a file's format cannot hold."""
    if model_only:
        return State(state.form, f"{state.layout} (the model alone)", state.model)
    lost = [leaf.path for leaf in state.rest.values() if not leaf.empty]
    if lost and suffix in MODEL_ALONE:
        shown = quoted(lost[:3])
        more = ", ..." if len(lost) > 3 else ""
        raise RuleError(
            f"a {suffix} file holds the model alone",
            [
                f"{len(lost)} leaves would be lost ({shown}{more}): write a directory or a "
                ".msgpack file, or leave them out with --model-only"
            ],
        )
    return state


def _notes(carried: Carried, state: State, target: Form, settled: bool) -> list[str]:
    """What a person should know of the result.

    settled: whether a tree is known that the result must be restored into.
    """
    notes: list[str] = []
    has_optimizer = any(place.in_optimizer for place in targets_of(carried.moves))
    if target.flat and not state.form.flat and has_optimizer and not settled:
        notes.append(
            "nnx form lacks the empty states of an optimizer chain, which a restore into a "
            "TrainState needs: save a fresh TrainState of the same model and optimizer with "
            "Orbax, and convert again with --like and its path"
        )
    if not target.flat:
        notes.append(
            "Linen keeps no random state: a model that has some is restored into "
            "`nnx.state(model, nnx.All(nnx.Variable, nnx.Not(nnx.RngState)))`"
        )
    copied = [move for move in carried.of_model if move.copies]
    if has_optimizer and copied:
        names = quoted([move.sources[0].path for move in copied[:3]])
        notes.append(
            f"the optimizer's state of {names} is copied to each of its homes; it was made by the "
            "sum of their gradients (--reset-optimizer starts afresh)"
        )
    return notes


def _forms(source: Source, to: str) -> tuple[Form | None, Form]:
    """The source's form, if it is known, and the target's."""
    form, known = None, {"linen": Form("linen"), "nnx": Form("nnx")}
    if source.said is not None:
        form = Form("linen", source.said.stage, source.said.forms)
        stages = {name: Form("linen", name, source.said.at(name)) for name in STAGES}
        # Of a whole run, `linen` and `nnx` are stages: it goes on as a run. Of one checkpoint they
        # are the stock layouts, which leave the ladder.
        known = stages if source.kind == "run" else stages | known
    elif source.kind == "run":
        raise RuleError(
            f"{source.path} is a run directory",
            [f"its checkpoint {source.folder} does not say in which form the model is"],
        )
    if to not in known:
        hint = "; stages are for checkpoints that say the form of their parts"
        hint = hint if to in STAGES else ""
        text = f"known: {', '.join(known)}{hint}{did_you_mean(to, known)}"
        raise RuleError(f"unknown target `{to}`", [text])
    return form, known[to]


def _rule_book(source: Source, rules: str | Path | RuleBook | None) -> RuleBook:
    """The rule book: the one given, else the one that the checkpoint says, else the one beside it.

    Raises `RuleError` if there is none.
    """
    if isinstance(rules, RuleBook):
        return rules
    if rules is not None:
        return RuleBook.load(as_path(rules))
    if source.said is not None and source.said.rules is not None:
        return RuleBook.from_dict(source.said.rules, name=f"the rule book of {source.path}")
    own = source.folder / RULES
    if own.is_file():
        return RuleBook.load(own)
    raise RuleError(f"{source.path} has no rule book with it", ["give one with --rules FILE"])
