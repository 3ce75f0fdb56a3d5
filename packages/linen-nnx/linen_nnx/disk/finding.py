"""Finds the checkpoint that a path means, in every layout that people have.

A folder of steps (a CheckpointManager's root, `checkpoint_N` of Flax, `model-100` of one's own
loop), one of its steps (with one item or several), a bare item of Orbax of any age, a file, or a
folder of shards. `docs/formats.md` lists them all. A whole run directory is one as far as the code
that writes it says so (`runs.py`).

From a path to a `Source`, one question after another. The first that is answered by yes settles it:

    is it a file?                        model.msgpack                    that file
    is it an item?                       state/ with `_METADATA`          that item
    does it hold shards and an index?    model.safetensors.index.json     those files
    does it hold items with names?       7/ with `params/`, `opt_state/`  that step
    is it a run, or has `checkpoints/`?  run/checkpoints/                 the steps in there
    does it hold steps?                  6/  7/  model-100/               the latest, or `step`

`steps.py` knows the steps of a folder and which of them were finished.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from linen_nnx.book.reading import read_json
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.item import INDEX, begins_as_map, has_index, is_item
from linen_nnx.disk.remote import as_path
from linen_nnx.disk.runs import NO_RUNS, Runs, said_in
from linen_nnx.disk.sources import INDICES, READABLE, Source
from linen_nnx.disk.steps import (
    Choice,
    choose,
    is_named_as_step,
    pytrees,
    refuse_unfinished,
)

_PICKLES = (".pkl", ".pickle", ".npy", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".joblib")
# What people call the item of a whole state, the likeliest first.
_STATE_ITEMS = ("state", "default", "train_state", "items")
# What people call items that make up a state together.
_PARTS = ("params", "batch_stats", "model", "opt_state", "optimizer", "ema", "ema_params", "step")


def find(
    path: str | Path,
    step: float | None = None,
    item: str | None = None,
    root: str | None = None,
    prefix: Sequence[str] = (),
    runs: Runs = NO_RUNS,
) -> Source:
    """The checkpoint at `path`: of several steps the latest, unless `step` says otherwise.

    Args:
      path: what was named.
      step: which step of a folder of steps.
      item: the training state's item, where a step has several that may be it.
      root: the folder of steps in a run directory to look in; the first of them if None.
      prefix: which group of steps is meant, where a folder has several (`model-100` beside
        `model_ema-100`); more than one make up one state together.
      runs: which directories are runs, and what their checkpoints say.

    Raises:
      StoreError: with what was seen, if there is no checkpoint, or if it is not clear which.

    Example:
      >>> import tempfile
      >>> import numpy as np
      >>> from linen_nnx.disk import msgpack_tree
      >>> file = Path(tempfile.mkdtemp(), "model.msgpack")
      >>> msgpack_tree.write(file, {"fc": {"bias": np.zeros(3, "float32")}})
      >>> source = find(file)
      >>> print(source, [leaf.path for leaf in source.leaves])
      msgpack file ['fc/bias']
    """
    path = as_path(path)
    if not path.exists():
        raise StoreError(f"{path} does not exist")
    if path.is_file():
        return _file_source(path, path)
    refuse_unfinished(path)
    if is_item(path):
        return _source_in(path, "item", path, item, runs)
    if (index := _shards(path)) is not None:
        return _file_source(path, index)
    # Items whose names are no numbers: those of one step. Items `6` and `7` are bare steps.
    if not all(is_named_as_step(child) for child in pytrees(path)):
        return _source_in(path, "step", path, item, runs)
    folder = path
    roots = runs.roots(path)
    if roots:
        folder = runs.folder(path, root or roots[0])
    elif (path / "checkpoints").is_dir():
        # The folder of somebody's own run, which is meant by its name.
        if choose(path, None, (), _is_checkpoint_file) is not None:
            raise StoreError(f"{path} holds steps, and so may {path / 'checkpoints'}: name one")
        folder = path / "checkpoints"
    choice = choose(folder, step, prefix, _is_checkpoint_file)
    if choice is None:
        raise _no_checkpoint(folder)
    return _source_of_steps(path, "run" if roots else "root", folder, choice, item, runs)


def check_beside(source: Source, runs: Runs) -> bool | None:
    """Asks `runs` whether the run directory that a checkpoint was found in is as it should be.

    None where there is no run directory, so that nothing belongs to the checkpoint.
    """
    step = source.step
    if source.kind != "run" or source.said is None or step is None:
        return None
    if not step.is_counted:
        raise StoreError(f"{step.path} is no step of a run, which are whole numbers from 0 on")
    return runs.check(source.path, int(step.number), source.said.content)


def step_folders(path: Path, runs: Runs) -> tuple[str | None, ...]:
    """The folders of a run directory that hold steps; of other paths, the default alone.

    The first is taken whether it holds steps or not, so that `find` says what is missing.
    """
    first, *more = runs.roots(path) or (None,)
    return (first, *[root for root in more if _holds_steps(runs.folder(path, root))])


def _holds_steps(folder: Path) -> bool:
    return folder.is_dir() and choose(folder, None, (), _is_checkpoint_file) is not None


def _is_checkpoint_file(path: Path) -> bool:
    """Whether a file among steps is one, as `checkpoint_10` of Flax."""
    return path.suffix not in READABLE + _PICKLES and begins_as_map(path)


def _file_source(path: Path, file: Path) -> Source:
    """The checkpoint in one file. Raises `StoreError` for files that none can be read from."""
    # A person may name the file that they see in the folder.
    if file.name == INDEX and has_index(file.parent):
        raise StoreError(f"{file} is the index of a checkpoint: name its folder, {file.parent}")
    if file.name.endswith(_PICKLES):
        raise StoreError(
            f"{file} holds pickles, by its name, and reading one runs code from it. Load it where "
            "you trust it, and save its arrays under flat names with numpy.savez or safetensors"
        )
    # Flax gives its files no suffix: `checkpoint_10`.
    known = file.suffix in READABLE or file.name.endswith(INDICES)
    if not known and not _is_checkpoint_file(file):
        raise StoreError(f"{file} is a file, but none of {', '.join(READABLE)}, nor of Flax")
    return Source(path, "file", file, files={file.name: file})


def _shards(folder: Path) -> Path | None:
    """The index of the shards that lie in a folder, if they do."""
    found = [child for child in sorted(folder.iterdir()) if child.name.endswith(INDICES)]
    if len(found) > 1:
        names = ", ".join([child.name for child in found])
        raise StoreError(f"{folder} holds several checkpoints in shards: name one of {names}")
    return found[0] if found else None


def _no_checkpoint(folder: Path) -> StoreError:
    """The error for a folder without a checkpoint."""
    seen, files, inside = [], [], []
    for child in sorted(folder.iterdir()):
        seen.append(child.name)
        if child.suffix in READABLE:
            files.append(child.name)
        # The path may be one level too high.
        if is_item(child) or _holds_steps(child):
            inside.append(child)
    hint = f". Name a file to convert it: {', '.join(files[:10])}" if files else ""
    if inside:
        hint = f". There is one in {', '.join(map(str, inside[:10]))}: name that"
    return StoreError(
        f"no checkpoint found in {folder}: expected a run, a CheckpointManager's root or step, an "
        f"Orbax item (with `_METADATA` or an index `{INDEX}`), or a file {', '.join(READABLE)}; "
        f"saw {', '.join(seen[:10])}{hint}"
    )


def _source_of_steps(
    path: Path, kind: Any, folder: Path, choice: Choice, item: str | None, runs: Runs
) -> Source:
    """The source that the chosen steps are."""
    steps = choice.steps
    more: dict[str, Any] = {"step": steps[0], "passed": choice.notes}
    if len(steps) == 1:
        return _source_in(path, kind, steps[0].path, item, runs, **more)
    # Several: `model-100` and `optimizer-100` become one source of the items of both.
    sources = [_source_in(path, kind, step.path, item, runs) for step in steps]
    are_files = {source.is_file for source in sources}
    if True in are_files:
        if False in are_files:
            raise StoreError(f"{folder}: files and folders make up no state together: name one")
        files = {}
        for step, source in zip(steps, sources, strict=True):
            (file,) = source.files.values()
            files[step.group] = file
        return Source(path, kind, folder, names=tuple(files), files=files, **more)
    paths: list[Path] = []
    names: list[str] = []
    for step, source in zip(steps, sources, strict=True):
        paths += source.paths
        # The one item of a step is called as the step, as its own name may be `default` in each.
        names += [step.group] if len(source.paths) == 1 else source.names
    if len(set(names)) < len(names):
        raise StoreError(f"{folder}: the groups chosen have items of one name: {sorted(names)}")
    return Source(path, kind, folder, tuple(paths), tuple(names), **more)


def _source_in(
    path: Path, kind: Any, folder: Path, wanted: str | None, runs: Runs, **more: Any
) -> Source:
    """The source in one folder or file."""
    if folder.is_file():
        return Source(path, kind, folder, files={folder.name: folder}, **more)
    if is_item(folder):
        if not (folder / "_METADATA").is_file():
            from linen_nnx.disk.legacy import read_index  # needs numpy

            # Then it is a file, and the folder around it holds nothing else of the state.
            if read_index(folder).arrays_inside:
                index = folder / INDEX
                return Source(path, kind, folder, files={folder.name: index}, **more)
        return Source(path, kind, folder, (folder,), (folder.name,), **more)
    items = {item.name: item for item in pytrees(folder)}
    names = _state_items(folder, items, wanted)
    paths = tuple(items[name] for name in names)
    return Source(path, kind, folder, paths, tuple(names), said_in(folder, runs), **more)


def _state_items(folder: Path, items: Mapping[str, Path], wanted: str | None) -> list[str]:
    """The names of the items that make up the training state."""
    if wanted is not None:
        if wanted not in items:
            raise StoreError(f"{folder} has no pytree item `{wanted}`, only {sorted(items)}")
        return [wanted]
    for name in _STATE_ITEMS:
        if name in items:
            return [name]
    if parts := [name for name in _PARTS if name in items]:
        return parts
    if len(items) <= 1:
        return list(items)
    # The result of a conversion that was told which of several items to take.
    converted = _converted_item(folder)
    if isinstance(converted, str) and converted in items:
        return [converted]
    raise StoreError(f"{folder} has several items: choose with --item from {sorted(items)}")


def _converted_item(folder: Path) -> Any:
    """The item that a converted step was made of, by its report."""
    try:
        report = read_json(folder / "report.json")
    except (OSError, ValueError):
        return None
    return report.get("item") if isinstance(report, dict) else None
