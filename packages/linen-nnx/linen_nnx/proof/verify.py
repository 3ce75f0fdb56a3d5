"""Proves a converted checkpoint right against its source: its bytes, and with code its meaning.

The bytes are compared leaf by leaf through the rule book. Whether the rule book is right only the
models can tell: given a twin, or the code that trains a run, `prove.py` runs both.
"""

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linen_nnx.book.ops import Mismatch
from linen_nnx.book.plan import RuleError
from linen_nnx.book.reading import read_json
from linen_nnx.book.rules import RuleBook
from linen_nnx.disk import checked, digests
from linen_nnx.disk.beside import source_of
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.conversion import REPORT, RULES, Conversion, options_in
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.planning import MODEL_ALONE, plan_conversion
from linen_nnx.disk.rekey import Job
from linen_nnx.disk.remote import as_path
from linen_nnx.disk.runs import NO_RUNS, Runs
from linen_nnx.disk.sources import SUFFIXES, Source, check_beside, find, parts
from linen_nnx.disk.state import OPTIMIZER, State, read_state
from linen_nnx.errors import Refusal

if TYPE_CHECKING:  # jax, which comparing bytes does not need
    from linen_nnx.infer.twin import Twin
    from linen_nnx.proof.subject import Subject

Builder = Callable[[Mapping[str, Any]], "Subject"]
"""Builds the model of a run from what its checkpoint says of itself: all that its item holds."""

_BATCH = 32 << 20  # bytes of arrays compared at once, beside a single leaf that may be larger
_EACH = 8 << 10  # bytes that an array takes while it is read, whatever its size


@dataclass(frozen=True)
class Check:
    """One line of a verification; `passed` is None where nothing was, or could be, proved."""

    name: str
    passed: bool | None
    details: tuple[str, ...] = ()
    close: bool = False
    """Passed, but not in every bit: what differs is of the size of rounding."""


def verify(
    path: str | Path,
    out: str | Path,
    to: str | None = None,
    progress: Callable[[str], None] = lambda text: None,
    report: Callable[[Check], None] = lambda check: None,
    twin: "Twin | None" = None,
    runs: Runs = NO_RUNS,
    build: Builder | None = None,
    **options: Any,
) -> list[Check]:
    """Checks a conversion's result `out` against its source `path`.

    Digests of both; every leaf of either side accounted for by the rule book, with its shape and
    dtype; every bit of every leaf equal to its source's through the rule book, and the way back
    as exact. For that memory holds one leaf's sources and targets. With the models' code, all of
    `proof.prove` as well, which holds both states.

    Args:
      path: the source, and `out`: the result.
      to: the target that `out` was made for, if its report does not say so.
      progress: is told what is being done; `report`: each check, as soon as it is known.
      twin: the code of both models. Its own rule book is used where there is no other.
      runs: what a training code says of its runs; `build`: builds their models, which then need no
        twin.
      options: as in `planning.plan_conversion`; the rule book is the one beside `out`, if none
        is given.

    Raises:
      StoreError: if there is no checkpoint at `path` or at `out`.
      TwinError: when a part of the twin cannot be built or called.
    """
    path, out = as_path(path), as_path(out)
    build = None if build is None else _once(build)
    checks: list[Check] = []
    roots = (None,) if out.suffix in SUFFIXES else parts(path, runs)
    for number, part in enumerate(roots):
        label = f"{part}: " if len(roots) > 1 else ""
        chosen = {**options, "step": None} if number else options
        step = chosen.get("step") if out.is_dir() and not (out / "_METADATA").exists() else None
        result = find(out, step, part=part, runs=runs)
        target, asked = _asked(result, to)
        said = {name: value for name, value in chosen.items() if value}
        chosen = {**asked, **said, "like": result, "part": part, "runs": runs}
        for check in _verify_one(path, result, target, chosen, progress, twin, build):
            checks.append(replace(check, name=label + check.name))
            report(checks[-1])
    return checks


def _once(build: Builder) -> Builder:
    """The same with a memory: a run's latest and best checkpoint share their compiled model."""
    known = cache(lambda run: build(json.loads(run)))
    return lambda run: known(json.dumps(run, sort_keys=True))


