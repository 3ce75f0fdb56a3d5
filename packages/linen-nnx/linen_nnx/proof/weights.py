"""Weights that are the same on both sides: of checkpoints, or at random.

    checkpoints      Linen side            nnx side
    none             random                carried over by the rule book
    one of Linen     the checkpoint's      carried over
    one of nnx       carried over          the checkpoint's
    one of each      the checkpoint's      the checkpoint's; a note if they differ

With one set of weights, what the two sides give differs by their code alone.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.specs import Side
from linen_nnx.disk.finding import find
from linen_nnx.disk.runs import Runs
from linen_nnx.disk.sides import guess_side
from linen_nnx.disk.state import Form, read_state
from linen_nnx.infer.counted import Counted
from linen_nnx.infer.run import distinct
from linen_nnx.infer.sides import SlottedSide
from linen_nnx.infer.trial import equalised
from linen_nnx.proof.compare import spec
from linen_nnx.proof.mates import few

Array = np.ndarray
Leaves = dict[str, Any]
"""The values of one side's leaves, by path."""


def weights(
    linen: SlottedSide,
    nnx: SlottedSide,
    book: RuleBook,
    mate: Array,
    checkpoints: Sequence[str | Path],
    runs: Runs,
) -> tuple[Leaves, Leaves, list[str]]:
    """The leaves of both sides, and notes.

    Args:
      linen: the Linen side.
      nnx: the nnx side.
      book: the rules that carry leaves over.
      mate: (nnx elements,), as `mates` returns it, for the leaves without a rule.
      checkpoints: none, one of either form, or one of each.
      runs: what a training code says of its runs.

    Raises:
      RuleError: when two checkpoints are of one form, or one does not fit the twin.
      StoreError: when a checkpoint cannot be read.
    """
    found = dict(_saved(path, book, runs) for path in checkpoints)
    if len(found) < len(checkpoints):
        raise RuleError(
            "Two checkpoints must be one of each form", [f"both look like {next(iter(found))} form"]
        )
    for side in (linen, nnx):
        _check(side, found.get(side.trace.side, side.trace.leaves))
    notes: list[str] = []
    # Leaves that the rules make one must be equal, or no weights of the nnx side were the same.
    found = found or {"linen": equalised(book, random_leaves(linen))}
    if "nnx" not in found:
        found["nnx"] = _carried(linen, nnx, found["linen"], book, mate, notes)
    elif "linen" not in found:
        back = np.full(linen.trace.size, -1)
        back[mate[mate >= 0]] = np.flatnonzero(mate >= 0)
        found["linen"] = _carried(nnx, linen, found["nnx"], book, back, notes)
    elif others := _different(linen, nnx, found["linen"], found["nnx"], mate):
        notes.append(f"the checkpoints' weights differ, in nnx leaves {few(others)}")
    return found["linen"], found["nnx"], notes


def random_leaves(side: SlottedSide) -> Leaves:
    """Seeded values that differ from use to use; positive where a leaf acts element by element.

    Equal values would hide a swap of two leaves, and a scale or a variance below 0 means NaN.
    """
    values = distinct(side, np.full(side.trace.size, 0.5), side.paths)
    leaves = side.trace.leaves.items()
    return {path: side.trace.part(values, path).astype(leaf.dtype) for path, leaf in leaves}


def _carried(
    one: SlottedSide,
    two: SlottedSide,
    leaves: Leaves,
    book: RuleBook,
    mate: Array,
    notes: list[str],
) -> Leaves:
    """The leaves of side `two` from those of side `one`: by rule, by guess, else random."""
    to = two.trace.side
    found = book.plan(one.trace.leaves, to, two.trace.leaves, partial=True).run(leaves)
    # `partial` leaves out what has no rule: such leaves are filled element by element.
    without_rule = [path for path in two.paths if path not in found]
    fresh = random_leaves(two) if without_rule else {}
    alone = []
    for path in without_rule:
        ids = two.trace.part(mate, path)
        found[path] = fresh[path]
        if (ids >= 0).any():
            found[path][ids >= 0] = one.gather(leaves, Counted.of(ids[ids >= 0]))
        if (ids < 0).any():
            alone.append(path)
    if alone:
        notes.append(f"{to} leaves without a mate have random values: {few(alone)}")
    return found


def _different(
    linen: SlottedSide, nnx: SlottedSide, ours: Leaves, theirs: Leaves, mate: Array
) -> list[str]:
    """The nnx leaves whose bits are not those of their mates."""
    different = []
    for path in nnx.paths:
        ids = nnx.trace.part(mate, path)
        # Elements without a mate have nothing to differ from.
        if not ids.size or (ids < 0).any():
            continue
        if linen.gather(ours, Counted.of(ids)).tobytes() != theirs[path].tobytes():
            different.append(path)
    return different


def _check(side: SlottedSide, leaves: Mapping[str, Any]) -> None:
    """Raises `RuleError` with every leaf of the model that a checkpoint lacks or has otherwise."""
    problems = []
    for path, leaf in side.trace.leaves.items():
        if path not in leaves:
            problems.append(f"`{path}` is not in it")
        elif spec(leaves[path]) != spec(leaf):
            problems.append(f"`{path}` is {spec(leaves[path])}, the twin's {spec(leaf)}")
    if problems:
        raise RuleError(f"the {side.trace.side} checkpoint does not fit the twin", problems)


def _saved(path: str | Path, book: RuleBook, runs: Runs) -> tuple[Side, Leaves]:
    """The model's leaves in a checkpoint, and their form; a hybrid of both forms becomes nnx."""
    source = find(path, runs=runs)
    if source.said is None:
        form = Form(guess_side(source.leaves, book) or "nnx")
    else:
        form = Form("linen", source.said.stage, source.said.forms)
    model = read_state(source.leaves, form, book).model
    arrays = dict(zip(model, source.reader.read(list(model.values())), strict=True))
    # At a stage in the middle of a migration some parts are nnx already.
    nnx: Leaves = {}
    linen: dict[str, Leaves] = {}  # by part
    for key, array in arrays.items():
        part = form.part_of(key)
        if form.parts.get(part, form.side) == "nnx":
            nnx[key.path] = array
        else:
            linen.setdefault(part, {})[f"{key.collection}/{key.path}"] = array
    if not nnx:
        whole: Leaves = {}
        for own in linen.values():
            whole |= own
        return "linen", whole
    for part, own in linen.items():
        nnx |= book.within(part).to_nnx(own)
    return "nnx", nnx
