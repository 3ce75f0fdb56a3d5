"""A run in TensorBoard: curves, histograms, samples, settings.

tensorboardX's own writer hands events through a queue to a thread. When the disk is full the thread
dies, and once the queue is full, too, the training loop waits in it for ever. Here each event is
written where it arises, which takes 0.1 ms, into a buffer that is emptied every ten seconds.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2

from training.runtime.vouching import flat

PROTO: Any = event_pb2  # whose classes no type checker finds
FLUSH = 10  # seconds after which a reader may see an event
EDGES = 32  # of a histogram's bins: so many equally far apart, and as many with equal counts

# Keys that the HPARAMS tab leaves out: no result depends on them.
ASIDE = ("checkpoint.", "compile_cache", "debug.", "distributed.", "log.", "run_dir")

# The tab CUSTOM SCALARS: what one wants to see in one chart, which TensorBoard draws as two.
LAYOUT = {
    "loss": {"train and validation": ["Multiline", ["train/loss$", "eval/loss$"]]},
    "speed": {
        "examples a second": ["Multiline", ["train/examples_per_second"]],
        "memory, GB": ["Multiline", ["memory/"]],
    },
}


class TensorBoard:
    """The event file of one process; see `training.runtime.board.Logger`."""

    def __init__(self, run_dir: Path, step: int, config: Mapping[str, Any]) -> None:
        """Opens a file of its own, which hides the events after `step` that earlier ones hold.

        Args:
            run_dir: where it is created, with the second of the clock and the step in its name.
            step: what the run goes on from.
            config: its configuration, for the tabs TEXT and HPARAMS.
        """
        self.is_new = not any(run_dir.glob("events.*"))
        self._writer: Any = EventsWriter(str(run_dir / "events"), f".from-step-{step}")
        self._flushed = time.monotonic()  # the clock of the day may be set back
        start = PROTO.SessionLog(status=PROTO.SessionLog.START)
        self._write(PROTO.Event(step=step + 1, session_log=start))
        self._add(summary.custom_scalars(LAYOUT))
        self._add(summary.text("config", f"```yaml\n{yaml.safe_dump(dict(config))}\n```"), step)
        kept = {key: value for key, value in flat(config).items() if not key.startswith(ASIDE)}
        plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in kept.items()}
        # Without a summary of the whole experiment, which one run cannot know, TensorBoard makes it
        # of all runs: their last metrics, and first of all the settings in which they differ.
        # The row is there from the start, so that a run that was killed has one, too.
        _, started, self._ended = summary.hparams(plain, {})
        self._add(started)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._add(summary.scalar(name, value), step)

    def histograms(self, step: int, leaves: Mapping[str, np.ndarray]) -> None:
        for path, leaf in leaves.items():
            self._add(summary.histogram(f"params/{path}", leaf, edges(leaf)), step)

    def text(self, step: int, name: str, value: str) -> None:
        self._add(summary.text(name, f"```\n{value}\n```"), step)

    def image(self, step: int, name: str, value: np.ndarray) -> None:
        self._add(summary.image(name, value, dataformats="HWC"), step)

    def close(self, finished: bool) -> None:
        if finished:
            self._add(self._ended)
        self._writer.close()

    def _add(self, made: Any, step: int | None = None) -> None:
        """Writes a summary, as the functions of `tensorboardX.summary` make it."""
        self._write(PROTO.Event(summary=made, step=step))

    def _write(self, event: Any) -> None:
        event.wall_time = time.time()
        now = time.monotonic()
        self._writer.write_event(event)
        if now - self._flushed > FLUSH:
            self._writer.flush()
            self._flushed = now


def edges(values: np.ndarray) -> np.ndarray:
    """Bins that fit the values, wherever they lie.

    Bins of one width show nothing of the middle where one value lies far out: of 1,000 weights
    about 0 and one of 100, all but one fall into the first bin. Bins of equal counts show nothing
    of the gap between them. So half of the edges are of either kind.

    Example:
      >>> far = np.array([*np.linspace(-1, 1, 999), 100.0])
      >>> int((edges(far) < 1).sum()) > 30
      True
    """
    low, high = float(values.min()), float(values.max())
    if low == high:
        return np.array([low, np.nextafter(low, np.inf)])
    regular = np.linspace(low, high, EDGES)
    return np.unique([*regular, *np.quantile(values.astype(np.float64), np.linspace(0, 1, EDGES))])
