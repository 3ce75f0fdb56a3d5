"""`checkpoint.dir`: a run whose checkpoints lie in another folder, or at gs://, is the same run."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import QUIET, SMALL, restored
from gcs_server import MISSING, GcsServer
from linen_nnx import RuleBook
from linen_nnx.cli import main
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.remote import as_path

from configs.build import ConfigError
from training import compose, evaluation, export, loop
from training.runtime import checkpoints, folders, homes, lock
from training.runtime.errors import Refused
from training.runtime.runs import RUNS

SAVING = ("steps=6", "eval.every=2", "checkpoint.every=2", "eval.batches=1")


@pytest.fixture(scope="module", name="server")
def google(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    if MISSING:
        pytest.skip(f"needs {', '.join(MISSING)}")
    with GcsServer("team") as server:
        before = dict(os.environ)
        os.environ.update(server.environment())
        yield server
        os.environ.clear()
        os.environ.update(before)


@pytest.fixture(scope="module", name="plain")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose checkpoints lie in its run directory."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    train(run_dir)
    return run_dir


def home_of(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Another folder of the disk, one in the run directory, or one in a bucket."""
    if kind == "gs":
        request.getfixturevalue("server")
        return f"gs://team/{tmp_path.name}"
    return str(tmp_path / ("run/inside" if kind == "inside" else "home"))


def configured(run_dir: Path, *words: str) -> Any:
    return compose(*SMALL["diabetes"], *QUIET, *SAVING, f"run_dir={run_dir}", *words)


def train(run_dir: Path, *words: str) -> None:
    loop.train(configured(run_dir, *words))


def refused(act: Callable[..., Any], *words: Any) -> str:
    with pytest.raises(Refused) as refusal:
        act(*words)
    return str(refusal.value)


def convert(*words: object) -> int:
    return main([*map(str, words)], runs="training.runtime.runs:RUNS")


def said_by(act: Callable[[Any], None], run_dir: Path, *words: str) -> str:
    """What it prints of a run."""
    text = StringIO()
    with redirect_stdout(text):
        act(configured(run_dir, *words))
    return text.getvalue()


def up_to(rows: bytes, step: int) -> list[bytes]:
    lines = rows.splitlines(keepends=True)
    return [line for line in lines if json.loads(line)["step"] <= step]


def steps(home: str) -> tuple[list[int], list[int]]:
    found = [checkpoints.steps_of(as_path(home) / root) for root in ("checkpoints", "best")]
    return found[0], found[1]


