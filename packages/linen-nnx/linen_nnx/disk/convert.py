"""Converts a checkpoint on disk: whole training state, exact, atomic.

Everything is written to a directory beside the target, synced to disk, and renamed: the target is
absent or complete. The source is only read.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linen_nnx.book.reading import read_json
from linen_nnx.disk import checked, digests
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.complete import files_below
from linen_nnx.disk.conversion import REPORT, RULES, Conversion
from linen_nnx.disk.placing import Placer
from linen_nnx.disk.planning import plan_conversion
from linen_nnx.disk.rekey import write_store
from linen_nnx.disk.remote import Remote, as_path
from linen_nnx.disk.runs import ITEM, NO_RUNS, Runs
from linen_nnx.disk.side_files import write_side_files
from linen_nnx.disk.sources import READABLE, SUFFIXES, Source, check_beside, parts
from linen_nnx.disk.store import OF_THE_TREE
from linen_nnx.disk.transaction import TargetError, left_over, publish, workspace
from linen_nnx.disk.transfers import copy_file
from linen_nnx.errors import Refusal

_SPARE = 16 << 20  # bytes of room for the new tree and the side files
_SAID = Path(ITEM, "metadata")
_ORBAX_META = "_CHECKPOINT_METADATA"


@dataclass(frozen=True)
class Result:
    """What `convert` did: `status` is `done`, or `equal` if the target was there already."""

    status: str
    out: Path
    reports: tuple[dict[str, Any], ...]
    """The `report.json` of each checkpoint written (a run may have its latest and its best)."""


def convert(
    path: str | Path,
    out: str | Path,
    to: str,
    *,
    link: bool = False,
    digest: bool = False,
    runs: Runs = NO_RUNS,
    progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Result:
    """Converts the checkpoint at `path` to the new path `out`.

    Args:
      path: the source, and `to`: the form, and `options`: see `planning.plan_conversion`.
      out: what to create: of the same kind as the source (run, root, step, item), or a file
        `*.msgpack`, or `*.safetensors` for the model alone.
      link: hard-link data files where possible, so that no array is read or written.
      digest: compute digests even where linking would leave them out.
      runs: what a training code says of its runs, where whole run directories are converted.
      progress: is told what is being done.

    Raises:
      StoreError, RuleError, DigestError, TargetError, OSError: with nothing left behind.
    """
    path, out = as_path(path), as_path(out)
    if isinstance(out, Remote):
        raise TargetError(f"{out}: buckets are read, and not written")
    to_file = out.suffix in SUFFIXES
    if out.suffix in READABLE and not to_file:
        known = " or ".join(SUFFIXES)
        raise TargetError(f"{out}: {out.suffix} is read and not written: choose a file {known}")
    progress("planning")
    conversions = {}
    for number, part in enumerate((None,) if to_file else parts(path, runs)):
        chosen: dict[str, Any] = {**options, "step": None} if number else options
        suffix = out.suffix * to_file
        one = plan_conversion(path, to, part=part, suffix=suffix, runs=runs, **chosen)
        if not to_file:
            _check_beside(one.source, runs)
        conversions[_relative(one)] = one
    if os.path.lexists(out):
        return _existing(out, conversions)
    _check_target(path, out, list(conversions.values()), link, runs)
    with workspace(out) as partial, Placer(link, not link or digest, progress) as placer:
        first = next(iter(conversions.values()))
        if to_file:
            _write_file(first, partial)
            reports = [first.summary()]
        else:
            for relative, conversion in conversions.items():
                _write(conversion, partial / relative, placer, runs)
            if first.source.kind == "run":
                _write_run(path, partial, first, runs)
            hashed = placer.finish()
            reports = [_seal(c, partial / name, placer, hashed) for name, c in conversions.items()]
        progress("syncing to disk")
        _sync_all(partial, placer)
        publish(partial, out)
        placer.sync([out.absolute().parent])
    return Result("done", out, tuple(reports))


def _check_beside(source: Source, runs: Runs) -> None:
    """Refuses a run directory whose other files are not as its checkpoint says."""
    try:
        check_beside(source, runs)
    except Refusal as error:
        alone = f"Of the checkpoint alone, {source.folder}, they are no part: convert that."
        raise StoreError(f"{error}\n{alone}") from None


def _relative(conversion: Conversion) -> str:
    """Where a converted checkpoint lies in the output."""
    source = conversion.source
    if source.kind == "run":
        return str(source.folder.relative_to(source.path))
    return source.step_name


def _existing(out: Path, conversions: dict[str, Conversion]) -> Result:
    """The result for a target that is there: equal, or an error that says how to go on."""
    reports = []
    for relative, conversion in conversions.items():
        try:
            report = checked.mapping(read_json(out / relative / REPORT))
        except (OSError, ValueError):  # so it is none of this library's results
            report = {}
        if report.get("fingerprint") != conversion.fingerprint:
            raise TargetError(f"{out} exists and is not this conversion's result: choose another")
        reports.append(report)
        if not digests.check(out / relative):
            raise TargetError(
                f"{out} exists and was made by this conversion, but has no digests that could "
                "show its bytes intact: run `verify`"
            )
    left_over(out)  # of a process that was killed between its last two steps
    return Result("equal", out, tuple(reports))


def _check_target(
    path: Path, out: Path, conversions: list[Conversion], link: bool, runs: Runs
) -> None:
    parent = out.absolute().parent
    if not parent.is_dir():
        raise TargetError(f"{parent} is no directory: make it first")
    inside = {conversion.source.folder.resolve() for conversion in conversions}
    inside |= {path.resolve()} if path.is_dir() else set()
    if any(folder in (parent.resolve(), *parent.resolve().parents) for folder in inside):
        raise TargetError(f"{out} lies inside the source, which stays as it is: choose another")
    items = [part for conversion in conversions for part in conversion.parts]
    copied = 0 if link else sum(item.bytes_stored for item in items)
    copied += sum(_taken_along(conversion, link) for conversion in conversions)
    copied += sum(file.stat().st_size for file in runs.taken(path))
    needed = _SPARE + copied + sum(item.bytes_streamed for item in items)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise TargetError(
            f"{parent} has {free / 1e9:.2f} GB free, the conversion needs {needed / 1e9:.2f} GB"
            + ("" if link else ": make room, or use --link on the source's file system")
        )


def _taken_along(conversion: Conversion, link: bool) -> int:
    """Bytes of the files beside the items, which a result takes along as they are."""
    source = conversion.source
    folders = [] if link else [child for child in source.beside if child.is_dir()]
    files = [file for folder in folders for file in files_below(folder)]
    files += [child for child in source.beside if child.is_file()]
    files += [file for item in source.paths for file in item.iterdir() if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _write(conversion: Conversion, folder: Path, placer: Placer, runs: Runs) -> None:
    """Writes one converted checkpoint to `folder`, all but its report and digests."""
    source = conversion.source
    folder.mkdir(parents=True, exist_ok=True)
    item = folder if source.folder in source.paths or not source.paths else folder / _name(source)
    _write_item(conversion, item, placer)
    for name, beside in conversion.beside.items():
        if beside is not None:
            _write_item(beside, folder / name, placer)
    _carry_along(conversion, folder, placer, runs)
    conversion.book.save(folder / RULES)


def _write_item(conversion: Conversion, item: Path, placer: Placer) -> None:
    """Writes one item: its store, its side files, and what else lies in its folder."""
    source = conversion.source
    item.mkdir(exist_ok=True)
    write_store(item, source, conversion.jobs, placer)
    leaves = [leaf for job in conversion.jobs for leaf in job.targets]
    header = source.items[0].header if source.items else _HEADER
    write_side_files(item, leaves, header)
    ours = (REPORT, RULES, digests.NAME)
    for original in source.paths:
        for file in (p for p in sorted(original.iterdir()) if p.is_file()):
            if not (item / file.name).exists() and file.name not in (*ours, *OF_THE_TREE):
                copy_file(file, item / file.name)


def _seal(
    conversion: Conversion, folder: Path, placer: Placer, hashed: dict[Path, digests.Digest]
) -> dict[str, Any]:
    """Writes report and digests of a checkpoint whose files are in place; returns the report.

    Raises `DigestError` if a copy differs from the source's own digests.
    """
    source = conversion.source
    known = (digests.read(source.folder) if source.folder.is_dir() else None) or {}
    placed = {new: old for new, old in placer.placed.items() if folder in new.parents}
    found = {new: hashed[new] for new in placed if new in hashed}
    carried = {
        new: known[name]
        for new, old in (placed.items() if known else ())
        if (name := str(old.relative_to(source.folder))) in known
    }
    wrong = [
        str(new.relative_to(folder))
        for new in carried
        if found.get(new, carried[new]) != carried[new]
    ]
    if wrong:
        raise digests.DigestError(f"the source is damaged, by its own digests: {wrong}")
    linked = placed.keys() & placer.linked
    report = {
        "version": 1,
        **conversion.summary(),
        "linked": bool(linked),
        "fell_back": placer.fell_back,
        "digests": placer.hash_links or linked <= carried.keys(),
        "fingerprint": conversion.fingerprint,
        "origin": conversion.origin(),
    }
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in report.items())
    (folder / REPORT).write_text("{" + ",\n".join(lines) + "}\n")
    if report["digests"]:
        all_known = {**carried, **found}
        digests.write(folder, {str(new.relative_to(folder)): d for new, d in all_known.items()})
    return report


def _name(source: Source) -> str:
    return source.paths[0].name if len(source.paths) == 1 else "state"


_HEADER: dict[str, Any] = {
    "use_ocdbt": True,
    "use_zarr3": False,
    "store_array_data_equal_to_fill_value": True,
    "custom_metadata": None,
}


def _carry_along(conversion: Conversion, folder: Path, placer: Placer, runs: Runs) -> None:
    """Takes over what else a step holds: other items, Orbax's own files, what it says of itself."""
    source, said, to = conversion.source, conversion.source.said, conversion.to
    ours = (REPORT, RULES, digests.NAME)
    for child in source.beside:
        if child.name in ours or child.name in conversion.beside:
            continue
        if said is not None and child.name == ITEM:
            continue
        if child.is_file():
            copy_file(child, folder / child.name)
        elif child.is_dir():
            for file in files_below(child):
                placer.place(file, folder / file.relative_to(source.folder))
        else:
            raise StoreError(f"{child} is neither a file nor a folder, nor a link to one")
    if said is not None and to.stage is not None:
        content = runs.moved(said.content, to.stage)
        content |= {"stage": to.stage, "forms": dict(to.parts)}
        content["rules"] = conversion.book.to_dict()  # the one that is beside it, too
        for file in files_below(source.folder / ITEM):
            if file.relative_to(source.folder) != _SAID:
                placer.place(file, folder / file.relative_to(source.folder))
        (folder / _SAID).parent.mkdir(exist_ok=True)
        (folder / _SAID).write_text(json.dumps(content))
    _rename_handlers(folder, source)


