"""Takes the metrics of each step while the device works on the next, and writes them where due."""

import math
import resource
from typing import Any

import jax
from jax import Array

from training.runtime.board import Board, scalars_of
from training.runtime.metrics import Metrics
from training.runtime.terminal import Terminal, figures, say


class NonFiniteError(Exception):
    """A metric of a step is NaN or infinite; the message says which, of what, since when."""


class Recorder:
    """Rows for `metrics.jsonl`, scalars for TensorBoard, text for the terminal.

    The metrics of step k are fetched after step k + 1 was dispatched, so that a row costs no wait.
    The metrics of every step are looked at, also of those without a row: the gradient's norm shows
    a step that spoils the parameters before their loss does, and before they are saved.
    """

    def __init__(self, metrics: Metrics, board: Board, terminal: Terminal, every: int) -> None:
        """`every`: steps between two train rows."""
        self._metrics, self._board, self._terminal = metrics, board, terminal
        self._every = every
        self._pending: list[tuple[int, dict[str, Array]]] = []

    def train(self, step: int, values: dict[str, Array]) -> None:
        """Takes the metrics that step `step` will have computed.

        Raises:
            NonFiniteError: for an earlier step.
        """
        self._pending.append((step, values))
        if len(self._pending) < 2:
            return
        before, computed = self._pending[-2]
        loss: Any = computed["loss"]  # whose type has no `is_ready`
        if before % self._every == 0:
            self._write(keep=1)
        # Between two rows nobody waits for the device. But steps that take a minute each would
        # leave a progress bar at rest for log_every minutes, so those that have ended are shown.
        elif loss.is_ready():
            self._terminal.at(before)

    def drain(self) -> None:
        """Waits for all steps so far and writes what is due of them.

        Raises:
            NonFiniteError: for any of them.
        """
        self._write(keep=0)
        self._terminal.pause()

    def eval(self, step: int, values: dict[str, float]) -> bool:
        """Writes the validation metrics after a step; True if their loss is the lowest so far."""
        # Before the row is written, which would be among them.
        best = min(self._metrics.eval_losses, default=math.inf)
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"The validation {name} after step {step} is {value}; in training all was "
                    "finite up to there."
                )
        row = {"step": step, "split": "eval", **values}
        self._metrics.write(row)
        self._board.scalars(step, scalars_of(row))
        say(f"step {step}: validation {figures(values)}")
        return values["loss"] < best

    def _write(self, keep: int) -> None:
        count = len(self._pending) - keep
        ready, self._pending = self._pending[:count], self._pending[count:]
        for (step, _), values in zip(ready, jax.device_get([v for _, v in ready]), strict=True):
            row = {name: float(value) for name, value in values.items()}
            for name in sorted(row, key=lambda name: name != "loss"):  # the loss first
                if not math.isfinite(row[name]):
                    raise NonFiniteError(
                        f"The {name} is {row[name]} at step {step}; all was finite up to step "
                        f"{step - 1}."
                    )
            if step % self._every == 0:
                self._row(step, row)

    def _row(self, step: int, values: dict[str, float]) -> None:
        row = {"step": step, "split": "train", **values}
        self._metrics.write(row)
        scalars = scalars_of(row) | memory()
        seconds = self._terminal.step(step, values["loss"])
        if seconds is not None:
            scalars["train/seconds_per_step"] = seconds
            scalars["train/examples_per_second"] = self._terminal.examples / seconds
        self._board.scalars(step, scalars)


def memory() -> dict[str, float]:
    """What the run holds, in GB: of the first device where that can be told, and of the process."""
    # Its highest so far, which is what decides whether the run fits.
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"memory/process_peak": kilobytes * 1024 / 1e9}
    device = jax.local_devices()[0].memory_stats() or {}  # a CPU has none
    for name, key in (("device", "bytes_in_use"), ("device_peak", "peak_bytes_in_use")):
        if key in device:
            found[f"memory/{name}"] = device[key] / 1e9
    return found
