"""TensorBoard: everything that a run shows beside its `metrics.jsonl`."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

_ASIDE = ("checkpoint.", "compile_cache", "debug.", "distributed.", "log.", "run_dir")
"""Keys that the HPARAMS tab leaves out: no result depends on them."""


class Board:
    """The event file of one process; every call does nothing when TensorBoard is off."""

    def __init__(self, run_dir: Path, step: int, config: dict[str, Any], *, on: bool) -> None:
        """Opens a file of its own, which hides the events after `step` that earlier ones hold."""
        self._writer: SummaryWriter | None = None
        if not on:
            return
        self._writer = SummaryWriter(
            str(run_dir),
            purge_step=step + 1,
            filename_suffix=f".from-step-{step}",
            flush_secs=10,
        )
        self._writer.add_text("config", f"```yaml\n{yaml.safe_dump(config)}\n```", step)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """`{"group/name": value}`."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def histograms(self, step: int, leaves: dict[str, Any]) -> None:
        """`{nnx path: array}` of parameters."""
        if self._writer is not None:
            for path, leaf in leaves.items():
                self._writer.add_histogram(f"params/{path}", np.asarray(leaf, np.float32), step)

    def text(self, step: int, name: str, value: str) -> None:
        if self._writer is not None:
            self._writer.add_text(name, f"```\n{value}\n```", step)

    def image(self, step: int, name: str, value: np.ndarray) -> None:
        """(height, width, 3) uint8."""
        if self._writer is not None:
            self._writer.add_image(name, value, step, dataformats="HWC")

    def results(self, config: dict[str, Any], metrics: dict[str, float]) -> None:
        """The run's row in the HPARAMS tab; `config` is flat, `{"optimizer.lr": 0.001, ...}`."""
        if self._writer is None:
            return
        kept = {k: v for k, v in config.items() if not k.startswith(_ASIDE)}
        flat = {k: v if isinstance(v, bool | int | float) else str(v) for k, v in kept.items()}
        for summary in hparams(flat, dict.fromkeys(metrics, 0.0)):
            self._writer.file_writer.add_summary(summary)  # pyrefly: ignore
        for name, value in metrics.items():
            self._writer.add_scalar(name, value)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
