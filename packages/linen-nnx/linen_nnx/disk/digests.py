"""Digests of a checkpoint's files: a flipped bit restores as a wrong value, and Orbax is silent.

`digests.json` lies beside the files it covers and lists every file below that directory with its
size and xxh3 hash (15 GB/s: reading is what takes time). The data files of a checkpoint never
change, so that their digests stay valid wherever the files are copied or linked to.

    >>> import tempfile
    >>> temporary = tempfile.TemporaryDirectory()
    >>> folder = Path(temporary.name)
    >>> _ = (folder / "data").write_bytes(b"weights")
    >>> write(folder)
    >>> check(folder)
    True
    >>> _ = (folder / "data").write_bytes(b"weighty")
    >>> check(folder)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    linen_nnx.disk.digests.DigestError: ... is damaged: data was altered
    >>> temporary.cleanup()
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import xxhash

from linen_nnx.book.reading import open_file, read_json
from linen_nnx.disk import checked
from linen_nnx.disk.remote import Remote, as_path
from linen_nnx.errors import Refusal

NAME = "digests.json"
_ALGORITHM = "xxh3_128"
_LARGEST = 1 << 62  # bytes of a file: what file systems can count to
_AT_ONCE = 4  # files of a bucket, of each of which some megabytes are in memory
_BLOCK = 1 << 20  # fits the processor's cache, which makes hashing faster than larger blocks

_T = TypeVar("_T")

Digest = tuple[int, str]
"""Size in bytes and hash of a file."""

Digests = dict[str, Digest]
"""By the file's path relative to the directory."""


class DigestError(Refusal):
    """Files that differ from their digests; the message names every one of them."""


def hash_file(path: Path) -> Digest:
    """Size and hash of one file. Raises `DigestError` for a pipe or a device."""
    state, size = xxhash.xxh3_128(), 0
    if isinstance(path, Remote):
        for part in path.blocks():
            state.update(part)
            size += len(part)
        return size, state.hexdigest()
    # One block is filled again and again, so that no read allocates memory.
    block = bytearray(_BLOCK)
    view = memoryview(block)
    try:
        opened = open_file(path)
    except ValueError as error:
        raise DigestError(f"{path} cannot be hashed: {error}") from None
    with opened as file:
        while count := file.readinto(block):
            state.update(view[:count])
            size += count
    return size, state.hexdigest()


def write(directory: str | Path, known: Mapping[str, Digest] = MappingProxyType({})) -> None:
    """Writes the digest file of a finished checkpoint directory, atomically.

    Args:
      directory: holds the files, on a disk or in a bucket.
      known: digests that need not be computed, by the file's path in the directory.

    Raises:
      StoreError, OSError: where the files cannot be read, or the digests not written.
    """
    directory = as_path(str(directory))  # a bucket is looked at afresh
    # What the server of a bucket copied lies there and not in the directory that is hashed here.
    names = sorted({*_files(directory), *known})
    unknown = [name for name in names if name not in known]
    hashed = _each(directory, lambda name: hash_file(directory / name), unknown)
    found = {**known, **dict(zip(unknown, hashed, strict=True))}
    files = {name: found[name] for name in names}
    content = {"version": 1, "algorithm": _ALGORITHM, "files": files}
    if isinstance(directory, Remote):
        target = directory / NAME
        target.bucket.create(target.key, json.dumps(content, indent=0).encode())
        return
    partial = directory / f".{NAME}.partial"
    partial.unlink(missing_ok=True)  # of a killed process, or a link, which is not written through
    with partial.open("x") as file:
        json.dump(content, file, indent=0)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(directory / NAME)


def read(directory: str | Path) -> Digests | None:
    """The digests that cover a directory, if there are any: its own, or its parent's.

    A parent's are those of a step, where the directory is one of its items.
    """
    directory = as_path(directory).absolute()
    for base in (directory, directory.parent):
        try:
            files = _parsed(read_json(base / NAME))
        except FileNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise DigestError(f"{base / NAME} is damaged: {checked.reason(error)}") from None
        prefix = "" if base == directory else f"{directory.name}/"
        found = {n.removeprefix(prefix): d for n, d in files.items() if n.startswith(prefix)}
        if found:
            return found
    return None


def _parsed(content: Any) -> Digests:
    """The digests in the content of a digest file."""
    algorithm = checked.field(content, "algorithm")
    if algorithm != _ALGORITHM:
        raise ValueError(f"unknown algorithm {checked.shown(algorithm)}, known is {_ALGORITHM}")
    files = {}
    for name, digest in checked.mapping(checked.field(content, "files")).items():
        if len(checked.sequence(digest)) != 2:
            raise ValueError(f"{checked.shown(name)} has {len(digest)} values, not size and hash")
        size, text = digest
        files[checked.text(name)] = checked.integer(size, 0, _LARGEST), checked.text(text)
    return files


def check(directory: str | Path) -> bool:
    """Compares every file of a checkpoint directory with its digests; False if it has none.

    Raises:
      DigestError: naming every file that is missing, foreign, truncated or altered.
    """
    directory = as_path(directory)
    digests = read(directory)
    if digests is None:
        return False
    present = set(_files(directory))
    problems = [f"{name} is missing" for name in digests if name not in present]
    problems += [f"{name} is foreign" for name in sorted(present - set(digests))]
    both = sorted(present & set(digests))
    found = _each(directory, lambda name: _altered(directory / name, digests[name]), both)
    for name, problem in zip(both, found, strict=True):
        if problem is not None:
            problems.append(f"{name} {problem}")
    if problems:
        raise DigestError(f"{directory} is damaged: {'; '.join(problems)}")
    return True


def _each(directory: Path, act: Callable[[str], _T], names: Sequence[str]) -> list[_T]:
    """What `act` returns for each name; in a bucket several are asked for at once."""
    if not isinstance(directory, Remote):
        return [act(name) for name in names]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(act, names))


def _altered(path: Path, digest: Digest) -> str | None:
    """What is wrong with a file, if anything."""
    size, text = digest
    # The size is asked first: a file that was cut off is known without a byte of it read, and a
    # pipe in its place, of size 0, is never opened.
    found = path.stat().st_size
    if found != size:
        return f"has {found} bytes, expected {size}"
    if not path.is_file():
        return "is no regular file"
    if hash_file(path)[1] != text:
        return "was altered"
    return None


def _files(directory: Path) -> list[str]:
    """Every file below a directory but its digest file, as sorted relative paths."""
    if isinstance(directory, Remote):
        below = (path for path in directory.rglob("*") if path.is_file())
        return sorted({str(path.relative_to(directory)) for path in below} - {NAME})
    ours = (NAME, f".{NAME}.partial")
    found = []
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.relpath(os.path.join(folder, name), directory)
            if path not in ours:
                found.append(path)
    return sorted(found)
