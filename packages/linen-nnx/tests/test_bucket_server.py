"""Checkpoints in buckets, asked of a real server of S3's protocol on 127.0.0.1."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
from convert_helpers import RENAMES
from gcs_double import GcsDouble
from test_buckets import arrays, download, keys, saved, upload

from benchmarks.s3_server import S3Server
from linen_nnx.cli import main
from linen_nnx.disk import bucket, claims


@pytest.fixture(scope="module", name="server")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture(scope="module", name="root")
def uploaded(server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CheckpointManager's root, which lies at `s3://bkt/root`, too."""
    folder = tmp_path_factory.mktemp("root")
    RENAMES.save(folder / "rules.yaml")
    upload(server.store("bkt"), saved(folder / "root", width=64), "root")
    return folder


@pytest.fixture(autouse=True)
def environment(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(bucket, "_KNOWN", {})
    server.on_request = lambda request: None
    server.requests()


def start(root: Path, source: str, out: str) -> "subprocess.Popen[str]":
    """A conversion in a process of its own."""
    command = [sys.executable, "-m", "linen_nnx", "run", source, out, "--to", "nnx"]
    command += ["--rules", str(root / "rules.yaml")]
    return subprocess.Popen(
        command, env=os.environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def end(process: "subprocess.Popen[str]") -> tuple[int, str]:
    said, _ = process.communicate()
    return process.returncode, said


def test_no_data_file_passes_the_client(server, root, tmp_path):
    """The server copies them; what is made anew is put, and nothing outside the target."""
    code, said = end(start(root, "s3://bkt/root", "s3://bkt/inside/out"))
    assert code == 0, said
    requests = server.requests()

    store = server.store("bkt")
    old = {key for key in keys(store) if "/d/" in key and key.startswith("root/")}
    data = {key for key in old if obstore.head(store, key)["size"] > 4096}
    assert data
    read = {request.split()[1].removeprefix("/bkt/") for request in requests if "GET" in request}
    assert not read & data, "ranges of a tree's nodes aside, of files that hold no more"
    written = [request for request in requests if not request.startswith(("GET", "HEAD"))]
    assert all("inside/out" in one or "inside/.out.converting" in one for one in written)

    download(store, "inside/out", tmp_path / "out")
    assert main(["verify", "s3://bkt/root", str(tmp_path / "out")]) == 0
    assert main(["verify", "s3://bkt/root", "s3://bkt/inside/out"]) == 0
    assert main(["run", str(root / "root"), str(tmp_path / "local"), "--to", "nnx",
                 "--rules", str(root / "rules.yaml")]) == 0  # fmt: skip
    assert arrays(tmp_path / "out") == arrays(tmp_path / "local")


def test_of_two_conversions_to_one_target_one_wins_and_the_other_is_told(server, root):
    both = [start(root, "s3://bkt/root", "s3://bkt/two/out") for _ in range(2)]
    (code, said), (other_code, other_said) = sorted(map(end, both))
    assert code == 0 and "is complete" in said
    # Where the machine was busy, the other came when the first had ended.
    late = other_code == 0 and "was there already and is equal" in other_said
    assert late or (other_code == 1 and "another conversion is writing" in other_said)
    assert main(["verify", "s3://bkt/root", "s3://bkt/two/out"]) == 0
    assert "two/.out.converting" not in keys(server.store("bkt"))


@pytest.mark.parametrize(
    "every", [7, pytest.param(1, marks=pytest.mark.long)], ids=["some", "each"]
)
def test_killed_at_any_request_it_leaves_no_checkpoint_and_a_rerun_succeeds(server, root, every):
    """Before the server sees the request, of which a conversion makes some thirty."""
    store, killed = server.store("bkt"), 0
    for number in range(1, 100, every):
        out = f"kill{every}/{number}"
        process = start(root, "s3://bkt/root", f"s3://bkt/{out}")
        server.on_request = at(number, process, signal.SIGKILL)
        code, said = end(process)
        server.on_request = lambda request: None
        if code == 0:
            break
        assert code == -signal.SIGKILL, said
        killed += 1
        if f"{out}/3/commit_success.txt" in keys(store):
            # The mark may be there and the claim, too: then it is complete.
            assert main(["verify", "s3://bkt/root", f"s3://bkt/{out}"]) == 0
        else:
            assert main(["inspect", f"s3://bkt/{out}"]) == 1, "no checkpoint"
        code, said = end(start(root, "s3://bkt/root", f"s3://bkt/{out}"))
        assert code == 0, said
        assert main(["verify", "s3://bkt/root", f"s3://bkt/{out}"]) == 0
        assert f"kill{every}/.{number}.converting" not in keys(store)
    assert killed >= 28 // every


def at(number: int, process: "subprocess.Popen[str]", what: signal.Signals) -> Any:
    """What a server does at one request: it sends the process a signal."""
    seen = iter(range(1, 1000))

    def send(request: str) -> None:
        if next(seen) == number:
            process.send_signal(what)
            if what == signal.SIGKILL:
                process.wait()

    return send


def test_interrupted_it_leaves_nothing(server, root):
    before = keys(server.store("bkt"))
    process = start(root, "s3://bkt/root", "s3://bkt/interrupted/out")
    server.on_request = at(25, process, signal.SIGINT)  # data files are there, and no mark
    code, said = end(process)
    assert (code, "nothing was left behind" in said) == (130, True), said
    assert keys(server.store("bkt")) == before


def test_wrong_keys_are_a_message(server, monkeypatch, capsys):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    assert main(["inspect", "s3://bkt/root"]) == 1
    said = capsys.readouterr().err
    assert "403 Forbidden, SignatureDoesNotMatch. Check the credentials" in said


def test_google_is_asked_for_what_it_documents(root, monkeypatch):
    """Creation and renewal by generation, copies by the server, uploads in parts."""
    with GcsDouble() as double:
        for name, value in double.environment().items():
            monkeypatch.setenv(name, value)
        for file in (root / "root").rglob("*"):
            if file.is_file():
                name = f"bkt/root/{file.relative_to(root / 'root')}"
                double.objects[name] = (file.read_bytes(), 1)
        before = dict(double.objects)
        words = ["--to", "nnx", "--rules", str(root / "rules.yaml")]
        ways = [
            ("gs://bkt/root", "gs://bkt/inside"),
            (str(root / "root"), "gs://bkt/up"),
            ("gs://bkt/root", "gs://another/across"),
        ]
        for source, out in ways:
            assert main(["run", source, out, *words]) == 0
            assert main(["verify", source, out]) == 0
        assert all(double.objects[name] == before[name] for name in before)
        assert not any(name.endswith(".converting") for name in double.objects)

        dead = {"made_by": "linen-nnx", "machine": "?", "state": "writing"}
        monkeypatch.setattr(claims, "_POLL", 0.0)
        monkeypatch.setattr(claims, "_LEASE", 0.0)
        double.objects["bkt/.late.converting"] = (json.dumps(dead).encode(), 7)
        double.objects["bkt/late/half"] = (b"", 8)
        assert main(["run", "gs://bkt/root", "gs://bkt/late", *words]) == 0
        assert "bkt/late/half" not in double.objects
