"""Finds the checkpoint that a path means, in every layout that people have.

A folder of steps (a CheckpointManager's root, `checkpoint_N` of Flax, `model-100` of one's own
loop), one of its steps (with one item or several), a bare item of Orbax of any age, a file, or a
folder of shards. `docs/formats.md` lists them all. A whole run directory is one as far as the code
that writes it says so (`runs.py`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from linen_nnx.book.reading import read_json
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.leaves import DICT, Key, Leaf
from linen_nnx.disk.remote import Remote, as_path
from linen_nnx.disk.runs import NO_RUNS, Runs, Said, said_in
from linen_nnx.disk.steps import Choice, Step, choose, is_named_as_step, pytrees, refuse_unfinished
from linen_nnx.disk.store import INDEX, Item, begins_as_map, has_index, is_item, read_item
from linen_nnx.errors import quoted

SUFFIXES = (".msgpack", ".safetensors")
"""Of the files that are read and written."""
READABLE = (*SUFFIXES, ".npz")
INDICES = tuple(f"{suffix}.index.json" for suffix in SUFFIXES)
"""Of the files that list the shards of a checkpoint."""
_PICKLES = (".pkl", ".pickle", ".npy", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".joblib")
_STATE_ITEMS = ("state", "default", "train_state", "items")
_PARTS = ("params", "batch_stats", "model", "opt_state", "optimizer", "ema", "ema_params", "step")


class Reader(Protocol):
    """Reads leaves of a source as numpy arrays, typed PRNG keys as their raw words."""

    def read(self, leaves: Sequence[Leaf]) -> list[Any]: ...


@dataclass(frozen=True)
class Source:
    """One checkpoint on disk. What it holds is read when it is asked for."""

    path: Path
    kind: Literal["run", "root", "step", "item", "file"]
    folder: Path
    """The directory of the step that was chosen, or the bare item, or the file. Of several steps
    that make up one state, the folder in which they lie."""
    paths: tuple[Path, ...] = ()
    """The items that make up the training state; others of the step are carried along."""
    names: tuple[str, ...] = ()
    """What several items (or files) are called in the state that they make up."""
    said: Said | None = None
    """What the checkpoint says of itself, if it does."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """The files that make up the state, where it lies in no item."""
    step: Step | None = None
    """The step that was chosen among those of a folder."""
    passed: tuple[str, ...] = ()
    """What was passed over on the way here."""

    @cached_property
    def notes(self) -> list[str]:
        """What a person should know of how it was found and read."""
        notes = list(self.passed)
        if self.is_file:
            notes += self._file.notes
        for index in self._indices:
            if index.left_out:
                left = quoted(index.left_out)
                notes.append(f"{left} are left out: only {index.writer} knows their form")
        return notes

    @cached_property
    def _indices(self) -> list[Any]:
        """The indices of the items that have one in place of `_METADATA`."""
        old = [path for path in self.paths if not (path / "_METADATA").is_file()]
        if not old:
            return []
        from linen_nnx.disk.legacy import read_index  # needs numpy

        return [read_index(path) for path in old]

    @property
    def is_file(self) -> bool:
        """Whether its leaves lie in files and not in the store of an item."""
        return bool(self.files)

    @property
    def beside(self) -> list[Path]:
        """What else the chosen step holds."""
        if self.folder in self.paths or self.is_file or self._is_joined:
            return []
        return [child for child in sorted(self.folder.iterdir()) if child not in self.paths]

    @property
    def step_name(self) -> str:
        """What the step is called in the result, if it is one of several: Orbax finds it so."""
        if self.step is None:
            return ""
        return str(self.step.number) if self._is_joined else self.step.name

    @property
    def _is_joined(self) -> bool:
        return self.step is not None and self.step.path != self.folder

    @cached_property
    def items(self) -> list[Item]:
        """The items; a file has none."""
        items = [_read_item(path, number) for number, path in enumerate(self.paths)]
        if len({(item.ocdbt, item.zarr3) for item in items}) > 1:
            raise StoreError(f"the items of {self.folder} differ in format: choose with --item")
        return items

    @cached_property
    def leaves(self) -> list[Leaf]:
        """All leaves; of several items, below the items' names."""
        parts = self._parts
        if len(parts) == 1:
            return list(*parts.values())
        if self._is_joined:
            from linen_nnx.disk.joining import join

            return join(parts)
        leaves = []
        for name, part in parts.items():
            leaves += [leaf.at((Key(name, DICT), *leaf.keys)) for leaf in part]
        return leaves

    @property
    def _parts(self) -> Mapping[str, Sequence[Leaf]]:
        """The leaves of each item or file."""
        if self.is_file:
            return self._file.parts
        pairs = zip(self.names, self.items, strict=True)
        return {name: item.leaves for name, item in pairs}

    @cached_property
    def reader(self) -> Reader:
        """Reads arrays. Imports numpy and tensorstore, which plain re-keying does without."""
        if self.is_file:
            return self._file
        if any(item.inside for item in self.items):
            from linen_nnx.disk.legacy import IndexReader

            return IndexReader(self.items)
        from linen_nnx.disk.stream import ItemReader

        return ItemReader(self.items)

    @cached_property
    def _file(self) -> Any:
        from linen_nnx.disk.files import FileReader

        return FileReader(self.files)

    def bytes_of(self) -> list[Path]:
        """The files whose content settles what the leaves are, for a fingerprint."""
        if self.is_file:
            from linen_nnx.disk.files import files_of

            return [part for path in self.files.values() for part in files_of(path)]
        found = []
        for item in self.items:
            names = ("_METADATA", INDEX, "_sharding", "manifest.ocdbt")
            found += [item.path / name for name in names]
            if not item.ocdbt:
                found += sorted(item.path.rglob("*"))
        return [path for path in dict.fromkeys(found) if path.is_file()]

    def __str__(self) -> str:
        what = _format(next(iter(self.files.values()))) if self.is_file else self._items_text
        if self.kind == "run":
            return f"run directory, {self.folder.parent.name}/{self.folder.name}, {what}"
        if self.step is None:
            return what
        is_root = self.step.path.is_dir() and self.step.name == self.step.path.name
        is_root = is_root and self.step.is_counted
        where = "CheckpointManager root" if is_root else "folder of steps"
        if self.step.path.parent != self.path:
            where += f" `{self.step.path.parent.name}`"
        chosen = " + ".join(self.names) if self._is_joined else self.step.path.name
        return f"{where}, step {chosen}, {what}"

    @property
    def _items_text(self) -> str:
        """What the items are, and who wrote them where it was not an Orbax of today."""
        text = "Orbax item"
        if self.folder not in self.paths:
            text = "item " + " + ".join(path.name for path in self.paths)
            text = f"step, {text}" if self.kind == "step" else text
        if not self._indices:
            return text
        return f"{text} with an index, as {self._indices[0].writer} writes"


