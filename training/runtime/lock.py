"""One process at a time in a run directory: held before anything in it is read.

The lock is the operating system's, on the directory itself (`flock`). It ends with the process,
however that ends, and there is no file that a kill could leave behind.
"""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from linen_nnx.disk.remote import Remote

from training.runtime import processes
from training.runtime.errors import Refused
from training.runtime.terminal import say

# What file systems without locks answer, some network ones among them.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def held(run_dir: Path) -> Iterator[None]:
    """Holds the run directory for this run, and creates it where it is missing.

    Of several processes that compute one run together the first one holds it. A directory that is
    still empty at the end, since the run was refused, and that was created here is removed.

    Raises:
        Refused: when it cannot be created, or another process holds it.
    """
    made = [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    descriptor: int | None = None
    with processes.together():
        if processes.first():
            descriptor = _acquire(run_dir)
    try:
        yield
    finally:
        if descriptor is not None:
            _remove_empty(made)  # while it is held, so that nobody else begins in it
            os.close(descriptor)


@contextmanager
def held_beside(home: Path, run_dir: Path) -> Iterator[None]:
    """Holds the home of a run as well, where that is another folder of a disk.

    A bucket has no locks. There the second of two runs is told when it saves: no step is replaced.

    Raises:
        Refused: as `held` does.
    """
    if isinstance(home, Remote) or home.absolute() == run_dir.absolute():
        yield
        return
    with held(home):
        yield


def _acquire(run_dir: Path) -> int:
    """A descriptor that holds the directory until it is closed."""
    while True:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            # The directory itself: a lock file could be left behind, and be deleted by whoever
            # tidies up.
            descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # another run, refused, has just removed what it had made
            continue
        except OSError as error:
            raise Refused(f"The folder {run_dir} cannot be created: {error.strerror}.") from None
        try:
            # Without waiting: two runs of one command are a mistake, and the second would begin
            # hours later.
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise Refused(
                f"Another process is training in {run_dir}. Wait for it, or choose another folder."
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            say(f"The file system of {run_dir} has no locks: see that no other run writes there.")
        if _is_still(descriptor, run_dir):
            return descriptor
        os.close(descriptor)


def _is_still(descriptor: int, run_dir: Path) -> bool:
    """Whether the path still leads to the directory that is held, which may have been removed
    between its opening and its locking."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(run_dir))
    except FileNotFoundError:
        return False


def _remove_empty(directories: list[Path]) -> None:
    """Removes these, the innermost first, up to one that holds something."""
    for path in directories:
        try:
            path.rmdir()
        except OSError:
            return
