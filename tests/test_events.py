"""An event file that can no longer be written is told once, and never stops or hangs a run."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Train
from tensorboardX.event_file_writer import EventsWriter

from training.runtime import tensorboard
from training.runtime.board import Board
from training.runtime.tensorboard import TensorBoard

WORDS = "cannot be written (No space left on device). Training goes on without it."


def opened(run_dir: Path) -> Board:
    return Board({"events": lambda: TensorBoard(run_dir, 0, {})})


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("moment", ["opening", "writing", "flushing", "closing"])
def test_a_full_disk_is_said_once(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tensorboard, "FLUSH", -1)
    broken = {"writing": "write_event", "flushing": "flush", "closing": "close"}
    board = None if moment == "opening" else opened(tmp_path)
    monkeypatch.setattr(EventsWriter, broken.get(moment, "__init__"), full)

    board = board or opened(tmp_path)
    for step in range(100):  # ten more than tensorboardX's queue has room for
        board.scalars(step, {"loss": 1.0})
    board.close(finished=True)

    assert capsys.readouterr().out.count(WORDS) == 1


def test_training_goes_on_without_an_event_file(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(EventsWriter, "write_event", full)
    run_dir = train("diabetes", "steps=40", "log.tensorboard=true")
    assert (run_dir / "checkpoints" / "40").is_dir()
    assert capsys.readouterr().out.count(WORDS) == 1


def test_a_clock_that_is_set_back_stops_no_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = opened(tmp_path)
    times = iter(range(10**6, 0, -1000))
    monkeypatch.setattr(tensorboard.time, "time", lambda: next(times))
    for step in range(1, 30):
        board.scalars(step, {"loss": step})
    monkeypatch.undo()
    board.close(finished=False)

    shown = EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [event.step for event in shown] == list(range(1, 30))


def test_a_narrow_distribution_is_not_one_block(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = opened(tmp_path)
    board.histograms(1, {"scale": 1 + 1e-3 * np.random.default_rng(0).standard_normal(1000)})
    board.close(finished=False)

    (shown,) = EventAccumulator(str(tmp_path)).Reload().Histograms("params/scale")
    assert sum(count > 0 for count in shown.histogram_value.bucket) > 30