def _asked(result: Source, to: str | None) -> tuple[str, dict[str, Any]]:
    """What the conversion was asked for, by its report: its target and its options."""
    try:
        report = checked.mapping(read_json(result.folder / REPORT))
        return to or checked.text(checked.field(report, "target")), options_in(report)
    except (OSError, ValueError):
        if to is None:
            raise StoreError(f"{result.folder} has no readable {REPORT}: say --to") from None
        return to, {"model_only": result.folder.suffix in MODEL_ALONE}


def _verify_one(
    path: Path,
    result: Source,
    to: str,
    options: dict[str, Any],
    progress: Callable[[str], None],
    twin: "Twin | None",
    build: Builder | None,
) -> Iterator[Check]:
    progress("digests")
    names = ("step", "item", "part", "prefix", "runs")
    source = find(path, **{name: options[name] for name in names if name in options})
    yield _digests("digests of the source", source.folder)
    yield _digests("digests", result.folder)
    yield from _beside("files beside the source", source, options["runs"])
    yield from _beside("files beside it", result, options["runs"])
    progress("coverage, shapes, dtypes")
    if options.get("rules") is None:
        options = {**options, "rules": _rules(result, twin)}
    suffix = result.folder.suffix * (result.folder.suffix in SUFFIXES)
    try:
        conversion = plan_conversion(source, to, suffix=suffix, **options)
        leaves = result.leaves
    except (RuleError, StoreError) as error:
        yield Check("coverage, shapes, dtypes", False, getattr(error, "problems", (str(error),)))
        return
    count = len(leaves) + sum(len(job.targets) for p in conversion.parts[1:] for job in p.jobs)
    yield Check("coverage, shapes, dtypes", True, (f"{count} leaves",))
    different = list(_different(conversion, result, progress))
    for name, one in conversion.beside.items():
        if one is not None:
            different += _different(one, source_of(result, result.folder / name), progress)
    yield Check("every bit, through the rule book", not different, tuple(different))
    progress("the way back")
    yield _inverse(conversion, result, intact=not different)
    if twin is None and (build is None or source.said is None):
        return
    progress("running both models")
    state = read_state(leaves, conversion.to, conversion.book)
    yield from _meaning(conversion, result, state, twin, build)


def _rules(result: Source, twin: "Twin | None") -> Any:
    """The rule book beside a result; else what the twin suggests, if there is one."""
    if (beside := result.folder / RULES).is_file():
        return beside
    if twin is None:
        return None
    from linen_nnx.infer.suggest import suggest

    return suggest(twin)


def _inverse(conversion: Conversion, result: Source, intact: bool) -> Check:
    """The way back from the result: the same leaves, each with its own bits.

    Where nothing but a name changes, the bits are those compared before (`intact`).
    """
    name = "exact inverse"
    source = conversion.source
    lost = [path for one in conversion.parts for path in (*one.dropped, *one.filled)]
    # The model's leaves first: of an optimizer's state there are many, and ten are shown.
    lost.sort(key=lambda path: OPTIMIZER in path.split("/"))
    lost += [name for name, one in conversion.beside.items() if one is None]
    if lost or not conversion.book.invertible:
        what = f" ({', '.join(lost[:10])})" if lost else ""
        return Check(name, None, (f"leaves are dropped, invented or rescaled{what}",))
    if source.said is not None and conversion.to.stage is None:
        return Check(name, None, ("a stock layout does not say of which stage it was",))
    form = conversion.state.form
    # Its side is known here, where names may fit both.
    options: dict[str, Any] = {"like": source, "side": conversion.to.side}
    options["model_only"] = conversion.options.model_only
    try:
        back = plan_conversion(result, form.stage or form.side, conversion.book, **options)
    except (RuleError, StoreError) as error:
        return Check(name, False, getattr(error, "problems", (str(error),)))
    wrong = _not_undone(conversion, back)
    for item, one in conversion.beside.items():
        undone = back.beside.get(item)
        if one is not None and undone is not None:
            wrong += _not_undone(one, undone)
        elif one is not None:
            wrong.append(f"item `{item}` has no way back")
    return Check(name, intact and not wrong, tuple(wrong))


def _not_undone(conversion: Conversion, back: Conversion) -> list[str]:
    """Every leaf that a way back gives another name or other bits than the source has."""
    there = {_paths(job.change.sources, job.targets) for job in conversion.jobs}
    moved = [_paths(job.targets, job.change.sources) for job in back.jobs if job.change.sources]
    wrong = [f"{new} leads back to {old}" for old, new in moved if (old, new) not in there]
    changed = replace(back, jobs=tuple(job for job in back.jobs if job.change.actions))
    return wrong + list(_different(changed, conversion.source))


