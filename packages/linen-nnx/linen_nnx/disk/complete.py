"""Whether a source holds every byte that it says it holds, asked before anything is written.

A copy that was cut off has all of its names and not all of its bytes. No digest is needed to see
it: the tree of an OCDBT store has the file, the offset and the length of every value, metadata say
which chunks an array has, and a chunk's own encoding how long it is. An array whose chunks are lost
would otherwise be read as zeros.
"""

import math
import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from linen_nnx.book.reading import ObjectPath
from linen_nnx.disk.checked import StoreError, data_size, open_data, reason
from linen_nnx.disk.chunk_lengths import check_length, check_size, check_swelling
from linen_nnx.disk.chunks import Grid
from linen_nnx.disk.item import Item
from linen_nnx.disk.leaves import Leaf
from linen_nnx.disk.ocdbt import Ref
from linen_nnx.disk.zarr_metadata import metadata_name

_PROBLEMS = 10  # that a message shows


def files_below(folder: Path) -> list[Path]:
    """Every regular file below a folder, also behind symbolic links, in the order of their paths.

    Raises `StoreError` for a pipe, a device, a link to nothing, or one that leads in a circle.
    """
    # A bucket has neither links nor devices.
    if isinstance(folder, ObjectPath):
        return sorted([path for path in folder.rglob("*") if path.is_file()])
    return sorted(_walk(folder, ()))


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    here = os.path.realpath(folder)
    # Two links to one folder side by side are no circle: only the folders above count.
    if here in above:
        raise StoreError(f"{folder} is a symbolic link to a folder above it")
    for child in folder.iterdir():
        if child.is_dir():
            yield from _walk(child, (*above, here))
        elif child.is_file():
            yield child
        else:
            raise StoreError(f"{child} is neither a file nor a folder, nor a link to one")


def check_complete(items: Sequence[Item]) -> list[str]:
    """Compares what lies on disk with what the trees and metadata of a state's items say.

    Returns:
      Notes of what is no fault and yet worth knowing.

    Raises:
      StoreError: that names what is missing, too short, or no file.
    """
    problems: list[str] = []
    left_out = 0
    for item in items:
        problems += _short_files(item)
        for leaf in item.leaves:
            if leaf.zarr is None or leaf.loose:
                continue
            found = _chunk_names(item, leaf)
            missing = _missing(leaf, found)
            if missing and _may_lack(item, leaf):
                left_out += 1
            elif missing:
                problems.append(f"{item.path}: the array `{leaf.path}` has no chunk {missing}")
            problems += _wrong_chunks(item, leaf, found)
    if problems:
        shown = "; ".join(problems[:_PROBLEMS])
        more = len(problems) - _PROBLEMS
        rest = f"; and {more} more" if more > 0 else ""
        raise StoreError(f"the checkpoint is not complete, copy it again: {shown}{rest}")
    if left_out:
        return [f"{left_out} arrays have chunks that are not stored, as they hold the fill value"]
    return []


def _short_files(item: Item) -> list[str]:
    """The faults of the data files of an OCDBT store."""
    # The end of the last value in each file. Between values there may be bytes of old versions.
    ends: dict[str, int] = {}
    for values in (item.tree or {}).values():
        for value in values.values():
            if isinstance(value, Ref):
                ends[value.file] = max(ends.get(value.file, 0), value.offset + value.length)
    problems = []
    for name, end in sorted(ends.items()):
        try:
            size = data_size(item.path / name)
        except (OSError, StoreError) as error:
            problems.append(f"{item.path / name}: {reason(error)}")
            continue
        if size < end:
            problems.append(f"{item.path / name} has {size} bytes, and its tree names byte {end}")
    return problems


def _chunk_names(item: Item, leaf: Leaf) -> Collection[str]:
    """The names of an array's chunks, as they are stored."""
    if item.tree is not None:
        return item.tree.get(leaf.stored, {}).keys() - {metadata_name(item.zarr3)}
    folder = item.path / leaf.stored
    return {str(file.relative_to(folder)) for file in files_below(folder)}


def _missing(leaf: Leaf, found: Collection[str]) -> str:
    """The name of the first chunk that an array should have and has not, or nothing.

    The names are made one by one and the first gap ends the search: a damaged shape may ask for
    more chunks than memory holds.
    """
    assert leaf.zarr is not None
    grid = Grid(leaf.zarr, {})
    for place in grid.places():
        if grid.key(place) not in found:
            return grid.key(place)
    return ""


def _may_lack(item: Item, leaf: Leaf) -> bool:
    """Whether a chunk may have been left out because each of its values is the fill value.

    Orbax stores them all since it says so in `_METADATA`; before, tensorstore left them out of an
    array that had a fill value at all.
    """
    assert leaf.zarr is not None
    stored = item.header.get("store_array_data_equal_to_fill_value")
    return not stored and leaf.zarr.get("fill_value") is not None


def _wrong_chunks(item: Item, leaf: Leaf, found: Collection[str]) -> list[str]:
    """The faults in the lengths of an array's chunks."""
    assert leaf.zarr is not None
    nbytes = math.prod(Grid(leaf.zarr, {}).chunk_shape) * leaf.itemsize
    problems = []
    for name in sorted(found):
        # A folder also holds the metadata, and hidden files that a file system leaves behind.
        if name.rpartition("/")[2].startswith(".") or name == metadata_name(item.zarr3):
            continue
        try:
            if item.tree is not None:
                # `_short_files` has compared the place and length that the tree gives.
                value = item.tree[leaf.stored][name]
                check_swelling(value.length if isinstance(value, Ref) else len(value), nbytes)
            else:
                _check_file(item.path / leaf.stored / name, leaf.zarr, nbytes)
        except (OSError, ValueError) as error:
            problems.append(f"{item.path / leaf.stored / name}: {reason(error)}")
    return problems


def _check_file(path: Path, metadata: dict[str, Any], nbytes: int) -> None:
    """Compares the length of a chunk's file with what its encoding says."""
    if isinstance(path, ObjectPath):
        # Following the blocks of zstd would be a request for each 128 KiB of every chunk.
        check_size(data_size(path), metadata, nbytes)
        return
    with open_data(path) as file:
        check_length(file, metadata, nbytes)
