"""A run that is cut short in any way and continued equals one that was not, bit for bit."""

import errno
import fcntl
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import QUIET, SMALL, STAGES, Train, restored
from linen_nnx import Refusal

from training import moving
from training.runtime import lock, signals, start
from training.runtime.errors import Refused

ROOT = Path(__file__).parent.parent
SAVING = ("checkpoint.every=4", "eval.every=10", "steps=30", "checkpoint.best=true")


each_stage = pytest.mark.parametrize(
    "stage",
    [pytest.param(s, marks=[pytest.mark.long] * (s != "nnx_in_linen")) for s in STAGES],
)


def curve(run_dir: Path) -> bytes:
    return (run_dir / "metrics.jsonl").read_bytes()


def launch(run_dir: Path, experiment: str, *overrides: str) -> subprocess.Popen[str]:
    """`python train.py` in a process of its own."""
    settings = [*SMALL[experiment], *QUIET, f"run_dir={run_dir}", *overrides]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *settings],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for_rows(process: subprocess.Popen[str], run_dir: Path, rows: int) -> None:
    """Returns once the run has written so many rows (or has ended)."""
    file = run_dir / "metrics.jsonl"
    while process.poll() is None and (not file.exists() or file.read_bytes().count(b"\n") < rows):
        time.sleep(0.001)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "stage"),
    [
        ("diabetes", "nnx_in_linen"),
        *(pytest.param("digits", stage, marks=pytest.mark.long) for stage in STAGES),
    ],
)
def test_a_killed_run_continues_as_if_nothing_had_happened(
    train: Train, tmp_path: Path, experiment: str, stage: str
) -> None:
    whole = train(experiment, f"stage={stage}", *SAVING)
    run_dir = tmp_path / "killed"
    moments = random.Random(stage)

    for _ in range(2):
        before = curve(run_dir).count(b"\n") if run_dir.exists() else 0
        process = launch(run_dir, experiment, f"stage={stage}", *SAVING)
        wait_for_rows(process, run_dir, before + moments.randint(1, 12))
        time.sleep(moments.random() * 0.02)
        process.kill()
        process.wait()
    last = launch(run_dir, experiment, f"stage={stage}", *SAVING)
    output, _ = last.communicate()

    assert last.returncode == 0, output
    assert curve(run_dir) == curve(whole)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_the_run_cleanly(train: Train, tmp_path: Path, number: int) -> None:
    settings = ("steps=4000", "checkpoint.every=100000", "eval.every=100000")
    run_dir = tmp_path / "signalled"
    process = launch(run_dir, "diabetes", *settings)
    wait_for_rows(process, run_dir, 20)
    process.send_signal(number)
    output, _ = process.communicate()

    assert process.returncode == signals.exit_code(number), output
    assert "goes on from there" in output
    (step,) = (int(entry.name) for entry in (run_dir / "checkpoints").iterdir())
    assert curve(run_dir).count(b"\n") == step
    train("diabetes", *settings, f"run_dir={run_dir}", f"stop_at={step + 20}")
    whole = train("diabetes", *settings, f"stop_at={step + 20}")
    assert curve(run_dir) == curve(whole)


@pytest.mark.slow
def test_a_signal_ends_a_multirun_with_the_run_at_hand(tmp_path: Path) -> None:
    runs = str(tmp_path / "run-${stage}")
    settings = ("steps=4000", "checkpoint.every=100000", "eval.every=100000")
    process = launch(Path(runs), "diabetes", *settings, "stage=linen,nnx",
                    f"hydra.sweep.dir={tmp_path / 'sweep'}", "--multirun")  # fmt: skip
    wait_for_rows(process, tmp_path / "run-linen", 20)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()

    assert process.returncode == signals.exit_code(signal.SIGTERM), output
    assert "goes on from there" in output
    assert not (tmp_path / "run-nnx").exists()