def _rename_handlers(folder: Path, source: Source) -> None:
    """Makes Orbax's list of items say which there are."""
    path = folder / _ORBAX_META
    if not path.is_file():
        return
    try:
        content = checked.mapping(checked.plain(read_json(path)))
    except ValueError as error:
        raise StoreError(f"{source.folder / _ORBAX_META} cannot be read: {error}") from None
    handlers = content.get("item_handlers")
    if isinstance(handlers, dict):
        merged = {_name(source): handlers[p.name] for p in source.paths if p.name in handlers}
        content["item_handlers"] = {
            name: handler
            for name, handler in {**handlers, **merged}.items()
            if (folder / name).is_dir()
        }
        path.write_text(json.dumps(content))


def _write_run(path: Path, partial: Path, conversion: Conversion, runs: Runs) -> None:
    """What a run directory holds beside its checkpoints."""
    stage = conversion.to.stage
    assert stage is not None  # a whole run directory goes to a stage
    for file in runs.taken(path):
        copy_file(file, partial / file.relative_to(path))
    runs.write(path, partial, stage, conversion.book)


def _write_file(conversion: Conversion, path: Path) -> None:
    from linen_nnx.disk.files import write_file  # needs numpy

    leaves = []
    for job in conversion.jobs:
        arrays: list[Any] = []
        if job.targets and job.targets[0].zarr is not None:
            arrays = conversion.source.reader.read(job.change.sources)
            for action in job.change.actions:
                arrays = action.run(arrays)
        for number, leaf in enumerate(job.targets):
            # The level of `nnx.State` that holds a variable's value means nothing in a file.
            boxed = not conversion.to.flat and leaf.keys[-1].name == "value"
            keys = leaf.keys[:-1] if boxed else leaf.keys
            leaves.append((keys, leaf, arrays[number] if arrays else None))
    write_file(path, leaves)


def _sync_all(partial: Path, placer: Placer) -> None:
    fresh = [] if partial.is_dir() else [partial]
    for folder, _, names in os.walk(partial):
        files = [Path(folder, name) for name in names]
        fresh += [Path(folder), *(file for file in files if file not in placer.placed)]
    placer.sync(fresh)
