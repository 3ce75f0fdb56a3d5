"""Converts a checkpoint: whole training state, exact, atomic.

The target is absent or complete, on a disk and in a bucket (`targets.py` says how). The source is
only read. In order:

    plan       every leaf of every checkpoint, or a refusal        nothing is written yet
    workspace  a locked directory beside the target                `transaction.py`
               or a claim beside it, in a bucket                   `claims.py`
    write      data files, trees, side files                       `rekey.py`, `stream.py`
    seal       report and digests of each checkpoint               `digests.py`
    publish    synced to disk, and one rename                      `targets.py`
               or put in the bucket, the marks last                `in_bucket.py`
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linen_nnx.book.moves import targets_of
from linen_nnx.book.reading import read_json
from linen_nnx.disk import checked, digests
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.complete import files_below
from linen_nnx.disk.conversion import REPORT, RULES, Conversion
from linen_nnx.disk.finding import check_beside, step_folders
from linen_nnx.disk.item import OF_THE_TREE
from linen_nnx.disk.placing import Placer
from linen_nnx.disk.planning import plan_conversion
from linen_nnx.disk.rekey import write_store
from linen_nnx.disk.remote import Remote, as_path
from linen_nnx.disk.runs import ITEM, NO_RUNS, Runs
from linen_nnx.disk.side_files import write_side_files
from linen_nnx.disk.sources import READABLE, SUFFIXES, Source
from linen_nnx.disk.targets import Target, target_of
from linen_nnx.disk.transaction import TargetError
from linen_nnx.disk.transfers import copy_file
from linen_nnx.errors import Refusal

_SAID = Path(ITEM, "metadata")
_ORBAX_META = "_CHECKPOINT_METADATA"
_OURS = (REPORT, RULES, digests.NAME)
"""What a conversion writes anew in each folder, and so does not take over from an earlier one."""


@dataclass(frozen=True)
class Result:
    """What `convert` did: `status` is `done`, or `equal` if the target was there already."""

    status: str
    out: Path
    reports: tuple[dict[str, Any], ...]
    """The `report.json` of each checkpoint written (a run may have its latest and its best)."""
    notes: tuple[str, ...] = ()
    """What a person should know of where it lies."""


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

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from linen_nnx import RuleBook
      >>> folder = tempfile.TemporaryDirectory()
      >>> source, out = Path(folder.name, "linen.npz"), Path(folder.name, "nnx")
      >>> np.savez(source, **{"params/d/kernel": np.ones((6, 3), "float32")})
      >>> rule = {"linen": "params/d/kernel", "nnx": "a/w"}
      >>> rules = RuleBook.from_dict({"version": 1, "rules": [rule]})
      >>> convert(source, out, "nnx", rules=rules).status
      'done'
      >>> convert(source, out, "nnx", rules=rules).status
      'equal'
      >>> sorted(file.name for file in out.iterdir() if file.is_file())
      ['_METADATA', 'digests.json', 'manifest.ocdbt', 'report.json', 'rules.yaml']
      >>> folder.cleanup()
    """
    path, out = as_path(path), as_path(out)
    to_file = out.suffix in SUFFIXES
    if out.suffix in READABLE and not to_file:
        known = " or ".join(SUFFIXES)
        raise TargetError(f"{out}: {out.suffix} is read and not written: choose a file {known}")
    progress("planning")
    conversions = _planned(path, to, out.suffix if to_file else "", runs, options)
    target = target_of(out, link, digest, progress)
    if target.is_there(conversions):
        return _existing(out, conversions, target)
    target.check(path, list(conversions.values()), runs)
    with target.writing() as (partial, placer):
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
            reports = []
            for relative, conversion in conversions.items():
                folder = partial / relative
                target.finish_checkpoint(folder, _is_step(conversion.source))
                reports.append(_seal(conversion, folder, placer, hashed))
        target.publish(partial, placer)
    return Result("done", out, tuple(reports), tuple(target.notes))


def _planned(
    path: Path, to: str, suffix: str, runs: Runs, options: dict[str, Any]
) -> dict[str, Conversion]:
    """The conversion of each checkpoint of the source, by where it lies in the output.

    A run has one for its latest and one for its best; anything else has one. `suffix`: that of the
    file to be written, if it is one.
    """
    conversions = {}
    roots = (None,) if suffix else step_folders(path, runs)
    for number, root in enumerate(roots):
        # A step is asked for among the latest. The best is at a step of its own.
        chosen: dict[str, Any] = {**options, "step": None} if number else options
        one = plan_conversion(path, to, root=root, suffix=suffix, runs=runs, **chosen)
        if not suffix:
            _check_beside(one.source, runs)
        conversions[_relative(one, root)] = one
    return conversions


