"""A disk that takes no more ends a run with one message, which names the last good checkpoint."""

import errno
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from linen_nnx.disk.remote import Remote
from linen_nnx.errors import Refusal

from training.runtime import checkpoints, processes
from training.runtime.errors import Refused

# tensorstore raises a ValueError, in whose text the system's own error stands.
SYSTEM = re.compile(r"os_error_code='(\d+)'")
ROOM = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def needed(run_dir: Path, home: Path) -> Iterator[None]:
    """Within the block an error of the system, whoever meets it, is refused in the run's words.

    A bug keeps its traceback.
    """
    # Before anything fails, for the echoes come from threads of their own.
    speak = _hush_echoes(_is_any if isinstance(home, Remote) else _is_of_system)
    try:
        yield
    except Refusal:  # it may come from such an error, and has words of its own
        if not isinstance(home, Remote):  # whose libraries try on in their threads
            speak()
        raise
    except Exception as error:
        if (number := system_error(error)) is None:
            speak()
            raise
        # Echoes may still come, while the process ends.
        refused = Refused(_words(run_dir, home, error, number))
        # The others would wait in the next step for a process that has ended in good order.
        processes.abandon(refused)
        raise refused from None
    speak()


def system_error(error: BaseException | None) -> int | None:
    """The number of the system's error that an exception stands for or comes from, if any."""
    # Libraries wrap the system's error in errors of their own. One that is raised once more, while
    # what was made of it is dealt with, comes from itself.
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno
        if isinstance(error, ValueError) and (match := SYSTEM.search(str(error))):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None


def _words(run_dir: Path, home: Path, error: Exception, number: int) -> str:
    file = getattr(error, "filename", None)
    where = f" ({file})" if file else ""
    try:
        steps = checkpoints.steps_of(home / "checkpoints")
    except Refusal as refusal:  # a bucket, which cannot be reached either
        return f"{run_dir} cannot be written: {os.strerror(number)}{where}. {refusal}"
    last = f"{home / 'checkpoints' / str(steps[-1])}" if steps else None
    remedy = "Make room" if number in ROOM else "Put that right"
    return (
        f"{run_dir} cannot be written: {os.strerror(number)}{where}. "
        + (f"The last good checkpoint is {last}. " if last else "No checkpoint was saved yet. ")
        + f"{remedy}; then the same command goes on from "
        + ("there." if last else "the beginning.")
    )


def _hush_echoes(is_echo: Callable[[logging.LogRecord], bool]) -> Callable[[], None]:
    """Of a save that fails Orbax tells who waits for it. Its threads, asyncio's tasks and
    tensorstore's callbacks print the same again, a traceback for each array: these are left out.

    Returns:
        What undoes this.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio", "gcsfs")]
    before, unraisable = sys.excepthook, sys.unraisablehook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if str(error) != "Event loop is closed":  # to which a callback comes too late
            before(kind, error, trace)

    def ignored(unraised: Any) -> None:
        if str(unraised.exc_value) != "Event loop is closed":
            unraisable(unraised)

    def is_news(record: logging.LogRecord) -> bool:
        return not is_echo(record)

    def speak() -> None:
        sys.excepthook, sys.unraisablehook = before, unraisable
        for logger in loggers:
            logger.removeFilter(is_news)

    sys.excepthook, sys.unraisablehook = hook, ignored
    for logger in loggers:
        logger.addFilter(is_news)
    return speak


def _is_of_system(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    return system_error(error) is not None or SYSTEM.search(record.getMessage()) is not None


def _is_any(record: logging.LogRecord) -> bool:
    """For buckets, whose libraries raise errors of many kinds: `checkpoints` refuses them all."""
    return record.levelno >= logging.ERROR
