"""Which element of one side is which of the other, and weights that are the same on both."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from linen_nnx.book.ops import Side
from linen_nnx.book.plan import RuleError
from linen_nnx.book.rules import RuleBook
from linen_nnx.disk.runs import Runs
from linen_nnx.disk.sides import guess_side
from linen_nnx.disk.sources import find
from linen_nnx.disk.state import Form, read_state
from linen_nnx.infer.dataflow import flow
from linen_nnx.infer.run import distinct
from linen_nnx.infer.sides import SlottedSide, in_order
from linen_nnx.infer.trace import Trace
from linen_nnx.infer.trial import equalised, joins
from linen_nnx.proof.compare import spec

Array = np.ndarray
Leaves = dict[str, Any]


def side_of(trace: Trace) -> SlottedSide:
    """A side by itself, its slots as the dataflow has them."""
    found = flow(trace)
    side = SlottedSide(trace, found, [])
    for slot, path in zip(found.slots, side.first, strict=True):
        side.forms.append((trace.leaves[path].collection == "params", *slot.ids.shape))
    return side


def mates(linen: SlottedSide, nnx: SlottedSide, book: RuleBook) -> tuple[Array, list[str]]:
    """(nnx elements,): the Linen element that each is, -1 for none; and notes on what was guessed.

    By the rules that keep bits. Slots without a rule are paired in the order of their first use
    where the two sides have the same forms in the same order.
    """
    rules = [rule for rule in book.rules if rule.linen and rule.nnx and rule.lossless]
    rules = [rule for rule in rules if not joins(rule)]  # of two Linen leaves neither is the mate
    plan = RuleBook(rules).plan(linen.trace.leaves, "nnx", nnx.trace.leaves, partial=True)
    mate = np.full(nnx.owner.size, -1)
    for path, numbers in plan.run(linen.trace.numbers).items():
        mate[nnx.trace.numbers[path]] = numbers
    taken = np.zeros(linen.owner.size, bool)
    taken[mate[mate >= 0]] = True
    left = [k for k, slot in enumerate(linen.flow.slots) if not taken[slot.ids].any()]
    right = [k for k, slot in enumerate(nnx.flow.slots) if (mate[slot.ids] < 0).all()]
    forms = [linen.forms[k] for k in left], [nnx.forms[k] for k in right]
    guessed = []
    for a, b in in_order(*forms):
        mate[nnx.flow.slots[right[b]].ids] = linen.flow.slots[left[a]].ids
        guessed.append(f"{linen.first[left[a]]} = {nnx.first[right[b]]}")
    notes = []
    if guessed:
        notes.append(f"{len(guessed)} uses have no rule and were paired by order: {_few(guessed)}")
    taken[mate[mate >= 0]] = True
    numbers = linen.trace.numbers
    if alone := [p for p in linen.paths if numbers[p].size and not taken[numbers[p]].any()]:
        notes.append(f"Linen leaves without a mate in nnx: {_few(alone)}")
    return mate, notes


def weights(
    linen: SlottedSide,
    nnx: SlottedSide,
    book: RuleBook,
    mate: Array,
    checkpoints: Sequence[str | Path],
    runs: Runs,
) -> tuple[Leaves, Leaves, list[str]]:
    """The leaves of both sides, and notes; see `bisect` for `checkpoints` and `runs`."""
    found = dict(_saved(path, book, runs) for path in checkpoints)
    if len(found) < len(checkpoints):
        raise RuleError(
            "Two checkpoints must be one of each form", [f"both look like {next(iter(found))} form"]
        )
    for side in (linen, nnx):
        _check(side, found.get(side.trace.side, side.trace.leaves))
    notes: list[str] = []
    found = found or {"linen": equalised(book, random_leaves(linen))}
    if "nnx" not in found:
        found["nnx"] = _carried(linen, nnx, found["linen"], book, mate, notes)
    elif "linen" not in found:
        back = np.full(linen.owner.size, -1)
        back[mate[mate >= 0]] = np.flatnonzero(mate >= 0)
        found["linen"] = _carried(nnx, linen, found["nnx"], book, back, notes)
    elif others := _different(linen, nnx, found["linen"], found["nnx"], mate):
        notes.append(f"the checkpoints' weights differ, in nnx leaves {_few(others)}")
    return found["linen"], found["nnx"], notes


def gather(side: SlottedSide, leaves: Mapping[str, Any], ids: Array) -> Array:
    """The values of elements, by number."""
    paths = side.leaves_of(ids)
    numbers = np.concatenate([side.trace.numbers[path].ravel() for path in paths])
    values = np.concatenate([np.asarray(leaves[path]).ravel() for path in paths])
    return values[np.searchsorted(numbers, ids)]


def random_leaves(side: SlottedSide) -> Leaves:
    """Seeded values, different for every use: positive where a leaf acts element by element."""
    values = distinct(side, np.full(side.owner.size, 0.5), side.paths)
    numbered = side.trace.numbers.items()
    return {path: values[ids].astype(side.trace.leaves[path].dtype) for path, ids in numbered}


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
    alone, open_ = [], [path for path in two.paths if path not in found]
    fresh = random_leaves(two) if open_ else {}
    for path in open_:
        ids = mate[two.trace.numbers[path]]
        found[path] = fresh[path]
        if (ids >= 0).any():
            found[path][ids >= 0] = gather(one, leaves, ids[ids >= 0])
        if (ids < 0).any():
            alone.append(path)
    if alone:
        notes.append(f"{to} leaves without a mate have random values: {_few(alone)}")
    return found


def _different(
    linen: SlottedSide, nnx: SlottedSide, ours: Leaves, theirs: Leaves, mate: Array
) -> list[str]:
    """The nnx leaves whose bits are not those of their mates."""
    mates_of = {path: mate[nnx.trace.numbers[path]] for path in nnx.paths}
    return [
        path
        for path, ids in mates_of.items()
        if (ids >= 0).all() and gather(linen, ours, ids).tobytes() != theirs[path].tobytes()
    ]


def _few(texts: Sequence[str]) -> str:
    return ", ".join(texts[:4]) + (f", ... ({len(texts)})" if len(texts) > 4 else "")


def _check(side: SlottedSide, leaves: Mapping[str, Any]) -> None:
    """Raises `RuleError` with every leaf of the model that a checkpoint lacks or has otherwise."""
    problems = [
        f"`{path}` is {spec(leaves[path])}, the twin's {spec(leaf)}"
        if path in leaves
        else f"`{path}` is not in it"
        for path, leaf in side.trace.leaves.items()
        if spec(leaves.get(path)) != spec(leaf)
    ]
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
    nnx: Leaves = {}
    linen: dict[str, Leaves] = {}  # by part
    for key, array in arrays.items():
        part = form.part_of(key)
        if form.parts.get(part, form.side) == "nnx":
            nnx[key.path] = array
        else:
            linen.setdefault(part, {})[f"{key.collection}/{key.path}"] = array
    if not nnx:
        return "linen", {path: array for own in linen.values() for path, array in own.items()}
    for part, own in linen.items():
        nnx |= book.within(part).to_nnx(own)
    return "nnx", nnx