def _check_beside(source: Source, runs: Runs) -> None:
    """Refuses a run directory whose other files are not as its checkpoint says."""
    try:
        check_beside(source, runs)
    except Refusal as error:
        alone = f"Of the checkpoint alone, {source.folder}, they are no part: convert that."
        raise StoreError(f"{error}\n{alone}") from None


def _relative(conversion: Conversion, root: str | None) -> str:
    """Where a converted checkpoint lies in the output; `root` is a run's folder of steps."""
    source = conversion.source
    if source.kind == "run":
        assert root is not None
        return f"{root}/{source.folder.name}"
    return source.step_name


def _existing(out: Path, conversions: dict[str, Conversion], target: Target) -> Result:
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
        if not (digests.check(out / relative) or _copies_intact(out / relative, report)):
            raise TargetError(
                f"{out} exists and was made by this conversion, but has no digests that could "
                "show its bytes intact: run `verify`"
            )
    target.left_over()  # of a process that was killed between its last two steps
    return Result("equal", out, tuple(reports))


def _copies_intact(folder: Path, report: dict[str, Any]) -> bool:
    """Whether all that a server copied is there, at its whole length.

    Objects never change, and a copy is there when all of it is.
    """
    sizes = report.get("server_copied")
    if not isinstance(folder, Remote) or not isinstance(sizes, dict):
        return False
    folder.look_below()
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return False
    return True


def _is_step(source: Source) -> bool:
    """Whether the result is a step with items, and not an item alone."""
    return bool(source.paths) and source.folder not in source.paths


def _write(conversion: Conversion, folder: Path, placer: Placer, runs: Runs) -> None:
    """Writes one converted checkpoint to `folder`, all but its report and digests."""
    source = conversion.source
    folder.mkdir(parents=True, exist_ok=True)
    # What was an item by itself stays one; in a step, the item keeps a name.
    item = folder / _name(source) if _is_step(source) else folder
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
    write_store(item, source, conversion.moves, placer)
    header = source.items[0].header if source.items else _HEADER
    write_side_files(item, list(targets_of(conversion.moves)), header)
    for original in source.paths:
        for file in sorted(original.iterdir()):
            # Files about the old tree would mislead Orbax about the new one.
            skipped = file.name in _OURS or file.name in OF_THE_TREE
            if file.is_file() and not skipped and not (item / file.name).exists():
                copy_file(file, item / file.name)


def _seal(
    conversion: Conversion, folder: Path, placer: Placer, hashed: dict[Path, digests.Digest]
) -> dict[str, Any]:
    """Writes report and digests of a checkpoint whose files are in place; returns the report.

    Raises `DigestError` if a copy differs from the source's own digests.
    """
    placed = {new: old for new, old in placer.placed.items() if folder in new.parents}
    found = {new: hashed[new] for new in placed if new in hashed}
    carried = _digests_of_source(conversion.source, placed)
    wrong = []
    for new, digest in carried.items():
        if found.get(new, digest) != digest:
            wrong.append(str(new.relative_to(folder)))
    if wrong:
        raise digests.DigestError(f"the source is damaged, by its own digests: {wrong}")
    unread = placed.keys() & placer.unread
    by_server: dict[str, int] = {}
    for new in unread:
        if isinstance(placed[new], Remote):
            by_server[str(new.relative_to(folder))] = placed[new].stat().st_size
    # Files that were linked or copied by a server, and not hashed, have the digests that the source
    # has of them. If it has none of one, digests would have to read what that was to spare.
    covered = placer.hash_links or unread <= carried.keys()
    report = {
        "version": 1,
        **conversion.summary(),
        "linked": bool(unread) and not by_server,
        "server_copied": by_server,
        "fell_back": placer.fell_back,
        "digests": covered,
        "fingerprint": conversion.fingerprint,
        "origin": conversion.origin(),
    }
    # A line for each entry: the tree of the origin may have thousands of leaves, and a person
    # should still find the notes.
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in report.items())
    (folder / REPORT).write_text("{" + ",\n".join(lines) + "}\n")
    if covered:
        # Last of all files, as it covers the report, too.
        known = {**carried, **found}
        digests.write(folder, {str(new.relative_to(folder)): d for new, d in known.items()})
    return report


