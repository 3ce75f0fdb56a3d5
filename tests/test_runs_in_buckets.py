"""Whole run directories in buckets: converted, verified, and gone on from, as those on a disk."""

from pathlib import Path

import obstore
import pytest
from conftest import QUIET, SMALL, restored
from linen_nnx.cli import main
from linen_nnx.disk import bucket
from obstore.store import MemoryStore

from training import compose, loop

SAVING = ("steps=6", "eval.every=2", "checkpoint.every=2", "eval.batches=1")


def train(run_dir: Path, *words: str) -> Path:
    loop.train(compose(*SMALL["diabetes"], *QUIET, *SAVING, f"run_dir={run_dir}", *words))
    return run_dir


@pytest.fixture(scope="module", name="run_dir")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped on its way."""
    return train(tmp_path_factory.mktemp("runs") / "a", "stop_at=4")


@pytest.fixture(name="store")
def memory(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """What lies at `s3://team` and at `gs://team`: the run, as `runs/a`."""
    monkeypatch.setattr(bucket, "_KNOWN", {})
    store = MemoryStore()
    for scheme in ("s3", "gs"):
        bucket.use_store(scheme, "team", store)
    for file in run_dir.rglob("*"):
        if file.is_file():
            obstore.put(store, f"runs/a/{file.relative_to(run_dir)}", file)
    return store


def download(store: MemoryStore, key: str, folder: Path) -> None:
    for some in obstore.list(store, key):
        for entry in some:
            file = folder / entry["path"].removeprefix(f"{key}/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(bytes(obstore.get(store, entry["path"]).bytes()))


def convert(*words: object) -> int:
    return main([*map(str, words)], runs="training.runtime.runs:RUNS")


@pytest.mark.parametrize("scheme", ["s3", pytest.param("gs", marks=pytest.mark.long)])
def test_a_run_in_a_bucket_is_converted_whole_on_every_way(
    run_dir: Path, tmp_path: Path, store: MemoryStore, scheme: str
) -> None:
    there = f"{scheme}://team"
    assert convert("run", run_dir, tmp_path / "local", "--to", "nnx") == 0
    ways = [
        (f"{there}/runs/a", f"{there}/runs/inside"),
        (run_dir, f"{there}/runs/up"),
        (f"{there}/runs/a", tmp_path / "down"),
    ]
    for source, out in ways:
        assert convert("run", source, out, "--to", "nnx") == 0
        assert convert("verify", source, out) == 0
        folder = tmp_path / str(out).rpartition("/")[2]
        if "://" in str(out):
            download(store, f"runs/{folder.name}", folder)
        for name in ("config.yaml", "rules.yaml", "metrics.jsonl"):
            assert (folder / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
        for step in ("checkpoints/4", "best/4"):
            assert restored(folder / step) == restored(tmp_path / "local" / step)
    # A result that came out of a bucket is a run like any other.
    train(tmp_path / "down", "stage=nnx")


@pytest.mark.parametrize("scheme", [pytest.param("s3", marks=pytest.mark.long), "gs"])
def test_a_run_goes_on_from_one_in_a_bucket_as_from_one_on_a_disk(
    run_dir: Path, tmp_path: Path, store: MemoryStore, scheme: str
) -> None:
    there = f"init_from={scheme}://team/runs/a"
    from_bucket = train(tmp_path / "bucket", "stage=nnx", there)
    from_disk = train(tmp_path / "disk", "stage=nnx", f"init_from={run_dir}")
    rows = [(one / "metrics.jsonl").read_bytes() for one in (from_bucket, from_disk)]
    assert rows[0] == rows[1], "with the rows before it"
    assert restored(from_bucket / "checkpoints/6") == restored(from_disk / "checkpoints/6")


def test_damage_to_a_run_in_a_bucket_is_named_by_row(
    tmp_path: Path, store: MemoryStore, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = bytes(obstore.get(store, "runs/a/metrics.jsonl").bytes()).splitlines(keepends=True)
    obstore.put(store, "runs/a/metrics.jsonl", b"".join(rows[:1] + rows[2:]))
    assert convert("run", "gs://team/runs/a", tmp_path / "out", "--to", "nnx") == 1
    said = capsys.readouterr().err
    assert "gs://team/runs/a is not as its checkpoint of step 4 says" in said
    assert "metrics.jsonl: row 2 (step 2) is missing" in said