def _paths(*groups: Sequence[Leaf]) -> tuple[str, ...]:
    return tuple(", ".join(sorted(leaf.path for leaf in group)) for group in groups)


def _meaning(
    conversion: Conversion,
    result: Source,
    state: State,
    twin: "Twin | None",
    build: Builder | None,
) -> Iterator[Check]:
    """The checks that run the models' code."""
    from linen_nnx.proof.prove import prove
    from linen_nnx.proof.subject import of_twin

    forms = conversion.state.form, conversion.to
    if twin is not None and any(form.stage for form in forms):
        why = "at a stage they are those of the code that trains: leave out --twin"
        yield Check("the models", False, (why,))
    elif twin is not None:
        before, after = (of_twin(twin, form.side) for form in forms)
        yield from prove(conversion, state, result.reader, before, after)
        yield from _draws(twin, conversion.book)
    elif build is None or conversion.source.said is None or result.said is None:
        yield Check("the models", None, ("a stage is compared with a stage, not a stock layout",))
    else:
        before, after = build(conversion.source.said.content), build(result.said.content)
        yield from prove(conversion, state, result.reader, before, after)


def _draws(twin: "Twin", book: RuleBook) -> Iterator[Check]:
    """Whether the random draws of both models are paired as the rule book says, in training too."""
    from linen_nnx.ladder.training import check_draws

    for found in check_draws(twin, book):
        yield Check(f"draws of {found.kind}", found.passed, found.notes)


def _digests(name: str, folder: Path) -> Check:
    try:
        there = folder.is_dir() and digests.check(folder)
    except digests.DigestError as error:
        return Check(name, False, (str(error),))
    return Check(name, True) if there else Check(name, None, ("it has none",))


def _beside(name: str, source: Source, runs: Runs) -> Iterator[Check]:
    """Whether the other files of a run directory are as its checkpoint says; of no other source."""
    try:
        known = check_beside(source, runs)
    except Refusal as error:
        yield Check(name, False, tuple(str(error).splitlines()))
        return
    if known is not None:
        yield Check(name, True) if known else Check(name, None, ("it says nothing of them",))


def _different(
    conversion: Conversion, result: Source, progress: Callable[[str], None] = lambda text: None
) -> Iterator[str]:
    """Every target leaf whose bits differ from what its sources give."""
    found = {_names(leaf): leaf for leaf in result.leaves}
    jobs = [job for job in conversion.jobs if job.targets and job.targets[0].zarr is not None]
    done, total = 0, sum(job.nbytes for job in jobs) or 1
    for batch in _batches(jobs):
        sources = [leaf for job in batch for leaf in job.change.sources]
        targets = [found[_names(leaf)] for job in batch for leaf in job.targets]
        try:
            old = iter(conversion.source.reader.read(sources))
            new = iter(result.reader.read(targets))
        except ValueError as error:
            yield f"{', '.join(leaf.path for leaf in targets[:3])}: cannot be read: {error}"
            continue
        for job in batch:
            arrays = [next(old) for _ in job.change.sources]
            there = [next(new) for _ in job.targets]
            try:
                for action in job.change.actions:
                    arrays = action.run(arrays)
            except Mismatch as mismatch:  # homes of one leaf that are not equal
                yield f"{', '.join(leaf.path for leaf in job.change.sources)}: {mismatch}"
                continue
            for expected, array, leaf in zip(arrays, there, job.targets, strict=True):
                same = expected.dtype == array.dtype and expected.shape == array.shape
                if not same or expected.tobytes() != array.tobytes():
                    yield f"`{leaf.path}` differs from {[s.path for s in job.change.sources]}"
        done += sum(job.nbytes for job in batch)
        progress(f"comparing bits: {done * 100 // total} %")


def _names(leaf: Leaf) -> tuple[Any, ...]:
    return tuple(key.name for key in leaf.keys)


def _batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    ends = itertools.accumulate(job.nbytes + _EACH * len(job.targets) for job in jobs)
    pairs = zip(jobs, ends, strict=True)
    for _, batch in itertools.groupby(pairs, lambda pair: pair[1] // _BATCH):
        yield [job for job, _ in batch]
