"""Proves a converted checkpoint right against its source, leaf by leaf and bit by bit."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linen_nnx import digests
from linen_nnx.plan import RuleError
from linen_nnx.planning import REPORT, RULES, Conversion, plan_conversion
from linen_nnx.rekey import Job
from linen_nnx.sources import SUFFIXES, Source, find, parts
from linen_nnx.store import StoreError

_BATCH = 32 << 20  # bytes of arrays compared at once, if no single leaf is larger


@dataclass(frozen=True)
class Check:
    """One line of a verification; `passed` is None where there was nothing to check."""

    name: str
    passed: bool | None
    details: tuple[str, ...] = ()


def verify(
    path: str | Path,
    out: str | Path,
    to: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> list[Check]:
    """Checks a conversion's result `out` against its source `path`.

    Digests of both; every leaf of either side accounted for by the rule book, with its shape and
    dtype; every bit of every leaf equal to its source's through the rule book. Memory holds one
    leaf's sources and targets.

    Args:
      path: the source, and `out`: the result.
      to: the target that `out` was made for, if its report does not say so.
      progress: is told what is being done.
      options: as in `planning.plan_conversion`; the rule book is the one beside `out`, if none
        is given.

    Raises:
      StoreError: if there is no checkpoint at `path` or at `out`.
    """
    path, out = Path(path), Path(out)
    checks: list[Check] = []
    both = ["checkpoints"] if out.suffix in SUFFIXES else parts(path)
    for part in both:
        label = f"{part}: " if len(both) > 1 else ""
        chosen = options if part == "checkpoints" else {**options, "step": None}
        step = chosen.get("step") if out.is_dir() and not (out / "_METADATA").exists() else None
        result = find(out, step, part=part)
        target, reset = _asked(result, to)
        for check in _verify_one(path, result, target, reset, part, progress, chosen):
            checks.append(Check(label + check.name, check.passed, check.details))
    return checks


def _asked(result: Source, to: str | None) -> tuple[str, bool]:
    """What the conversion was asked for, by its report."""
    try:
        report = json.loads((result.folder / REPORT).read_text())
        return to or report["target"], report["reset_optimizer"]
    except (OSError, ValueError, KeyError, TypeError):
        if to is None:
            raise StoreError(f"{result.folder} has no readable {REPORT}: say --to") from None
        return to, False


def _verify_one(
    path: Path,
    result: Source,
    to: str,
    reset: bool,
    part: str,
    progress: Callable[[str], None],
    options: dict[str, Any],
) -> Iterator[Check]:
    progress("digests")
    source = find(path, options.get("step"), options.get("item"), part)
    for name, folder in (("digests of the source", source.folder), ("digests", result.folder)):
        yield _digests(name, folder)
    progress("coverage, shapes, dtypes")
    if options.get("rules") is None and (result.folder / RULES).is_file():
        options = {**options, "rules": result.folder / RULES}
    options = {"reset_optimizer": reset, **options, "like": result.folder, "part": part}
    model_only = result.folder.suffix in SUFFIXES
    try:
        conversion = plan_conversion(path, to, model_only=model_only, **options)
        leaves = result.leaves
    except (RuleError, StoreError) as error:
        details = error.problems if isinstance(error, RuleError) else (str(error),)
        yield Check("coverage, shapes, dtypes", False, details)
        return
    yield Check("coverage, shapes, dtypes", True, (f"{len(leaves)} leaves",))
    different = list(_different(conversion, result, progress))
    yield Check("every bit, through the rule book", not different, tuple(different))


def _digests(name: str, folder: Path) -> Check:
    try:
        there = folder.is_dir() and digests.check(folder)
    except digests.DigestError as error:
        return Check(name, False, (str(error),))
    return Check(name, True if there else None, () if there else ("it has none",))


def _different(
    conversion: Conversion,
    result: Source,
    progress: Callable[[str], None],
) -> Iterator[str]:
    """Every target leaf whose bits differ from what its sources give."""
    found = {tuple(key.name for key in leaf.keys): leaf for leaf in result.leaves}
    jobs = [job for job in conversion.jobs if job.targets and job.targets[0].zarr is not None]
    done, total = 0, sum(job.nbytes for job in jobs) or 1
    for batch in _batches(jobs):
        sources = [leaf for job in batch for leaf in job.change.sources]
        targets = [
            found[tuple(key.name for key in leaf.keys)] for job in batch for leaf in job.targets
        ]
        try:
            old, new = (
                iter(s.reader.read(of))
                for s, of in ((conversion.source, sources), (result, targets))
            )
        except ValueError as error:
            yield f"{', '.join(leaf.path for leaf in targets[:3])}: cannot be read: {error}"
            continue
        for job in batch:
            arrays = [next(old) for _ in job.change.sources]
            for action in job.change.actions:
                arrays = action.run(arrays)
            for expected, leaf in zip(arrays, job.targets, strict=True):
                array = next(new)
                same = expected.dtype == array.dtype and expected.shape == array.shape
                if not same or expected.tobytes() != array.tobytes():
                    yield f"`{leaf.path}` differs from {[s.path for s in job.change.sources]}"
        done += sum(job.nbytes for job in batch)
        progress(f"comparing bits: {done * 100 // total} %")


def _batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    batch: list[Job] = []
    size = 0
    for job in jobs:
        if batch and size + job.nbytes > _BATCH:
            yield batch
            batch, size = [], 0
        batch.append(job)
        size += job.nbytes
    if batch:
        yield batch