def _format(path: Path) -> str:
    """What a file is, in words."""
    for suffix, index in zip(SUFFIXES, INDICES, strict=True):
        if path.name.endswith(index):
            return f"{suffix[1:]} file in shards"
    if path.suffix in READABLE:
        return f"{path.suffix[1:]} file"
    if path.name == INDEX:
        return "Flax checkpoint as Orbax 0.2 to 0.4 aggregates it (msgpack)"
    return "Flax checkpoint file (msgpack)"


def _read_item(path: Path, number: int) -> Item:
    if isinstance(path, Remote):
        path.look_below()
    if (path / "_METADATA").is_file():
        return read_item(path, number)
    from linen_nnx.disk.legacy import read_index_item  # needs numpy

    return read_index_item(path, number)


def find(
    path: str | Path,
    step: float | None = None,
    item: str | None = None,
    part: str | None = None,
    prefix: Sequence[str] = (),
    runs: Runs = NO_RUNS,
) -> Source:
    """The checkpoint at `path`: of several steps the latest, unless `step` says otherwise.

    Args:
      path: what was named.
      step: which step of a folder of steps.
      item: the training state's item, where a step has several that may be it.
      part: the folder of a run directory, if not that of the latest steps.
      prefix: which group of steps is meant, where a folder has several (`model-100` beside
        `model_ema-100`); more than one make up one state together.
      runs: which directories are runs, and what their checkpoints say.

    Raises:
      StoreError: with what was seen, if there is no checkpoint, or if it is not clear which.
    """
    path = as_path(path)
    if not path.exists():
        raise StoreError(f"{path} does not exist")
    if path.is_file():
        return _file(path, path)
    refuse_unfinished(path)
    if is_item(path):
        return _one(path, "item", path, item, runs)
    if (index := _shards(path)) is not None:
        return _file(path, index)
    if not all(is_named_as_step(child) for child in pytrees(path)):
        return _one(path, "step", path, item, runs)
    folder = path
    roots = runs.roots(path)
    if roots:
        folder = path / (part or roots[0])
    elif (path / "checkpoints").is_dir():
        if choose(path, None, (), _is_checkpoint_file) is not None:
            raise StoreError(f"{path} holds steps, and so may {path / 'checkpoints'}: name one")
        folder = path / "checkpoints"
    choice = choose(folder, step, prefix, _is_checkpoint_file)
    if choice is None:
        raise _nothing(folder)
    return _chosen(path, "run" if roots else "root", folder, choice, item, runs)


def check_beside(source: Source, runs: Runs) -> bool | None:
    """What `runs` says of the run directory that a checkpoint was found in; None where that was no
    run directory, so that nothing belongs to it."""
    step = source.step
    if source.kind != "run" or source.said is None or step is None:
        return None
    if not step.is_counted:
        raise StoreError(f"{step.path} is no step of a run, which are whole numbers from 0 on")
    return runs.check(source.path, int(step.number), source.said.content)


