"""TensorBoard: everything that a run shows beside its `metrics.jsonl`."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from flax.traverse_util import flatten_dict
from tensorboardX import summary

from training.runtime.events import Events

BINS = 64  # of a histogram, equally wide: tensorboardX's own turn a narrow distribution into blocks

_ASIDE = ("checkpoint.", "compile_cache", "debug.", "distributed.", "log.", "run_dir")
"""Keys that the HPARAMS tab leaves out: no result depends on them."""


class Board:
    """The event file of one process, or none."""

    def __init__(self, run_dir: Path, step: int, config: dict[str, Any], *, on: bool) -> None:
        """Opens a file of its own, which hides the events after `step` that earlier ones hold."""
        self._events = Events(run_dir, step) if on else None
        self._config = config
        self._add(summary.text("config", f"```yaml\n{yaml.safe_dump(config)}\n```"), step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """`{"group/name": value}`."""
        for name, value in values.items():
            self._add(summary.scalar(name, value), step)

    def histograms(self, step: int, leaves: dict[str, Any]) -> None:
        """`{nnx path: array}` of parameters."""
        for path, leaf in leaves.items():
            values = np.asarray(leaf, np.float32)
            self._add(summary.histogram(f"params/{path}", values, BINS), step)

    def text(self, step: int, name: str, value: str) -> None:
        self._add(summary.text(name, f"```\n{value}\n```"), step)

    def image(self, step: int, name: str, value: np.ndarray) -> None:
        """(height, width, 3) uint8."""
        self._add(summary.image(name, value, dataformats="HWC"), step)

    def finished(self) -> None:
        """Gives the run its row in the HPARAMS tab."""
        flat = flatten_dict(self._config, sep=".")
        kept = {key: value for key, value in flat.items() if not key.startswith(_ASIDE)}
        plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in kept.items()}
        # Without a summary of the whole experiment, which one run cannot know, TensorBoard makes it
        # of all runs: their last metrics, and first of all the settings in which they differ.
        _, *session = summary.hparams(plain, {})
        for part in session:
            self._add(part)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()

    def _add(self, made: Any, step: int | None = None) -> None:
        if self._events is not None:
            self._events.add(made, step)
