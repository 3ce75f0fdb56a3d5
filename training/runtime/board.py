"""What a run shows beside its `metrics.jsonl`: to TensorBoard, and to whatever else is asked for.

    recorder, samples ──> Board ──> TensorBoard      training/runtime/tensorboard.py
                                ──> Csv, WandB, ...  training/runtime/trackers.py
                                ──> one of your own  see training/loggers.py

A tracker may fail at any time: a disk fills up, a server is not to be reached. That is said once,
and training goes on without it.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, Protocol

import numpy as np

from training.runtime.metrics import Row
from training.runtime.terminal import say


class Logger(Protocol):
    """One place where numbers, texts and pictures of a run go."""

    is_new: bool
    """Whether it has nothing of this run yet: then it is given the rows that there are."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """`{"group/name": value}`."""
        ...

    def histograms(self, step: int, leaves: Mapping[str, np.ndarray]) -> None:
        """`{nnx path: float32 array}` of parameters."""
        ...

    def text(self, step: int, name: str, value: str) -> None: ...

    def image(self, step: int, name: str, value: np.ndarray) -> None:
        """(height, width, 3) uint8."""
        ...

    def close(self, finished: bool) -> None:
        """`finished`: whether the run has come to its end, and was not only stopped."""
        ...


class Board:
    """All loggers of one process as one; one that raises is left out from there on."""

    def __init__(
        self,
        loggers: Mapping[str, Callable[[], Logger]],
        rows: Callable[[], Iterable[Row]] = list,
    ) -> None:
        """Opens each, and gives the rows so far to those that are new.

        Args:
            loggers: what opens each, by its name in messages.
            rows: reads the rows.

        So a run that was converted, or goes on at another stage, is one curve there as well.
        """
        self._loggers: dict[str, Logger] = {}
        for name, opened in loggers.items():
            self._guarded(name, lambda name=name, opened=opened: self._open(name, opened, rows))

    @property
    def has_loggers(self) -> bool:
        """Whether anything is shown anywhere."""
        return bool(self._loggers)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._each(lambda logger: logger.scalars(step, values))

    def histograms(self, step: int, leaves: Mapping[str, Any]) -> None:
        arrays = {path: np.asarray(leaf, np.float32) for path, leaf in leaves.items()}
        self._each(lambda logger: logger.histograms(step, arrays))

    def norms(self, step: int, leaves: Mapping[str, Any]) -> None:
        """The Euclidean norm of each module's own parameters: `norms/encoder/stem`."""
        squares: dict[str, float] = {}
        for path, leaf in leaves.items():
            module = f"norms/{path.rpartition('/')[0]}"
            values = np.asarray(leaf, np.float64)
            squares[module] = squares.get(module, 0.0) + float(np.sum(np.square(values)))
        self.scalars(step, {module: total**0.5 for module, total in squares.items()})

    def text(self, step: int, name: str, value: str) -> None:
        self._each(lambda logger: logger.text(step, name, value))

    def image(self, step: int, name: str, value: np.ndarray) -> None:
        self._each(lambda logger: logger.image(step, name, value))

    def close(self, *, finished: bool) -> None:
        self._each(lambda logger: logger.close(finished))

    def _open(
        self, name: str, opened: Callable[[], Logger], rows: Callable[[], Iterable[Row]]
    ) -> None:
        logger = self._loggers[name] = opened()
        if logger.is_new:
            for row in rows():
                logger.scalars(row["step"], scalars_of(row))

    def _each(self, act: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            self._guarded(name, lambda logger=logger: act(logger))

    def _guarded(self, name: str, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:
            # Whatever a tracker raises: those of other people have errors of their own.
            reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
            kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
            broken = self._loggers.pop(name, None)
            if broken is not None:
                with suppress(Exception):  # the same again: it tries to write what is left
                    broken.close(False)
            say(f"{name} cannot be written ({kind}{reason}). Training goes on without it.")


def scalars_of(row: Row) -> dict[str, float]:
    """A row of `metrics.jsonl` by the names that trackers show.

    Example:
      >>> scalars_of({"step": 3, "split": "eval", "loss": 0.5})
      {'eval/loss': 0.5}
    """
    values = {name: value for name, value in row.items() if name not in ("step", "split")}
    return {f"{row['split']}/{name}": value for name, value in values.items()}
