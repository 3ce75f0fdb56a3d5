"""Where a run shows itself beside its metrics: each tracker has every row once, however it went."""

import csv
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import Train

from configs.build import ConfigError
from training import compose
from training.runtime.board import Board, scalars_of
from training.runtime.metrics import read

OPTIONS = ("steps=8", "log_every=2", "eval.every=4", "checkpoint.every=4")


def due(run_dir: Path) -> list[tuple[int, str, float]]:
    return [
        (row["step"], name, value)
        for row in read(run_dir)
        for name, value in scalars_of(row).items()
    ]


def in_csv(run_dir: Path) -> list[tuple[int, str, float]]:
    with (run_dir / "metrics.csv").open() as file:
        found = [
            (int(row["step"]), row["name"], float(row["value"])) for row in csv.DictReader(file)
        ]
    own = ("memory/", "train/examples_per", "train/seconds_per", "norms/")
    return [one for one in found if not one[1].startswith(own)]


def test_a_csv_has_each_number_once_after_a_stop_and_after_a_change_of_stage(train: Train) -> None:
    run_dir = train("diabetes", *OPTIONS, "log.csv=true", "stop_at=6")
    with (run_dir / "metrics.csv").open("a") as file:
        file.write("7,train/loss,1.0\n")  # of a run that was killed before it saved that step
    train("diabetes", *OPTIONS, "log.csv=true", f"run_dir={run_dir}")
    assert in_csv(run_dir) == due(run_dir)

    first = train("diabetes", *OPTIONS, "stage=linen", "stop_at=4")
    second = train("diabetes", *OPTIONS, "stage=nnx", f"init_from={first}", "log.csv=true")
    assert in_csv(second) == due(second)
    assert due(second)[0][0] == 2


class Failing:
    is_new = True

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no such server")


def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen: list[int] = []

    class Seeing(Failing):
        def scalars(self, step: int, values: Any) -> None:
            seen.append(step)

    board = Board({"Mine": Failing, "Other": Seeing})
    for step in range(3):
        board.scalars(step, {"loss": 1.0})
    said = "Mine cannot be written (RuntimeError: no such server). Training goes on without it."
    assert capsys.readouterr().out.count(said) == 1
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused_by_its_key(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.config.find_spec", lambda name: None)
    with pytest.raises(ConfigError) as error:
        compose("experiment=diabetes", f"log.{name}=mine")
    assert error.value.problems.keys() == {f"log.{name}"}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kept"), [("wandb", "wandb/*/run-*.wandb"), ("mlflow", "mlruns")])
def test_a_tracker_without_a_server_keeps_what_a_run_shows(
    name: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    words = ["experiment=diabetes", *OPTIONS, f"log.{name}=mine", "log.histograms_every=4"]
    for end in ("stop_at=4", "stop_at=null"):
        command = [sys.executable, "train.py", *words, end, f"run_dir={tmp_path / 'run'}"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "cannot be written" not in done.stdout, done.stdout
    assert list((tmp_path / "run").glob(kept))
    if name == "mlflow":
        lines = {
            path.name: path.read_text().split()
            for path in (tmp_path / "run" / "mlruns").glob("*/*/metrics/train/loss")
        }
        steps = [row["step"] for row in read(tmp_path / "run") if row["split"] == "train"]
        assert [int(text) for text in lines["loss"][2::3]] == steps


def test_tensorboard_shows_one_curve_and_what_was_asked_for(train: Train) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2

    first = train("diabetes", *OPTIONS, "stage=linen", "stop_at=4")
    second = train("diabetes", *OPTIONS, "stage=nnx", f"init_from={first}", "log.tensorboard=true",
                   "log.norms_every=2", "stop_at=6")  # fmt: skip

    events = EventAccumulator(str(second)).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [2, 4, 6]
    assert [event.step for event in events.Scalars("eval/loss")] == [4]
    tags = events.Tags()["scalars"]
    assert {"norms/encoder/linear", "memory/process_peak"} <= {*tags}
    (shown,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(shown.tensor_proto.string_val[0])
    assert [*layout.category[0].chart[0].multiline.tag] == ["train/loss$", "eval/loss$"]
    # Its settings are in the tab HPARAMS although it has not come to its end.
    assert "_hparams_/session_start_info" in events.summary_metadata
