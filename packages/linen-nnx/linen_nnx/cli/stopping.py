"""Ctrl-C and SIGTERM: a command ends with one line, at any moment, and leaves nothing half-written.

A signal raises `KeyboardInterrupt` wherever the program happens to be, so that what has been begun
is cleared away on the way out, such as the folder of a conversion (`disk.transaction`). Three
moments need more than that:

    while it is being cleared away   a second Ctrl-C must not end the clearing: it does nothing
    in a callback of Python's own    the exception is printed there and lost: it is raised once more
                                     (jax has such a callback at each collection of garbage)
    when all is done                 the signal ends the process, as it would any other

This module imports little, so that a program can listen before it imports anything that takes time.
"""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

WORDS: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_MOMENT = 0.05  # seconds until an exception that was lost in a callback is raised once more


class Stopped(KeyboardInterrupt):
    """A signal has told the program to stop; `number` says which."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def listen() -> None:
    """From now on SIGINT and SIGTERM raise `Stopped` in the main thread."""
    for number in WORDS:
        signal.signal(number, _raise)
    sys.unraisablehook = _unraisable


def ignore() -> None:
    """From now on signals do nothing: the program ends anyway, and is saying so."""
    if signal.getsignal(signal.SIGINT) is _raise:
        for number in WORDS:
            signal.signal(number, signal.SIG_IGN)


def leave() -> None:
    """From now on signals end the process at once, without a word: all is done."""
    for number in WORDS:
        if signal.getsignal(number) is _raise:
            signal.signal(number, signal.SIG_DFL)


def end(code: int) -> NoReturn:
    """Ends the process at once. All is cleared away; a thread may be compiling for minutes yet."""
    with suppress(OSError):  # nobody reads any more
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


@contextmanager
def whole_file(path: str) -> Iterator[Path]:
    """Where to write a file that gets the name `path` at the end: it is complete or absent.

    Example:
      >>> import os, tempfile
      >>> folder = tempfile.mkdtemp()
      >>> with whole_file(f"{folder}/a.png") as part:
      ...     _ = part.write_text("picture")
      ...     print(os.listdir(folder))
      ['.a.partial.png']
      >>> os.listdir(folder)
      ['a.png']
    """
    whole = Path(path)
    # With the same suffix, which tells matplotlib the format.
    part = whole.with_name(f".{whole.stem}.partial{whole.suffix}")
    try:
        yield part
        os.replace(part, whole)
    finally:
        part.unlink(missing_ok=True)


def without_reader() -> int:
    """The exit code where nobody reads what is printed any more, as in `inspect X | head`."""
    # What is left goes nowhere; else Python would complain once more when it flushes that.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 128 + signal.SIGPIPE


def signal_behind(error: BaseException | None) -> int | None:
    """The signal that an exception comes from, itself or by what it was raised from; else None.

    Example:
      >>> signal_behind(KeyboardInterrupt()) == signal.SIGINT
      True
      >>> signal_behind(ValueError()) is None
      True
    """
    seen = set[int]()
    while error is not None and id(error) not in seen:
        if isinstance(error, Stopped):
            return error.number
        if isinstance(error, KeyboardInterrupt):
            return signal.SIGINT
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _raise(number: int, frame: FrameType | None) -> None:
    # While an exception is on its way out, each `finally` and `with` on the way handles it.
    if signal_behind(sys.exception()) is None:
        raise Stopped(number)


def _unraisable(lost: Any) -> None:
    number = signal_behind(lost.exc_value)
    if number is None:
        sys.__unraisablehook__(lost)
        return
    # By a timer, as this hook is another place that an exception does not leave.
    signal.signal(signal.SIGALRM, lambda _, frame: _raise(number, frame))
    signal.setitimer(signal.ITIMER_REAL, _MOMENT)
