"""A checkpoint on disk, wherever it lies: its leaves, how they are read, and what it is called.

`finding.py` makes a `Source` of the path that a person names. The rest of the library asks it for
`leaves` and reads arrays with its `reader`, and need not know whether they lie in an item of Orbax,
in several items, or in files. Of several, each is below its name:

    7/params/  7/opt_state/       names ("params", "opt_state")
                                  leaves params/fc/kernel, ..., opt_state/0/mu/fc/kernel, ...
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.item import INDEX, Item, read_item
from linen_nnx.disk.leaves import DICT, Key, Leaf
from linen_nnx.disk.remote import Remote
from linen_nnx.disk.runs import Said
from linen_nnx.disk.steps import SavedStep
from linen_nnx.errors import quoted

SUFFIXES = (".msgpack", ".safetensors")
"""The suffixes of the files that are read and written."""
READABLE = (*SUFFIXES, ".npz")
"""The suffixes of the files that are read."""
INDICES = tuple([f"{suffix}.index.json" for suffix in SUFFIXES])
"""How the names of files end that list the shards of a checkpoint."""


class Reader(Protocol):
    """Reads leaves of a source as numpy arrays, typed PRNG keys as their raw words."""

    def read(self, leaves: Sequence[Leaf]) -> list[Any]: ...


@dataclass(frozen=True)
class Source:
    """One checkpoint on disk. Its content is read when it is asked for."""

    path: Path
    kind: Literal["run", "root", "step", "item", "file"]
    folder: Path
    """The directory of the step that was chosen, or the bare item, or the file. Of several steps
    that make up one state, the folder in which they lie."""
    paths: tuple[Path, ...] = ()
    """The items that make up the training state; others of the step are carried along."""
    names: tuple[str, ...] = ()
    """The names of several items (or files) in the state that they make up."""
    said: Said | None = None
    """The record that the checkpoint has of its own run and form, if it has one."""
    files: Mapping[str, Path] = field(default_factory=dict)
    """The files that make up the state, where it lies in no item."""
    step: SavedStep | None = None
    """The step that was chosen among those of a folder."""
    passed: tuple[str, ...] = ()
    """Notes of saves that were passed over on the way here."""

    @cached_property
    def notes(self) -> list[str]:
        """Notes for a person on how it was found and read."""
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
        # Here and below: numpy and tensorstore are imported where they are needed, as a plain
        # re-key needs neither, and starts in a tenth of a second.
        from linen_nnx.disk.legacy import read_index

        return [read_index(path) for path in old]

    @property
    def is_file(self) -> bool:
        """Whether its leaves lie in files and not in the store of an item."""
        return bool(self.files)

    @property
    def beside(self) -> list[Path]:
        """The other files and folders of the chosen step."""
        # A bare item, a file, and steps of several folders have nothing beside them.
        if self.folder in self.paths or self.is_file or self._is_joined:
            return []
        return [child for child in sorted(self.folder.iterdir()) if child not in self.paths]

    @property
    def step_name(self) -> str:
        """The name of the step in the result, if it is one of several: Orbax finds it so."""
        if self.step is None:
            return ""
        return str(self.step.number) if self._is_joined else self.step.name

    @property
    def _is_joined(self) -> bool:
        """Whether several steps make up the state: `model-100` and `optimizer-100`."""
        return self.step is not None and self.step.path != self.folder

    @cached_property
    def items(self) -> list[Item]:
        """The items; a file has none."""
        items = [_read_item(path, number) for number, path in enumerate(self.paths)]
        # The result is one item, whose store has one format.
        formats = {(item.ocdbt, item.zarr3) for item in items}
        if len(formats) > 1:
            raise StoreError(f"the items of {self.folder} differ in format: choose with --item")
        return items

    @cached_property
    def leaves(self) -> list[Leaf]:
        """All leaves; of several items, below the items' names."""
        parts = self._parts
        # A state in one item has no level with the item's name.
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
        leaves = [item.leaves for item in self.items]
        return dict(zip(self.names, leaves, strict=True))

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

            files: list[Path] = []
            for path in self.files.values():
                files += files_of(path)
            return files
        found = []
        for item in self.items:
            # The manifest of a store names the root of its tree, and so settles all of it.
            for name in ("_METADATA", INDEX, "_sharding", "manifest.ocdbt"):
                found.append(item.path / name)
            if not item.ocdbt:
                found += sorted(item.path.rglob("*"))
        return [path for path in dict.fromkeys(found) if path.is_file()]

    def __str__(self) -> str:
        what = _format(next(iter(self.files.values()))) if self.is_file else self._items_text
        if self.kind == "run":
            return f"run directory, {self.folder.parent.name}/{self.folder.name}, {what}"
        if self.step is None:
            return what
        # A CheckpointManager finds folders, by names that it would give a step itself.
        is_named = self.step.is_counted and self.step.name == self.step.path.name
        is_root = is_named and self.step.path.is_dir()
        where = "CheckpointManager root" if is_root else "folder of steps"
        if self.step.path.parent != self.path:
            where += f" `{self.step.path.parent.name}`"
        chosen = " + ".join(self.names) if self._is_joined else self.step.path.name
        return f"{where}, step {chosen}, {what}"

    @property
    def _items_text(self) -> str:
        """The items in words, and who wrote them where it was not an Orbax of today."""
        text = "Orbax item"
        if self.folder not in self.paths:
            text = "item " + " + ".join(path.name for path in self.paths)
            text = f"step, {text}" if self.kind == "step" else text
        if not self._indices:
            return text
        return f"{text} with an index, as {self._indices[0].writer} writes"


def _format(path: Path) -> str:
    """A file's format in words."""
    for suffix, index in zip(SUFFIXES, INDICES, strict=True):
        if path.name.endswith(index):
            return f"{suffix[1:]} file in shards"
    if path.suffix in READABLE:
        return f"{path.suffix[1:]} file"
    if path.name == INDEX:
        return "Flax checkpoint as Orbax 0.2 to 0.4 aggregates it (msgpack)"
    return "Flax checkpoint file (msgpack)"


def _read_item(path: Path, number: int) -> Item:
    # One request lists all below an item in a bucket, in place of one for each of its files.
    if isinstance(path, Remote):
        path.look_below()
    if (path / "_METADATA").is_file():
        return read_item(path, number)
    from linen_nnx.disk.legacy import read_index_item  # needs numpy

    return read_index_item(path, number)
