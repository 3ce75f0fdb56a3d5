"""Compares every bit of a result with what its sources give through the rule book, and back.

    source                     the rule book              result
    params/q   (2, 1)          concat along axis 1        qkv  (2, 2)
    params/k   (2, 1)

The sources are read and go through the rule's actions in memory; what comes out must equal the
array that was read of the result, in dtype, shape and every bit. No array is compared in float:
NaN equals itself here, and -0.0 is not 0.0.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from linen_nnx.book.moves import Move
from linen_nnx.book.specs import Mismatch
from linen_nnx.disk.conversion import Conversion
from linen_nnx.disk.engines import nbytes_of
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.sources import Source

_BATCH = 32 << 20  # bytes of arrays compared at once, beside a single leaf that may be larger
# Bytes that an array takes while it is read, whatever its size: 50,000 biases of 8 numbers are 2 MB
# of arrays, and hundreds of MB of readers and buffers if all are read at once.
_EACH = 8 << 10


def wrong_leaves(
    conversion: Conversion, result: Source, progress: Callable[[str], None] = lambda text: None
) -> Iterator[str]:
    """Every target leaf whose bits differ from what its sources give.

    Args:
      conversion: from the source to what `result` should be.
      result: what is compared.
      progress: is told the share that is done.
    """
    found = {_names(leaf): leaf for leaf in result.leaves}
    moves, done, total = [], 0, 0
    for move in conversion.moves:
        # An empty node has no bits.
        if move.targets and move.targets[0].zarr is not None:
            moves.append(move)
            total += nbytes_of(move)
    for batch in _batches(moves):
        sources: list[Leaf] = []
        targets: list[Leaf] = []
        for move in batch:
            sources += move.sources
            targets += [found[_names(leaf)] for leaf in move.targets]
            done += nbytes_of(move)
        try:
            old = iter(conversion.source.reader.read(sources))
            new = iter(result.reader.read(targets))
        except ValueError as error:
            yield f"{', '.join(_paths(targets[:3]))}: cannot be read: {error}"
            continue
        for move in batch:
            # No name here holds the arrays: the sources are freed once the actions have run.
            yield from _differing(
                move,
                list(islice(old, len(move.sources))),
                list(islice(new, len(move.targets))),
            )
        progress(f"comparing bits: {done * 100 // (total or 1)} %")


def not_undone(conversion: Conversion, back: Conversion) -> list[str]:
    """Every leaf that a way back gives another name or other bits than the source has."""
    there = set()
    for move in conversion.moves:
        there.add((_joined(move.sources), _joined(move.targets)))
    wrong = []
    for move in back.moves:
        old, new = _joined(move.targets), _joined(move.sources)
        # A move without sources fills what the way there has dropped: that is said elsewhere.
        if move.sources and (old, new) not in there:
            wrong.append(f"{new} leads back to {old}")
    # Where nothing but a name changes, the bits are those that were compared on the way there.
    changed = replace(back, moves=tuple(move for move in back.moves if move.actions))
    return wrong + list(wrong_leaves(changed, conversion.source))


def _differing(move: Move[Leaf, Leaf], arrays: list[Any], targets: list[Any]) -> Iterator[str]:
    """The targets of one move that differ from what its sources, `arrays`, give."""
    paths = _paths(move.sources)
    try:
        arrays = move.run(arrays)
    except Mismatch as mismatch:  # homes of one leaf that are not equal
        yield f"{', '.join(paths)}: {mismatch}"
        return
    for due, array, leaf in zip(arrays, targets, move.targets, strict=True):
        is_alike = due.dtype == array.dtype and due.shape == array.shape
        if not is_alike or due.tobytes() != array.tobytes():
            yield f"`{leaf.path}` differs from {paths}"


def _names(leaf: Leaf) -> tuple[Any, ...]:
    """The path of a leaf without the kinds of its keys: a list read as a dict is the same here."""
    return tuple(key.name for key in leaf.keys)


def _paths(leaves: Sequence[Leaf]) -> list[str]:
    return [leaf.path for leaf in leaves]


def _joined(leaves: Sequence[Leaf]) -> str:
    """Leaves as one name, in whatever order a rule lists them."""
    return ", ".join(sorted(_paths(leaves)))


def _batches(moves: Sequence[Move[Leaf, Leaf]]) -> Iterator[list[Move[Leaf, Leaf]]]:
    """Moves in their order, so many at once that their arrays take some 32 MB."""
    batch: list[Move[Leaf, Leaf]] = []
    end, number = 0, 0
    for move in moves:
        end += nbytes_of(move) + _EACH * len(move.targets)
        if batch and end // _BATCH != number:
            yield batch
            batch = []
        number = end // _BATCH
        batch.append(move)
    if batch:
        yield batch
