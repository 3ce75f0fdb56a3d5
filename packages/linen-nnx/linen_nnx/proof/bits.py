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
from typing import Any

from linen_nnx.book.ops import Mismatch
from linen_nnx.disk.conversion import Conversion
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.rekey import Job
from linen_nnx.disk.sources import Source

_BATCH = 32 << 20  # bytes of arrays compared at once, beside a single leaf that may be larger
# Bytes that an array takes while it is read, whatever its size: 50,000 biases of 8 numbers are 2 MB
# of arrays, and hundreds of MB of readers and buffers if all are read at once.
_EACH = 8 << 10


def different(
    conversion: Conversion, result: Source, progress: Callable[[str], None] = lambda text: None
) -> Iterator[str]:
    """Every target leaf whose bits differ from what its sources give.

    Args:
      conversion: from the source to what `result` should be.
      result: what is compared.
      progress: is told the share that is done.
    """
    found = {_names(leaf): leaf for leaf in result.leaves}
    jobs = []
    for job in conversion.jobs:
        # An empty node has no bits.
        if job.targets and job.targets[0].zarr is not None:
            jobs.append(job)
    done, total = 0, sum(job.nbytes for job in jobs) or 1
    for batch in _batches(jobs):
        sources, targets = [], []
        for job in batch:
            sources += job.change.sources
            targets += [found[_names(leaf)] for leaf in job.targets]
        try:
            old = iter(conversion.source.reader.read(sources))
            new = iter(result.reader.read(targets))
        except ValueError as error:
            yield f"{', '.join(leaf.path for leaf in targets[:3])}: cannot be read: {error}"
            continue
        for job in batch:
            yield from _differing(
                job,
                [next(old) for _ in job.change.sources],
                [next(new) for _ in job.targets],
            )
        done += sum(job.nbytes for job in batch)
        progress(f"comparing bits: {done * 100 // total} %")


def not_undone(conversion: Conversion, back: Conversion) -> list[str]:
    """Every leaf that a way back gives another name or other bits than the source has."""
    there = {_paths(job.change.sources, job.targets) for job in conversion.jobs}
    wrong = []
    for job in back.jobs:
        old, new = _paths(job.targets, job.change.sources)
        if job.change.sources and (old, new) not in there:
            wrong.append(f"{new} leads back to {old}")
    # Where nothing but a name changes, the bits are those that were compared on the way there.
    changed = replace(back, jobs=tuple(job for job in back.jobs if job.change.actions))
    return wrong + list(different(changed, conversion.source))


def _differing(job: Job, arrays: list[Any], targets: list[Any]) -> Iterator[str]:
    """The targets of one job that differ from what its sources, `arrays`, give."""
    paths = [leaf.path for leaf in job.change.sources]
    try:
        for action in job.change.actions:
            arrays = action.run(arrays)
    except Mismatch as mismatch:  # homes of one leaf that are not equal
        yield f"{', '.join(paths)}: {mismatch}"
        return
    for due, array, leaf in zip(arrays, targets, job.targets, strict=True):
        is_alike = due.dtype == array.dtype and due.shape == array.shape
        if not is_alike or due.tobytes() != array.tobytes():
            yield f"`{leaf.path}` differs from {paths}"


def _names(leaf: Leaf) -> tuple[Any, ...]:
    """The path of a leaf without the kinds of its keys: a list read as a dict is the same here."""
    return tuple(key.name for key in leaf.keys)


def _paths(*groups: Sequence[Leaf]) -> tuple[str, ...]:
    return tuple(", ".join(sorted(leaf.path for leaf in group)) for group in groups)


def _batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs in their order, so many at once that their arrays take some 32 MB."""
    batch: list[Job] = []
    end, number = 0, 0
    for job in jobs:
        end += job.nbytes + _EACH * len(job.targets)
        if batch and end // _BATCH != number:
            yield batch
            batch = []
        number = end // _BATCH
        batch.append(job)
    if batch:
        yield batch