def _digests_of_source(source: Source, placed: Mapping[Path, Path]) -> dict[Path, digests.Digest]:
    """The source's own digests of the files that were placed, by their new paths.

    Files keep their bytes, and so a digest made when they were saved goes on covering them.
    """
    known = digests.read(source.folder) if source.folder.is_dir() else None
    found = {}
    if known:
        for new, old in placed.items():
            name = str(old.relative_to(source.folder))
            if name in known:
                found[new] = known[name]
    return found


def _name(source: Source) -> str:
    """The name of the state's item; parts that were saved one by one become `state`."""
    return source.paths[0].name if len(source.paths) == 1 else "state"


# The header of an item that was a file: as Orbax writes it today.
_HEADER: dict[str, Any] = {
    "use_ocdbt": True,
    "use_zarr3": False,
    "store_array_data_equal_to_fill_value": True,
    "custom_metadata": None,
}


def _carry_along(conversion: Conversion, folder: Path, placer: Placer, runs: Runs) -> None:
    """Takes over what else a step holds: other items, Orbax's own files, what it says of itself."""
    source = conversion.source
    for child in source.beside:
        is_said = source.said is not None and child.name == ITEM
        if child.name in _OURS or child.name in conversion.beside or is_said:
            continue
        if child.is_file():
            copy_file(child, folder / child.name)
        elif child.is_dir():
            _place_folder(child, source.folder, folder, placer)
        else:
            raise StoreError(f"{child} is neither a file nor a folder, nor a link to one")
    if source.said is not None and conversion.to.stage is not None:
        _write_said(conversion, folder, placer, runs)
    _rename_handlers(folder, source)


def _place_folder(child: Path, above: Path, folder: Path, placer: Placer) -> None:
    """Places the files of a folder, which lies in `above`, at the same paths in `folder`."""
    for file in files_below(child):
        placer.place(file, folder / file.relative_to(above))


def _write_said(conversion: Conversion, folder: Path, placer: Placer, runs: Runs) -> None:
    """Writes what a checkpoint says of itself, for the stage that it has come to."""
    source, to = conversion.source, conversion.to
    assert source.said is not None and to.stage is not None
    content = runs.moved(source.said.content, to.stage)
    content |= {"stage": to.stage, "forms": dict(to.parts)}
    content["rules"] = conversion.book.to_dict()  # the one that is beside it, too
    for file in files_below(source.folder / ITEM):
        if file.relative_to(source.folder) != _SAID:
            placer.place(file, folder / file.relative_to(source.folder))
    (folder / _SAID).parent.mkdir(exist_ok=True)
    (folder / _SAID).write_text(json.dumps(content))


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
    if not isinstance(handlers, dict):
        return
    known = dict(handlers)
    for part in source.paths:
        if part.name in handlers:
            known[_name(source)] = handlers[part.name]
    # An item that was left out, or joined with another, would be looked for and not found.
    kept = {name: handler for name, handler in known.items() if (folder / name).is_dir()}
    content["item_handlers"] = kept
    path.write_text(json.dumps(content))


def _write_run(path: Path, partial: Path, conversion: Conversion, runs: Runs) -> None:
    """Writes what a run directory holds beside its checkpoints."""
    stage = conversion.to.stage
    assert stage is not None  # a whole run directory goes to a stage
    for file in runs.taken(path):
        copy_file(file, partial / file.relative_to(path))
    runs.write(path, partial, stage, conversion.book)


def _write_file(conversion: Conversion, path: Path) -> None:
    """Writes the result as one file, from the whole tree in memory."""
    from linen_nnx.disk.files import write_file  # needs numpy

    leaves = []
    for move in conversion.moves:
        arrays: list[Any] = []
        if move.targets and move.targets[0].zarr is not None:
            arrays = move.run(conversion.source.reader.read(move.sources))
        for number, leaf in enumerate(move.targets):
            # The level of `nnx.State` that holds a variable's value means nothing in a file.
            boxed = not conversion.to.flat and leaf.keys[-1].name == "value"
            keys = leaf.keys[:-1] if boxed else leaf.keys
            leaves.append((keys, leaf, arrays[number] if arrays else None))
    write_file(path, leaves)