def parts(path: Path, runs: Runs) -> tuple[str | None, ...]:
    """The folders of a run directory that hold steps; of other paths, the default alone."""
    first, *more = runs.roots(path) or (None,)
    return (first, *(part for part in more if _holds_steps(path / part)))


def _holds_steps(folder: Path) -> bool:
    return folder.is_dir() and choose(folder, None, (), _is_checkpoint_file) is not None


def _is_checkpoint_file(path: Path) -> bool:
    """Whether a file among steps is one, as `checkpoint_10` of Flax."""
    return path.suffix not in READABLE + _PICKLES and begins_as_map(path)


def _file(path: Path, file: Path) -> Source:
    """The checkpoint in one file. Raises `StoreError` for files that none can be read from."""
    if file.name == INDEX and has_index(file.parent):
        raise StoreError(f"{file} is the index of a checkpoint: name its folder, {file.parent}")
    if any(file.name.endswith(suffix) for suffix in _PICKLES):
        raise StoreError(
            f"{file} holds pickles, by its name, and reading one runs code from it. Load it where "
            "you trust it, and save its arrays under flat names with numpy.savez or safetensors"
        )
    known = file.suffix in READABLE or file.name.endswith(INDICES)
    if not known and not _is_checkpoint_file(file):
        raise StoreError(f"{file} is a file, but none of {', '.join(READABLE)}, nor of Flax")
    return Source(path, "file", file, files={file.name: file})


def _shards(folder: Path) -> Path | None:
    """The index of the shards that lie in a folder, if they do."""
    found = [child for child in sorted(folder.iterdir()) if child.name.endswith(INDICES)]
    if len(found) > 1:
        names = ", ".join(child.name for child in found)
        raise StoreError(f"{folder} holds several checkpoints in shards: name one of {names}")
    return found[0] if found else None


def _nothing(folder: Path) -> StoreError:
    """The error for a folder without a checkpoint."""
    seen = sorted(child.name for child in folder.iterdir())
    files = [name for name in seen if Path(name).suffix in READABLE]
    hint = f". Name a file to convert it: {', '.join(files[:10])}" if files else ""
    inside = [child for child in sorted(folder.iterdir()) if is_item(child) or _holds_steps(child)]
    if inside:
        hint = f". There is one in {', '.join(map(str, inside[:10]))}: name that"
    return StoreError(
        f"no checkpoint found in {folder}: expected a run, a CheckpointManager's root or step, an "
        f"Orbax item (with `_METADATA` or an index `{INDEX}`), or a file {', '.join(READABLE)}; "
        f"saw {seen[:10]}{hint}"
    )


def _chosen(
    path: Path, kind: Any, folder: Path, choice: Choice, item: str | None, runs: Runs
) -> Source:
    """The source that the chosen steps are."""
    steps = choice.steps
    more: dict[str, Any] = {"step": steps[0], "passed": choice.notes}
    if len(steps) == 1:
        return _one(path, kind, steps[0].path, item, runs, **more)
    sources = [_one(path, kind, step.path, item, runs) for step in steps]
    if any(source.is_file for source in sources):
        if not all(source.is_file for source in sources):
            raise StoreError(f"{folder}: files and folders make up no state together: name one")
        files = {
            step.group: one
            for step, source in zip(steps, sources, strict=True)
            for one in source.files.values()
        }
        return Source(path, kind, folder, names=tuple(files), files=files, **more)
    paths: list[Path] = []
    names: list[str] = []
    for step, source in zip(steps, sources, strict=True):
        paths += source.paths
        names += [step.group] if len(source.paths) == 1 else source.names
    if len(set(names)) < len(names):
        raise StoreError(f"{folder}: the groups chosen have items of one name: {sorted(names)}")
    return Source(path, kind, folder, tuple(paths), tuple(names), **more)


def _one(
    path: Path, kind: Any, folder: Path, wanted: str | None, runs: Runs, **more: Any
) -> Source:
    """The source in one folder or file."""
    if folder.is_file():
        return Source(path, kind, folder, files={folder.name: folder}, **more)
    if is_item(folder):
        if not (folder / "_METADATA").is_file():
            from linen_nnx.disk.legacy import read_index  # needs numpy

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
    parts = [name for name in _PARTS if name in items]
    single = [name for name in _STATE_ITEMS if name in items]
    if wanted is not None and wanted not in items:
        raise StoreError(f"{folder} has no pytree item `{wanted}`, only {sorted(items)}")
    names = [wanted] if wanted is not None else single[:1] or parts or list(items)
    if len(names) > 1 and names != parts:
        converted = _converted_item(folder)  # the result of a conversion that was told which
        names = [converted] if isinstance(converted, str) and converted in items else names
    if len(names) > 1 and names != parts:
        raise StoreError(f"{folder} has several items: choose with --item from {sorted(items)}")
    return names


def _converted_item(folder: Path) -> Any:
    """The item that a converted step was made of, by its report."""
    try:
        report = read_json(folder / "report.json")
    except (OSError, ValueError):
        return None
    return report.get("item") if isinstance(report, dict) else None
