"""An event file of TensorBoard, whose failure is told once and stops nothing.

tensorboardX's own writer hands events through a queue to a thread. When the disk is full the thread
dies, and once the queue is full, too, the training loop waits in it for ever. Here each event is
written where it arises, which takes 0.1 ms, into a buffer that is emptied every ten seconds; from
the first error on nothing more is written.
"""

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from training.runtime.terminal import say

PROTO: Any = event_pb2  # whose classes no type checker finds
FLUSH = 10  # seconds after which a reader may see an event


class Events:
    """One event file, open as long as the run."""

    def __init__(self, run_dir: Path, step: int) -> None:
        """Opens it.

        Args:
            run_dir: where it is created, with the second of the clock and the step in its name.
            step: what the run goes on from: later events of earlier files are hidden.
        """
        self._where = run_dir
        self._writer: Any = None
        self._flushed = time.monotonic()  # the clock of the day may be set back
        try:
            self._writer = EventsWriter(str(run_dir / "events"), f".from-step-{step}")
        except OSError as error:
            self._give_up(error)
        start = PROTO.SessionLog(status=PROTO.SessionLog.START)
        self._write(PROTO.Event(step=step + 1, session_log=start))

    def add(self, summary: Any, step: int | None = None) -> None:
        """Writes a summary, as the functions of `tensorboardX.summary` make it."""
        self._write(PROTO.Event(summary=summary, step=step))

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            try:
                self._writer.close()
            except OSError as error:
                self._give_up(error)

    def _write(self, event: Any) -> None:
        if self._writer is None:
            return
        event.wall_time = time.time()
        now = time.monotonic()
        try:
            self._writer.write_event(event)
            if now - self._flushed > FLUSH:
                self._writer.flush()
                self._flushed = now
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):  # the same again: it tries to write what is left
                writer.close()
        say(
            f"TensorBoard: the event file in {self._where} cannot be written "
            f"({error.strerror or error}). Training goes on without it."
        )
