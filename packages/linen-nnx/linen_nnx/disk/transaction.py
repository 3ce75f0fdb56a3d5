"""Writes a result beside its place and puts it there in one step: it is absent or complete.

    /data/.nnx.partial/                  made here, and locked for as long as it is written to
    /data/.nnx.partial/made-by-linen-nnx says whose it is
    /data/.nnx.partial/result            the result: a directory, or one file with its suffix
    /data/nnx                            `result` under its own name, when every byte is on disk

A killed process leaves `.nnx.partial` behind, and the next conversion to the same target clears it
away. Nothing else is ever cleared away: no directory without the marker, and nothing that lies
behind a symbolic link, wherever in it.
"""

import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from linen_nnx.errors import Refusal

_MARKER = "made-by-linen-nnx"
_MARK = b"A conversion is being written here, or was and did not end. It is safe to delete.\n"
_RESULT = "result"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TRIES = 10  # at opening a directory that others remove: each try needs another one that ended
_NOREPLACE, _HERE = 1, -100  # RENAME_NOREPLACE, and AT_FDCWD: paths are relative to the process


class TargetError(Refusal):
    """A target that cannot be written: it exists and differs, or there is no room for it."""


@contextmanager
def workspace(out: Path) -> Iterator[Path]:
    """The path to write the result of `out` to; it is gone at the end, whatever happens.

    Raises:
      TargetError: while another conversion writes the same target, or if what has the name of the
        directory is not known to be this library's.
      OSError: naming `out`, if the disk is full.
    """
    folder = out.absolute().parent / f".{out.name}.partial"
    descriptor = _locked(folder, out)
    try:
        _claim(descriptor, folder)
        with _naming(out):
            yield folder / f"{_RESULT}{out.suffix}"
    finally:
        # The directory is removed while it is locked: nobody else can have begun to use it. What
        # has been moved into place is no longer in it.
        with suppress(OSError, TargetError):
            _clear(descriptor)
            os.rmdir(folder)
        os.close(descriptor)


def left_over(out: Path) -> None:
    """Removes what a killed conversion to `out` left beside it, if that is certain."""
    folder = out.absolute().parent / f".{out.name}.partial"
    if os.path.lexists(folder):
        with suppress(TargetError, OSError), workspace(out):
            pass


def publish(result: Path, out: Path) -> None:
    """Gives a result its name, which nobody may have taken. Raises `TargetError` if it is."""
    try:
        _rename(result, out)
    except FileExistsError:
        raise TargetError(f"{out} was made by another process meanwhile") from None


def _locked(folder: Path, out: Path) -> int:
    """A descriptor of the directory, made if need be, that holds the lock of it."""
    for _ in range(_TRIES):
        with suppress(FileExistsError):
            os.mkdir(folder)
        # All that follows goes through this descriptor and never through the path again, which
        # somebody may replace by a link to a folder of their own meanwhile.
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # another conversion has just ended, and removed it
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENOTDIR):
                raise _foreign(folder, "it is no directory, or a symbolic link to one") from None
            raise
        try:
            # The kernel gives the lock up when the process ends, however it ends: there is no lock
            # file that a killed process could leave behind.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Between the opening and the lock its owner may have removed it.
            if _same(descriptor, folder):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise TargetError(f"another conversion is writing {out} now") from None
        os.close(descriptor)
    raise TargetError(f"other conversions are writing {out} now")


def _same(descriptor: int, folder: Path) -> bool:
    """Whether a path still leads to the directory that was opened, and through no link."""
    try:
        there = os.stat(folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


def _claim(descriptor: int, folder: Path) -> None:
    """Empties a directory that is this library's, and marks it."""
    if os.listdir(descriptor) and not _marked(descriptor):
        raise _foreign(folder, f"it holds files, and no {_MARKER}")
    _clear(descriptor)
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    marker = os.open(_MARKER, new, dir_fd=descriptor)
    try:
        os.write(marker, _MARK)
    finally:
        os.close(marker)


def _marked(descriptor: int) -> bool:
    """Whether a directory holds the marker, which nobody else writes."""
    try:
        # Without O_NONBLOCK the opening of a pipe of that name would wait for ever.
        marker = os.open(_MARKER, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=descriptor)
    except OSError:
        return False
    try:
        regular = stat.S_ISREG(os.fstat(marker).st_mode)
        # A process that was killed at once may have left it empty.
        return regular and os.read(marker, len(_MARK) + 1) in (_MARK, b"")
    finally:
        os.close(marker)


def _clear(descriptor: int) -> None:
    """Empties a directory; a symbolic link in it goes, and not what it leads to.

    The marker goes last: a process that is killed meanwhile leaves it with the rest.
    """
    if not _marked(descriptor):
        return
    # `False` sorts before `True`, and the marker alone equals itself.
    for name in sorted(os.listdir(descriptor), key=_MARKER.__eq__):
        found = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
        if stat.S_ISDIR(found.st_mode):
            shutil.rmtree(name, dir_fd=descriptor)
        else:
            os.unlink(name, dir_fd=descriptor)


def _foreign(folder: Path, why: str) -> TargetError:
    """The refusal of a directory that may be somebody else's."""
    return TargetError(
        f"{folder} is in the way, and not known to be the left-over of a conversion ({why}): "
        "move it, or choose another target"
    )


@contextmanager
def _naming(out: Path) -> Iterator[None]:
    """Lets the error of a full disk name the target, and say that nothing of it is left."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        reason = f"{os.strerror(error.errno)}; nothing of the result is left"
        raise OSError(error.errno, reason, str(out)) from error


def _rename(old: Path, new: Path) -> None:
    """Renames; raises `FileExistsError` where `rename` would replace a file or an empty folder."""
    # `os.rename` replaces a file, and an empty directory, without a word. Looking first does not
    # help: two conversions to one target would both find nothing there.
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # no Linux, or an old C library
        return _rename_checked(old, new)
    if not renameat2(_HERE, os.fsencode(old), _HERE, os.fsencode(new), _NOREPLACE):
        return None
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):  # the file system knows no such renaming
        return _rename_checked(old, new)
    raise OSError(number, os.strerror(number), str(new))


def _rename_checked(old: Path, new: Path) -> None:
    """The same where no system call does it: another process may come between the two steps."""
    if os.path.lexists(new):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(new))
    os.rename(old, new)
