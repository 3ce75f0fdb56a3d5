"""Ctrl-C and SIGTERM: a run that is told to stop ends with one line and exit code 130 or 143.

What a signal does depends on the moment:

    starting up, compiling, evaluating a checkpoint    ends the process, for nothing is to be saved
    training                                           ends the run after the step at hand, saved
    training, and a second signal                      ends the process

The process is ended on the spot, by `os._exit`. An exception would come up wherever the program
happens to be, in a callback of jax's or in a thread's lock, and be logged from there. Nothing is
lost by it: a run may be killed at any moment, and goes on from its last checkpoint.

This module imports little, so that `train.py` can ask for it before anything that takes time.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from types import FrameType
from typing import NoReturn

SHOW_CURSOR = b"\x1b[?25h"  # which the progress bar has hidden

Handler = Callable[[int, FrameType | None], None]

GOES_ON = " The same command goes on from the last checkpoint, or begins anew."


def exit_code(number: int) -> int:
    """What a shell calls the end by a signal.

    Example:
      >>> import signal
      >>> exit_code(signal.SIGINT), exit_code(signal.SIGTERM)
      (130, 143)
    """
    return 128 + number


def end_on_signals(words: str = GOES_ON) -> None:
    """From now on either signal ends the process at once, with a message; for entry scripts.

    Args:
      words: what the message says beside that.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(_end, words=words))


@contextmanager
def counted() -> Iterator[list[int]]:
    """Within the block the first signal is only noted, in the list given; a second one ends the
    process."""
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        if received:
            _end(number, frame)
        received.append(number)
        _write(f"{signal.Signals(number).name}: saving after this step.")

    with handled(dict.fromkeys((signal.SIGINT, signal.SIGTERM), receive)):
        yield received


@contextmanager
def handled(handlers: dict[signal.Signals, Handler]) -> Iterator[None]:
    """Within the block these functions are called for these signals."""
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None, *, words: str = GOES_ON) -> NoReturn:
    with suppress(Exception):  # the signal may have come while just this was being written
        sys.stdout.flush()
    if os.isatty(1):
        os.write(1, SHOW_CURSOR)
    name = signal.Signals(number).name
    _write(f"{name}: ended at once.{words}")
    os._exit(exit_code(number))


def _write(line: str) -> None:
    """Not by `print`, which must not be entered again while it is being run."""
    os.write(2, f"{line}\n".encode())
