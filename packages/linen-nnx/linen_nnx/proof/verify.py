"""Proves a converted checkpoint right against its source: its bytes, and with code its meaning.

    digests                     the files are those that were written
    coverage, shapes, dtypes    every leaf of either side has its place in the rule book
    every bit                   every leaf holds the bits of its sources (`bits.py`)
    exact inverse               the way back gives the source, bit for bit
    forward pass, ...           with the models' code: the rule book means what it should

The first four say that the result is what the rule book makes of the source. Whether the rule book
is right only the models can tell: given a twin, or the code that trains a run, `prove.py` runs
both.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linen_nnx.book.moves import targets_of
from linen_nnx.book.plan import RuleError
from linen_nnx.book.reading import read_json
from linen_nnx.book.rules import RuleBook
from linen_nnx.disk import checked, digests
from linen_nnx.disk.beside import source_of
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.conversion import REPORT, RULES, Conversion, options_in
from linen_nnx.disk.finding import check_beside, find, step_folders
from linen_nnx.disk.planning import MODEL_ALONE, plan_conversion
from linen_nnx.disk.remote import as_path
from linen_nnx.disk.runs import NO_RUNS, Runs
from linen_nnx.disk.sources import SUFFIXES, Source
from linen_nnx.disk.state import OPTIMIZER, State, read_state
from linen_nnx.errors import Refusal
from linen_nnx.proof.bits import not_undone, wrong_leaves
from linen_nnx.proof.checks import Check

if TYPE_CHECKING:  # jax, which comparing bytes does not need
    from linen_nnx.infer.twin import Twin
    from linen_nnx.proof.subject import Subject

Builder = Callable[[Mapping[str, Any]], "Subject"]
"""Builds the model of a run from what its checkpoint says of itself: all that its item holds."""


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

    Compared are the digests of both, every leaf by the rule book, with its shape and dtype, every
    bit of every leaf, and the way back. For that, memory holds one leaf's sources and targets.
    With the models' code all of `proof.prove` is checked as well, which holds both states.

    Args:
      path: the source.
      out: the result.
      to: the target that `out` was made for, if its report does not say so.
      progress: is told what is being done.
      report: is given each check, as soon as it is known.
      twin: the code of both models. Its own rule book is used where there is no other.
      runs: what a training code says of its runs.
      build: builds the models of such runs, which then need no twin.
      options: as in `planning.plan_conversion`; the rule book is the one beside `out`, if none
        is given.

    Raises:
      StoreError: if there is no checkpoint at `path` or at `out`.
      TwinError: when a part of the twin cannot be built or called.

    Example:
        >>> import tempfile
        >>> import numpy as np
        >>> from safetensors.numpy import save_file
        >>> from linen_nnx.disk.convert import convert
        >>> folder = Path(tempfile.mkdtemp())
        >>> save_file({"params.out.kernel": np.ones((2, 3))}, folder / "linen.safetensors")
        >>> rule = {"linen": "params/out/kernel", "nnx": "head/kernel"}
        >>> book = RuleBook.from_dict({"version": 1, "rules": [rule]})
        >>> done = convert(folder / "linen.safetensors", folder / "nnx", "nnx", rules=book)
        >>> checks = verify(folder / "linen.safetensors", folder / "nnx")
        >>> verdict(checks)
        'passed: 4 of 5 checks, every bit equal; 1 not proved'
    """
    path, out = as_path(path), as_path(out)
    build = None if build is None else _once(build)
    checks: list[Check] = []
    roots = (None,) if out.suffix in SUFFIXES else step_folders(path, runs)
    for number, root in enumerate(roots):
        label = f"{root}: " if len(roots) > 1 else ""
        # A step is of the first root; the others (a run's best checkpoint) have steps of their own.
        chosen = {**options, "step": None} if number else options
        step = chosen.get("step") if out.is_dir() and not (out / "_METADATA").exists() else None
        result = find(out, step, root=root, runs=runs)
        # What is asked here goes before what the report says; what neither says, `like` settles.
        target, asked = _asked(result, to)
        said = {name: value for name, value in chosen.items() if value}
        chosen = {**asked, **said, "like": result, "root": root, "runs": runs}
        for check in _verify_one(path, result, target, chosen, progress, twin, build):
            checks.append(replace(check, name=label + check.name))
            report(checks[-1])
    return checks


