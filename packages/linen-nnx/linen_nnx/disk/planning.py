"""Plans a conversion: what it would do to every leaf, decided before anything is written."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from linen_nnx.book.grammar import did_you_mean
from linen_nnx.book.ops import Copies, Side
from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
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
from linen_nnx.disk.layouts import Change, lay_out
from linen_nnx.disk.leaves import Key, Leaf
from linen_nnx.disk.origin import Origin, origin_of
from linen_nnx.disk.rekey import Job, choose
from linen_nnx.disk.runs import NO_RUNS, Runs
from linen_nnx.disk.sides import guess_side
from linen_nnx.disk.sources import Source, find
from linen_nnx.disk.state import Form, State, read_state

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
    part: str | None = None,
    prefix: Sequence[str] = (),
    model_only: bool = False,
    side: Side | None = None,
    specs: Mapping[str, Any] | None = None,
    runs: Runs = NO_RUNS,
) -> Conversion:
    """Plans the conversion of the checkpoint at `path`.

    Args:
      path: a run directory, a CheckpointManager's root or step, an Orbax item, or a file; or
        what `sources.find` has found there.
      to: `linen` or `nnx` for stock layouts; of a checkpoint that says the form of its parts
        (`runs.py`), a stage's name. For a whole run directory `linen` and `nnx` are stages, too.
      rules: the rule book, or its file; runs and converted checkpoints have one with them.
      step: which step of a root, if not the latest.
      item: which item of a step holds the state, if several may.
      like: a checkpoint that the result must equal in all but values.
      reset_optimizer: leave the optimizer's state out.
      suffix: of the file to be written, if it is one.
      part: the folder of a run directory, if not that of the latest steps.
      prefix: which group of steps, where a folder has several: see `sources.find`.
      model_only: leave out all but the model.
      side: which side the checkpoint is of, where neither it nor the rule book tells.
      specs: the shape and dtype of each leaf of the target's model by path, where they are known.
      runs: what a training code says of its runs.

    Raises:
      StoreError: if there is no checkpoint, or it cannot be read.
      RuleError: with everything that does not fit.
    """
    options = Options(reset_optimizer, model_only, side, item, step, tuple(prefix))
    source = path if isinstance(path, Source) else find(path, step, item, part, prefix, runs)
    form, target = _forms(source, to)
    book = _rule_book(source, rules)
    if form is None:
        form = Form(_side(source, book, target.side, side))
    state = _chosen(read_state(source.leaves, form, book), suffix, model_only)
    given = find(like, runs=runs) if isinstance(like, str | Path) else like
    wanted = None if given is None else read_state(given.leaves, target, book)
    known = origin_of(source, target)
    origin = None if known is None else read_state(known.leaves, target, book)
    if model_only:
        wanted, origin = (s and State(s.form, s.layout, s.model) for s in (wanted, origin))
    carried = carry(state, target, book, wanted, reset_optimizer, origin, specs)
    changes = lay_out(carried.moves, state.form, target, wanted, origin)
    notes = [*source.notes, *check_complete(source.items), *carried.notes]
    notes += _notes(carried, state, target, settled=bool(wanted or origin))
    conversion = Conversion(
        source,
        state,
        target,
        book,
        _jobs(changes, source),
        to,
        options,
        tuple(carried.as_they_are),
        tuple(notes),
        suffix,
    )
    if form.stage or target.stage:
        return conversion
    return _with_items(conversion, carried, given, known)


def _jobs(changes: Sequence[Change], source: Source) -> tuple[Job, ...]:
    """The engine for each change."""
    zarr3 = bool(source.items) and source.items[0].zarr3
    return tuple(choose(change, zarr3) for change in changes)


def _with_items(
    conversion: Conversion, carried: Carried, like: Source | None, origin: Origin | None
) -> Conversion:
    """The conversion with those of the items beside the state's own, each said in a note."""
    options, suffix = conversion.options, conversion.suffix
    beside: dict[str, Conversion | None] = {}
    notes: list[str] = []
    for name, path in items_beside(conversion.source).items():
        source = source_of(conversion.source, path)
        head = head_of(name, source.leaves, conversion.state.form.side)
        reset = options.reset_optimizer and is_optimizer(head)
        if suffix and not options.model_only:
            raise RuleError(
                f"a file holds one item, and the step has `{name}` beside it",
                ["write a directory, or leave it out with --model-only"],
            )
        if options.model_only or reset:
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
        notes.append(
            f"item `{name}` is converted, too: {sum(len(j.targets) for j in found.jobs)} leaves"
        )
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
    head: tuple[Key, ...],
    like: Source | None,
    origin: Sequence[Leaf] | None,
) -> Conversion | None:
    """The conversion of an item beside the state's; None if nothing in it mirrors the model."""
    form, target = conversion.state.form, conversion.to
    state = read_beside(source.leaves, head, form)
    new = head_in(head, target.side)
    wanted = None if like is None else read_beside(like.leaves, new, target)
    known = None if origin is None else read_beside(origin, new, target)
    found = carry_beside(state, conversion.state, target, carried.steps, wanted or known)
    if found is None:
        return None
    changes = [
        without_head(change, len(head), len(new))
        for change in lay_out(found.moves, form, target, wanted, known)
    ]
    return replace(
        conversion,
        source=source,
        state=state,
        jobs=_jobs(changes, source),
        as_they_are=tuple(found.as_they_are),
        notes=(*check_complete(source.items), *found.notes),
        beside={},
    )


def _side(source: Source, book: RuleBook, target: Side, given: Side | None) -> Side:
    """The side that a stock checkpoint is of: as it was given, or as it looks."""
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
    lost = [leaf.path for leaf in state.rest.values() if not leaf.empty]
    if model_only:
        return State(state.form, f"{state.layout} (the model alone)", state.model)
    if lost and suffix in MODEL_ALONE:
        shown = ", ".join(f"`{path}`" for path in lost[:3])
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
    optimizer = any(place.in_optimizer for move in carried.moves for place in move.targets)
    if target.flat and not state.form.flat and optimizer and not settled:
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
    copied = [s for s in carried.steps if any(isinstance(a, Copies) for a in s.actions)]
    if optimizer and copied:
        names = ", ".join(f"`{step.sources[0].path}`" for step in copied[:3])
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
    if isinstance(rules, RuleBook):
        return rules
    if rules is not None:
        return RuleBook.load(rules)
    if source.said is not None and source.said.rules is not None:
        return RuleBook.from_dict(source.said.rules, name=f"the rule book of {source.path}")
    own = source.folder / RULES
    if own.is_file():
        return RuleBook.load(own)
    raise RuleError(f"{source.path} has no rule book with it", ["give one with --rules FILE"])
