"""Finds the checkpoint that a path means, in every layout that people have.

A run of this template (`checkpoints/<step>/`), a CheckpointManager's root, one of its steps (with
one item or several), a bare Orbax item (Standard, PyTree, v1), a Flax msgpack or safetensors file.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from linen_nnx.disk.store import DICT, Item, Key, Leaf, StoreError, is_item, read_item

SUFFIXES = (".msgpack", ".safetensors")
_STATE_ITEMS = ("state", "default", "train_state", "items")
_PARTS = ("params", "batch_stats", "model", "opt_state", "optimizer", "ema", "ema_params", "step")
_STEP = re.compile(r"(?:.*[_-])?(\d+)")
_UNFINISHED = ".orbax-checkpoint-tmp"


class Reader(Protocol):
    """Reads leaves of a source as numpy arrays, typed PRNG keys as their raw words."""

    def read(self, leaves: Sequence[Leaf]) -> list[Any]: ...


@dataclass(frozen=True)
class Source:
    """One checkpoint on disk. What it holds is read when it is asked for."""

    path: Path
    kind: Literal["run", "root", "step", "item", "file"]
    folder: Path
    """The directory of the step that was chosen, or the bare item, or the file."""
    paths: tuple[Path, ...] = ()
    """The items that make up the training state; others of the step are carried along."""
    run: dict[str, Any] | None = None
    """Of this template's own runs: `config`, `rules` and `stage`."""

    @cached_property
    def items(self) -> list[Item]:
        """The items; a file has none."""
        items = [read_item(path, number) for number, path in enumerate(self.paths)]
        if len({(item.ocdbt, item.zarr3) for item in items}) > 1:
            raise StoreError(f"the items of {self.folder} differ in format: choose with --item")
        return items

    @cached_property
    def leaves(self) -> list[Leaf]:
        """All leaves; of several items, below the items' names."""
        if self.kind == "file":
            return self._file.leaves
        return [
            leaf.at((Key(item.path.name, DICT), *leaf.keys)) if len(self.items) > 1 else leaf
            for item in self.items
            for leaf in item.leaves
        ]

    @cached_property
    def reader(self) -> Reader:
        """Reads arrays. Imports numpy and tensorstore, which plain re-keying does without."""
        if self.kind == "file":
            return self._file
        from linen_nnx.disk.stream import ItemReader

        return ItemReader(self.items)

    @cached_property
    def _file(self) -> Any:
        from linen_nnx.disk.files import FileReader

        return FileReader(self.folder)

    def __str__(self) -> str:
        item = "item " + " + ".join(path.name for path in self.paths)
        return {
            "run": f"run directory, {self.folder.parent.name}/{self.folder.name}, {item}",
            "root": f"CheckpointManager root, step {self.folder.name}, {item}",
            "step": f"step, {item}",
            "item": "Orbax item",
            "file": f"{self.folder.suffix[1:]} file",
        }[self.kind]


def find(
    path: str | Path, step: int | None = None, item: str | None = None, part: str = "checkpoints"
) -> Source:
    """The checkpoint at `path`: of several steps the latest, unless `step` says otherwise.

    `item` names the training state's item where a step has several that may be it; `part` is the
    folder of a run directory. Raises `StoreError` with what was seen if there is no checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise StoreError(f"{path} does not exist")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise StoreError(f"{path} is a file, but neither {' nor '.join(SUFFIXES)}")
        return Source(path, "file", path)
    if _UNFINISHED in path.name:
        raise StoreError(f"{path} is a save that was never finished")
    if is_item(path):
        return Source(path, "item", path, (path,))
    if not all(_STEP.fullmatch(child.name) for child in _pytrees(path)):
        return _step(path, "step", path, item)
    if (path / "checkpoints").is_dir():
        return _step(path, "run", _latest(path / part, step), item)
    return _step(path, "root", _latest(path, step), item)


def parts(path: Path) -> list[str]:
    """The folders of a run directory that hold checkpoints; of other paths, the default alone."""
    best = path / "best"
    more = (path / "checkpoints").is_dir() and best.is_dir() and any(map(_pytrees, _folders(best)))
    return ["checkpoints", "best"] if more else ["checkpoints"]


def _folders(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir())


def _pytrees(folder: Path) -> list[Path]:
    found = (child for child in _folders(folder) if is_item(child))
    return [child for child in found if _UNFINISHED not in child.name]


def _latest(root: Path, wanted: int | None) -> Path:
    steps = {
        int(match[1]): child
        for child in _folders(root)
        if (match := _STEP.fullmatch(child.name)) and (is_item(child) or _pytrees(child))
    }
    if wanted is None and steps:
        return steps[max(steps)]
    if wanted in steps:
        return steps[wanted]
    if steps:
        raise StoreError(f"{root} has no step {wanted}, only {sorted(steps)}")
    seen = sorted(child.name for child in root.iterdir())
    if any(_UNFINISHED in name for name in seen):
        raise StoreError(f"{root} holds a save that was never finished, and no other: {seen}")
    raise StoreError(
        f"no checkpoint found in {root}: expected a run, a CheckpointManager's root or step, an "
        f"Orbax item (with `_METADATA`), or a file {' or '.join(SUFFIXES)}; saw {seen[:10]}"
    )


def _step(path: Path, kind: Any, folder: Path, wanted: str | None) -> Source:
    if is_item(folder):
        return Source(path, kind, folder, (folder,))
    items = {item.name: item for item in _pytrees(folder)}
    parts = [name for name in _PARTS if name in items]
    single = [name for name in _STATE_ITEMS if name in items]
    if wanted is not None and wanted not in items:
        raise StoreError(f"{folder} has no pytree item `{wanted}`, only {sorted(items)}")
    names = [wanted] if wanted is not None else single[:1] or parts or list(items)
    if len(names) > 1 and names != parts:
        raise StoreError(f"{folder} has several items: choose with --item from {sorted(items)}")
    run = folder / "run" / "metadata"
    try:
        own = json.loads(run.read_text()) if run.is_file() else None
    except ValueError as error:
        raise StoreError(f"{run} cannot be read: {error}") from None
    if own is not None and not {"config", "rules", "stage"} <= set(own):
        own = None
    return Source(path, kind, folder, tuple(items[name] for name in names), own)