@pytest.mark.long
@each_stage
def test_stop_at_leaves_the_schedules_and_the_curve_as_they_are(train: Train, stage: str) -> None:
    options = (f"stage={stage}", "steps=12", "eval.every=5", "optimizer.ema=0.9",
               "optimizer.accumulate=2", "optimizer.warmup=2")  # fmt: skip
    whole = train("lm", *options)
    parts = train("lm", *options, "stop_at=7")
    assert curve(parts) == b"".join(curve(whole).splitlines(keepends=True)[:8])

    train("lm", *options, f"run_dir={parts}")

    assert curve(parts) == curve(whole)


def test_a_run_in_a_relative_folder_is_taken_up_as_it_is(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def translated(*_: object) -> None:
        raise AssertionError("the run's own checkpoint was taken for another run's")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(moving, "moved", translated)
    whole = train("diabetes", "steps=4")
    train("diabetes", "steps=4", "stop_at=2", "run_dir=here")
    assert curve(train("diabetes", "steps=4", "run_dir=here")) == curve(whole)


def test_a_saved_state_is_not_touched_by_the_steps_that_follow_it(train: Train) -> None:
    """The saved arrays are donated to the next step while the save is still being written."""
    often = train("diabetes", "steps=20", "checkpoint.every=1", "checkpoint.keep=20")
    for step in (3, 11, 17):
        alone = train("diabetes", "steps=20", f"stop_at={step}")
        kept = [restored(run_dir / "checkpoints" / str(step)) for run_dir in (often, alone)]
        assert kept[0] == kept[1]


def test_a_run_that_overfits_goes_on_with_the_batch_it_began_with(train: Train) -> None:
    whole = train("diabetes", "steps=6", "debug=overfit")
    parts = train("diabetes", "steps=6", "debug=overfit", "stop_at=3")
    train("diabetes", "steps=6", "debug=overfit", f"run_dir={parts}")
    assert curve(parts) == curve(whole)


def test_a_finished_run_is_left_alone(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = train("diabetes", "steps=3")
    before = curve(run_dir)

    train("diabetes", "steps=3", f"run_dir={run_dir}")

    assert curve(run_dir) == before
    assert "finished at step 3" in capsys.readouterr().out


def test_a_torn_last_row_is_dropped_on_resume(train: Train) -> None:
    whole = train("diabetes", "steps=6")
    run_dir = train("diabetes", "steps=6", "stop_at=4")
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "split": "train", "lo')

    train("diabetes", "steps=6", f"run_dir={run_dir}")

    assert curve(run_dir) == curve(whole)


def test_early_stopping_ends_the_run_and_stays_ended(train: Train) -> None:
    options = ("steps=400", "eval.every=1", "eval.patience=3", "optimizer.lr=1", "log_every=50")
    run_dir = train("diabetes", *options)
    rows = [json.loads(line) for line in curve(run_dir).splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "eval"]

    assert len(losses) < 400
    assert min(losses[-3:]) >= min(losses[:-3])
    train("diabetes", *options, f"run_dir={run_dir}")
    assert [json.loads(line) for line in curve(run_dir).splitlines()] == rows


def test_best_and_latest_are_kept_apart(train: Train) -> None:
    run_dir = train(
        "diabetes", "steps=40", "eval.every=4", "optimizer.lr=0.3", "checkpoint.every=4",
        "checkpoint.best=true", "checkpoint.keep=2", "optimizer.warmup=0",
    )  # fmt: skip
    rows = [json.loads(line) for line in curve(run_dir).splitlines()]
    evals = {row["step"]: row["loss"] for row in rows if row["split"] == "eval"}

    (best,) = os.listdir(run_dir / "best")
    assert int(best) == min(evals, key=lambda step: evals[step])
    assert sorted(map(int, os.listdir(run_dir / "checkpoints"))) == [36, 40]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("stage=nnx", "stage"),
        ("seed=7", "seed"),
        ("optimizer.lr=0.5", "optimizer.lr"),
        ("steps=5", "steps"),
        ("model.hidden=8", "model.hidden"),
    ],
)
def test_a_run_directory_of_another_run_is_refused(train: Train, change: str, named: str) -> None:
    run_dir = train("diabetes", "steps=2")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}

    with pytest.raises(Refused, match=rf"(?s)belongs to another run.*{named}: was"):
        train("diabetes", "steps=2", f"run_dir={run_dir}", change)

    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


