"""TensorBoard: everything that a run shows beside its `metrics.jsonl`."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from flax.traverse_util import flatten_dict
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

_ASIDE = ("checkpoint.", "compile_cache", "debug.", "distributed.", "log.", "run_dir")
"""Keys that the HPARAMS tab leaves out: no result depends on them."""


class Board:
    """The event file of one process, or none."""

    def __init__(self, run_dir: Path, step: int, config: dict[str, Any], *, on: bool) -> None:
        """Opens a file of its own, which hides the events after `step` that earlier ones hold."""
        self._writer = SummaryWriter(
            str(run_dir),
            purge_step=step + 1,
            filename_suffix=f".from-step-{step}",
            flush_secs=10,
            write_to_disk=on,
        )
        self._config = config
        self._writer.add_text("config", f"```yaml\n{yaml.safe_dump(config)}\n```", step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """`{"group/name": value}`."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def histograms(self, step: int, leaves: dict[str, Any]) -> None:
        """`{nnx path: array}` of parameters."""
        for path, leaf in leaves.items():
            self._writer.add_histogram(f"params/{path}", np.asarray(leaf, np.float32), step)

    def text(self, step: int, name: str, value: str) -> None:
        self._writer.add_text(name, f"```\n{value}\n```", step)

    def image(self, step: int, name: str, value: np.ndarray) -> None:
        """(height, width, 3) uint8."""
        self._writer.add_image(name, value, step, dataformats="HWC")

    def finished(self) -> None:
        """Gives the run its row in the HPARAMS tab."""
        flat = flatten_dict(self._config, sep=".")
        kept = {key: value for key, value in flat.items() if not key.startswith(_ASIDE)}
        plain = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in kept.items()}
        # Without a summary of the whole experiment, which one run cannot know, TensorBoard makes it
        # of all runs: their last metrics, and first of all the settings in which they differ.
        _, *session = hparams(plain, {})
        for summary in session:
            self._writer.file_writer.add_summary(summary)  # pyrefly: ignore

    def close(self) -> None:
        self._writer.close()
