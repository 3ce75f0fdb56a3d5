"""Folders of checkpoints, on a disk or in a bucket: looked at afresh, removed, doubled.

A bucket has no links and no renames. There the server copies, and the mark that says that a folder
is complete, Orbax's `commit_success.txt`, comes last and goes first: so a kill at any moment leaves
no half of a checkpoint that anybody takes for one.
"""

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec.config
from etils import epath
from linen_nnx.disk.remote import Remote, as_path
from linen_nnx.disk.steps import COMMITTED, unfinished

AT_ONCE = 16  # copies by a bucket's server: most of each is waiting


def fresh(path: Path) -> Path:
    """The same path; of a bucket nothing is remembered that was listed before."""
    return as_path(str(path)) if isinstance(path, Remote) else path


def for_orbax(path: Path) -> str:
    """A path as Orbax takes it, which reads and writes gs:// by libraries of its own."""
    if isinstance(path, Remote):
        # One of them, gcsfs, keeps what it has listed, and would not see what is put from here.
        fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return str(path.absolute())


def complete(folder: Path) -> Iterator[str]:
    """The names of the folders below that were written to their end."""
    folder = fresh(folder)
    if not folder.is_dir():
        return
    for child in folder.iterdir():
        # On a disk one that is not complete has another name.
        if child.is_dir() and not (isinstance(child, Remote) and unfinished(child)):
            yield child.name


def remove(folder: Path) -> None:
    """Removes a folder with all that is in it; one that is not there does no harm."""
    if isinstance(folder, Remote):
        folder.bucket.remove([(folder / COMMITTED).key])
        folder.bucket.remove_below(folder.key)
    elif folder.exists():
        shutil.rmtree(folder)


def try_writing(folder: Path) -> None:
    """Writes to a bucket as Orbax does, and removes it again: whoever may only read it is told
    before the first step, and not when the first checkpoint is due."""
    if isinstance(folder, Remote):
        trial = epath.Path(for_orbax(folder / f".trial-{os.getpid()}"))
        trial.write_text("")
        trial.unlink()


def double(source: Path, target: Path) -> None:
    """The same files under another name: hard links, or copies where there are none."""
    if isinstance(source, Remote):
        _copied_by_server(source, target)
        return
    # Under a name that is no step, until it is complete.
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a run that was killed here
    shutil.copytree(source, part, copy_function=_link)
    part.replace(target)


def _copied_by_server(source: Remote, target: Path) -> None:
    assert isinstance(target, Remote)
    bucket = source.bucket
    keys = [entry["path"] for entry in bucket.list_below(source.key)]
    mark = (source / COMMITTED).key
    pairs = [(key, f"{target.key}{key.removeprefix(source.key)}") for key in keys if key != mark]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(lambda pair: bucket.copy(*pair), pairs))
    bucket.copy(mark, (target / COMMITTED).key)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