def test_a_run_directory_of_another_experiment_is_refused(train: Train) -> None:
    run_dir = train("diabetes", "steps=2")
    with pytest.raises(Refused, match="name: was diabetes, is digits"):
        train("digits", "steps=2", f"run_dir={run_dir}")
    with pytest.raises(Refused, match="a run of the model `mlp`, and this run's is `convnet`"):
        train("digits", "steps=4", f"init_from={run_dir}")


def test_a_run_directory_is_held_before_anything_in_it_is_read(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, again = start.find, ("diabetes", "steps=3", f"run_dir={tmp_path / 'run'}")

    def late(*arguments: Any) -> Any:
        monkeypatch.setattr(start, "find", find)
        with pytest.raises(Refused, match="Another process is training in"):
            train(*again)
        return find(*arguments)

    monkeypatch.setattr(start, "find", late)

    assert curve(train(*again)) == curve(train("diabetes", "steps=3"))


def test_a_run_directory_that_a_refused_run_removes_meanwhile_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, run_dir = fcntl.flock, tmp_path / "run"

    def late(*arguments: Any) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        run_dir.rmdir()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", late)

    with lock.held(run_dir):
        assert run_dir.is_dir()
        with pytest.raises(Refused, match="Another process"), lock.held(run_dir):
            pass
    assert not run_dir.exists()


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock.held(tmp_path):
        assert f"The file system of {tmp_path} has no locks" in capsys.readouterr().out


def test_two_processes_do_not_train_in_one_run_directory(train: Train) -> None:
    run_dir = train("diabetes", "steps=9", "stop_at=2")
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    holder = os.open(run_dir, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)

    with pytest.raises(Refused, match="Another process is training in"):
        train("diabetes", "steps=9", f"run_dir={run_dir}", "eval.every=3")

    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    os.close(holder)
    train("diabetes", "steps=9", f"run_dir={run_dir}")
    assert curve(run_dir).count(b'"train"') == 9


def test_resume_never_and_must_say_what_they_miss(train: Train, tmp_path: Path) -> None:
    run_dir = train("diabetes", "steps=2")
    with pytest.raises(Refused, match="already holds a run"):
        train("diabetes", "steps=2", f"run_dir={run_dir}", "resume=never")
    with pytest.raises(Refused, match="no run in"):
        train("diabetes", "steps=2", f"run_dir={tmp_path / 'none'}", "resume=must")
    assert not (tmp_path / "none").exists()


def test_a_folder_that_holds_something_else_is_refused(train: Train, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.tex").write_text("x")
    with pytest.raises(Refused, match=r"no config\.yaml"):
        train("diabetes", "steps=2", f"run_dir={tmp_path / 'notes'}")
    assert os.listdir(tmp_path / "notes") == ["thesis.tex"]


def test_a_non_finite_loss_stops_the_run_and_keeps_the_state_aside(
    train: Train, tmp_path: Path
) -> None:
    run_dir = tmp_path / "diverging"
    options = ("steps=300", "optimizer=sgd", "optimizer.lr=1e6", "optimizer.clip_norm=null",
               "optimizer.warmup=0", "checkpoint.every=1", "log_every=7")  # fmt: skip

    with pytest.raises(Refused, match=r"The loss is (nan|inf) at step (\d+)") as error:
        train("diabetes", *options, f"run_dir={run_dir}")

    step = int(str(error.value).split(" at step ")[1].split(";")[0])
    kept = [int(entry.name) for entry in (run_dir / "checkpoints").iterdir()]
    assert max(kept) < step
    (aside,) = (run_dir / "nonfinite").iterdir()
    assert str(aside) in str(error.value)
    assert all(b"NaN" not in line and b"Infinity" not in line for line in curve(run_dir).split())


def test_a_gradient_that_overflows_stops_the_run_before_its_loss_does(
    train: Train, tmp_path: Path
) -> None:
    run_dir = tmp_path / "diverging"
    options = ("steps=300", "optimizer=sgd", "optimizer.lr=1e4", "optimizer.clip_norm=null",
               "optimizer.warmup=0", "checkpoint.every=1")  # fmt: skip

    with pytest.raises(Refused, match=r"The grad_norm_\w+ is inf at step \d+; all was finite"):
        train("diabetes", *options, f"run_dir={run_dir}")


def test_a_validation_loss_that_is_not_finite_is_called_so(train: Train, tmp_path: Path) -> None:
    options = ("steps=1", "optimizer=sgd", "optimizer.lr=1e25", "optimizer.clip_norm=null",
               "optimizer.warmup=0", "eval.every=1")  # fmt: skip
    with pytest.raises(Refused, match=r"validation loss after step 1 is (nan|inf); in training"):
        train("diabetes", *options, f"run_dir={tmp_path / 'run'}")
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_init_from_a_run_with_nothing_left_to_train_is_refused(
    train: Train, tmp_path: Path
) -> None:
    first = train("diabetes", "steps=2")
    with pytest.raises(Refused, match="is at step 2, and this run ends at step 2"):
        train("diabetes", "steps=2", "stage=nnx", f"init_from={first}", f"run_dir={tmp_path / 'x'}")
    assert not (tmp_path / "x").exists()


def test_init_from_something_else_is_refused(train: Train, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, reason in (("empty", "no checkpoint found"), ("absent", "no such file")):
        with pytest.raises(Refusal, match=reason):
            train("diabetes", f"init_from={tmp_path / path}", f"run_dir={tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_init_from_another_model_names_every_difference(train: Train, tmp_path: Path) -> None:
    first = train("diabetes", "steps=1", "model.hidden=8")
    with pytest.raises(Refused, match=r"encoder/linear/kernel.*\[10, 8\].*\[10, 64\]"):
        train("diabetes", "steps=2", f"init_from={first}", f"run_dir={tmp_path / 'other'}")
    assert not (tmp_path / "other").exists()


def test_a_damaged_checkpoint_is_not_taken_for_none(train: Train) -> None:
    run_dir = train("diabetes", "steps=4", "stop_at=2")
    before = curve(run_dir)
    (run_dir / "checkpoints" / "2" / "data" / "metadata").write_text('{"batches"')

    with pytest.raises(Refused, match=r"checkpoints/2/data/metadata cannot be read: .*Remove it"):
        train("diabetes", "steps=4", f"run_dir={run_dir}")

    assert curve(run_dir) == before


def test_a_run_killed_while_it_wrote_its_first_file_starts_again(
    train: Train, tmp_path: Path
) -> None:
    run_dir = tmp_path / "killed"
    run_dir.mkdir()
    (run_dir / "config.yaml.part").write_text("name: dia")
    assert curve(train("diabetes", "steps=2", f"run_dir={run_dir}")) == curve(
        train("diabetes", "steps=2")
    )


@pytest.mark.parametrize("below", ["", "/run"])
def test_a_run_directory_that_cannot_be_made_is_refused(
    train: Train, tmp_path: Path, below: str
) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(Refused, match=r"cannot be created: (File exists|Not a directory)"):
        train("diabetes", "steps=2", f"run_dir={tmp_path / 'file'}{below}")


def test_resume_finds_a_flipped_bit(train: Train) -> None:
    run_dir = train("diabetes", "steps=4", "stop_at=2")
    (step,) = (run_dir / "checkpoints").iterdir()
    files = [path for path in step.rglob("*") if path.is_file() and path.parent.name == "d"]
    victim = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)

    with pytest.raises(Refused, match=rf"(?s){victim.name} was altered.*Remove {step}"):
        train("diabetes", "steps=4", f"run_dir={run_dir}")


def test_a_checkpoint_without_digests_is_used_and_said_so(
    train: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = train("diabetes", "steps=4", "stop_at=2")
    (run_dir / "checkpoints" / "2" / "digests.json").unlink()
    train("diabetes", "steps=4", f"run_dir={run_dir}")
    assert "has no digests" in capsys.readouterr().out