@pytest.mark.parametrize("kind", ["disk", pytest.param("gs", marks=pytest.mark.long)])
def test_a_run_is_the_same_wherever_its_checkpoints_lie(
    tmp_path: Path, plain: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """Saved, kept, best, resumed, at another stage, evaluated, exported, converted, verified."""
    home, run_dir = home_of(kind, tmp_path, request), tmp_path / "run"
    place = f"checkpoint.dir={home}"
    train(run_dir, place, "stop_at=4")
    train(tmp_path / "nnx", "stage=nnx", f"init_from={run_dir}", f"{place}-nnx")
    train(run_dir, place)
    rows = (run_dir / "metrics.jsonl").read_bytes()
    assert rows == (plain / "metrics.jsonl").read_bytes()
    assert not (run_dir / "checkpoints").exists() and not (run_dir / "best").exists()
    assert steps(home) == steps(str(plain)) == ([4, 6], [6])
    assert restored(as_path(home) / "checkpoints" / "6") == restored(plain / "checkpoints" / "6")
    # At another stage it went on with its curve, which lies in its run directory.
    assert (tmp_path / "nnx/metrics.jsonl").read_bytes().startswith(b"".join(up_to(rows, 4)))
    assert steps(f"{home}-nnx")[0] == [6]

    assert said_by(evaluation.report, run_dir, place) == said_by(evaluation.report, plain)
    export.export(configured(run_dir, place))
    assert (run_dir / "export/6/model.safetensors").is_file()
    # By its run directory, whose config.yaml says where they are, it is converted whole.
    out = tmp_path / "out"
    assert convert("run", run_dir, out, "--to", "nnx") == 0
    assert convert("verify", run_dir, out) == 0
    assert (steps(str(out)), homes.noted(out)) == (([6], [6]), out)
    if kind == "gs":  # and what was converted there is restored there, by stock Orbax
        assert convert("run", run_dir, f"{home}-out", "--to", "nnx") == 0
        there = restored(as_path(f"{home}-out/checkpoints/6"))
        assert there == restored(out / "checkpoints/6")


@pytest.mark.parametrize("kind", ["inside", "gs"])
def test_a_home_is_one_runs_alone(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """Nothing begins anew beside its checkpoints, and nothing replaces those of another run."""
    home, run_dir = home_of(kind, tmp_path, request), tmp_path / "run"
    place = f"checkpoint.dir={home}"
    train(run_dir, place, "stop_at=2")
    before = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    assert f"give checkpoint.dir={home}" in refused(train, run_dir)
    assert f"give checkpoint.dir={home}" in refused(evaluation.report, configured(run_dir))
    said = refused(train, tmp_path / "other", place)
    assert f"{home} holds checkpoints, up to step 2, and {tmp_path / 'other'} holds no run" in said
    assert not (tmp_path / "other").exists()
    after = {path.name: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    assert after == before and steps(home) == ([2], [2])

    # A run that has lost its files is gone on from by its home.
    for name in before:
        (run_dir / name).unlink()
    assert f"{run_dir} holds no run" in refused(train, run_dir, place)
    said = said_by(loop.train, tmp_path / "third", f"init_from={home}")
    assert f"without that of {home}/checkpoints/2: its run directory is not known" in said
    assert steps(str(tmp_path / "third"))[0] == [4, 6]


def test_two_runs_do_not_share_a_home_at_one_time(tmp_path: Path, server: GcsServer) -> None:
    place = f"gs://team/{tmp_path.name}"
    train(tmp_path / "a", f"checkpoint.dir={place}", "stop_at=2")
    for step in ("checkpoints/2", "best/2"):
        folders.remove(as_path(place) / step)
    said = refused(train, tmp_path / "b", f"checkpoint.dir={place}")
    assert f"{place} holds the checkpoints of another run, by {place}/home.json" in said
    assert str(tmp_path / "a") in said and not (tmp_path / "b").exists()

    folder = tmp_path / "disk"
    with lock.held(folder):
        assert f"training in {folder}" in refused(train, tmp_path / "c", f"checkpoint.dir={folder}")


@pytest.mark.long
def test_what_a_kill_leaves_in_a_bucket_is_no_checkpoint(tmp_path: Path, server: GcsServer) -> None:
    """A save and a best one that lack the mark which is written last: they are done once more."""
    home, run_dir = f"gs://team/{tmp_path.name}", tmp_path / "run"
    train(run_dir, f"checkpoint.dir={home}")
    rows = (run_dir / "metrics.jsonl").read_bytes()
    whole = restored(as_path(home) / "checkpoints/6")
    for step in ("checkpoints/6", "best/6"):
        mark = as_path(f"{home}/{step}/commit_success.txt")
        mark.bucket.remove([mark.key])
    assert steps(home) == ([4], [])
    train(run_dir, f"checkpoint.dir={home}")
    assert steps(home) == ([4, 6], [6])
    assert (run_dir / "metrics.jsonl").read_bytes() == rows
    assert restored(as_path(home) / "checkpoints/6") == whole

    altered = next(
        key for key in server.objects() if f"{tmp_path.name}/checkpoints/6/state/d/" in key
    )
    store = as_path(home).bucket
    content = bytearray(store.read(altered))
    content[-1] ^= 1
    store.remove([altered])
    store.create(altered, bytes(content))
    said = refused(train, run_dir, f"checkpoint.dir={home}")
    assert f"{home}/checkpoints/6 is damaged" in said and "go on from an earlier step (4)" in said


def test_a_bucket_that_cannot_be_written_is_told_before_the_first_step(
    tmp_path: Path, server: GcsServer
) -> None:
    said = refused(train, tmp_path / "run", "checkpoint.dir=gs://nobodys/runs")
    assert "gs://nobodys/runs cannot be written: FileNotFoundError" in said
    assert not (tmp_path / "run" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("s3://team/run", "as Orbax, which saves, opens no s3:// path"),
        ("https://team/run", "expected a folder on a disk or gs://"),
    ],
)
def test_what_orbax_cannot_write_is_refused(tmp_path: Path, place: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        configured(tmp_path, f"checkpoint.dir={place}")


def test_a_bucket_without_its_packages_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="gcsfs and obstore missing: pip install"):
        configured(tmp_path, "checkpoint.dir=gs://team/run")


def test_a_moved_home_is_said_in_the_configuration_file(tmp_path: Path) -> None:
    run_dir, was, now = tmp_path / "run", tmp_path / "was", tmp_path / "now"
    train(run_dir, f"checkpoint.dir={was}", "stop_at=2")
    was.rename(now)
    said = refused(train, run_dir, f"checkpoint.dir={now}")
    assert f"say so in {run_dir / 'config.yaml'}, under `checkpoint`" in said
    file = run_dir / "config.yaml"
    file.write_text(file.read_text().replace(f"dir: {was}", f"dir: {now}"))
    train(run_dir, f"checkpoint.dir={now}")
    assert json.loads((now / "checkpoints/6/run/metadata").read_text())["config"]["steps"] == 6


@pytest.mark.parametrize(
    "place", ["gs://team/run", "/with spaces/" + "a b " * 40, "it's: {odd}", "two\nlines", None]
)
def test_a_converted_run_has_its_checkpoints_in_it(tmp_path: Path, place: str | None) -> None:
    """However its configuration file writes where they were; or it is refused."""
    config = {"stage": "linen", "data": {"dir": "x"}, "checkpoint": {"dir": place, "keep": 2}}
    run_dir, out = tmp_path / "run", tmp_path / "out"
    for folder in (run_dir, out):
        folder.mkdir()
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    RUNS.write(run_dir, out, "nnx", RuleBook.from_dict({"version": 1, "rules": []}))
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written == config | {"stage": "nnx", "checkpoint": {"dir": None, "keep": 2}}

    if place == "gs://team/run":
        (run_dir / "config.yaml").write_text(f"stage: nnx\ncheckpoint: {{dir: '{place}'}}\n")
        with pytest.raises(StoreError, match="the checkpoints are in gs://team/run, but not in a"):
            RUNS.write(run_dir, out, "nnx", RuleBook.from_dict({"version": 1, "rules": []}))