def verdict(checks: Sequence[Check]) -> str:
    """What all checks come to, in one line.

    Example:
        >>> verdict([Check("digests", True), Check("exact inverse", None)])
        'passed: 1 of 2 checks, every bit equal; 1 not proved'
        >>> verdict([Check("digests", True), Check("exact inverse", False)])
        'FAILED: 1 of 2 checks; the first: exact inverse'
    """
    failed = [check.name for check in checks if check.passed is False]
    if failed:
        return f"FAILED: {len(failed)} of {len(checks)} checks; the first: {failed[0]}"
    passed = [check for check in checks if check.passed]
    close = [check for check in passed if check.close]
    how = f"{len(close)} of them close, not exact" if close else "every bit equal"
    unproved = len(checks) - len(passed)
    rest = f"; {unproved} not proved" if unproved else ""
    return f"passed: {len(passed)} of {len(checks)} checks, {how}{rest}"


def _once(build: Builder) -> Builder:
    """The same with a memory: a run's latest and best checkpoint share their compiled model."""
    # By its text, since what a checkpoint says of itself is dicts and lists, which have no hash.
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
        # A result of other hands. Some kinds of files hold a model and nothing beside it.
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
    """The checks of one checkpoint of the result, each as soon as it is known."""
    progress("digests")
    which = {}
    for name in ("step", "item", "root", "prefix", "runs"):
        if name in options:
            which[name] = options[name]
    source = find(path, **which)
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
    count = len(leaves)
    # Items beside the state have conversions of their own, whose leaves `result` does not list.
    for one in conversion.with_beside[1:]:
        count += len(list(targets_of(one.moves)))
    yield Check("coverage, shapes, dtypes", True, (f"{count} leaves",))
    wrong = list(wrong_leaves(conversion, result, progress))
    for name, one in conversion.beside.items():
        if one is not None:
            wrong += wrong_leaves(one, source_of(result, result.folder / name), progress)
    yield Check("every bit, through the rule book", not wrong, tuple(wrong))
    progress("the way back")
    yield _inverse(conversion, result, intact=not wrong)
    # Bytes are proved without the models' code; what they mean is not.
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
    lost: list[str] = []
    for one in conversion.with_beside:
        lost += [*one.dropped, *one.filled]
    # The model's leaves first: of an optimizer's state there are many, and ten are shown.
    lost.sort(key=lambda path: OPTIMIZER in path.split("/"))
    lost += [name for name, one in conversion.beside.items() if one is None]
    if lost or not conversion.book.invertible:
        what = f" ({', '.join(lost[:10])})" if lost else ""
        return Check(name, None, (f"leaves are dropped, invented or rescaled{what}",))
    if source.said is not None and conversion.to.stage is None:
        return Check(name, None, ("a stock layout does not say of which stage it was",))
    form = conversion.state.form
    # Without `side` a model whose names fit both forms would be refused on the way back.
    options: dict[str, Any] = {"like": source, "side": conversion.to.side}
    options["model_only"] = conversion.options.model_only
    try:
        back = plan_conversion(result, form.stage or form.side, conversion.book, **options)
    except (RuleError, StoreError) as error:
        return Check(name, False, getattr(error, "problems", (str(error),)))
    wrong = not_undone(conversion, back)
    for item, one in conversion.beside.items():
        undone = back.beside.get(item)
        if one is not None and undone is not None:
            wrong += not_undone(one, undone)
        elif one is not None:
            wrong.append(f"item `{item}` has no way back")
    return Check(name, intact and not wrong, tuple(wrong))


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
    """Whether the files are those that were written; of a result that has digests."""
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
