"""Checkpoints in buckets, on a store in memory; test_bucket_server.py asks a real server."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import obstore
import optax
import orbax.checkpoint as ocp
import pytest
from convert_helpers import RENAMES, STACKS, linen_state
from obstore.store import MemoryStore

from linen_nnx.cli import main
from linen_nnx.disk import bucket, claims, in_bucket
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.claims import Claim
from linen_nnx.disk.remote import as_path
from linen_nnx.disk.transaction import TargetError


@pytest.fixture(name="store")
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """What lies in `s3://mem` and in `gs://mem`."""
    monkeypatch.setattr(bucket, "_KNOWN", {})
    store = MemoryStore()
    bucket.use_store("s3", "mem", store)
    bucket.use_store("gs", "mem", store)
    bucket.use_store("s3", "other", MemoryStore())
    return store


def upload(store: MemoryStore, folder: Path, key: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            obstore.put(store, f"{key}/{file.relative_to(folder)}", file)


def keys(store: MemoryStore) -> list[str]:
    return [entry["path"] for some in obstore.list(store) for entry in some]


def download(store: MemoryStore, key: str, folder: Path) -> None:
    for name in (one for one in keys(store) if one.startswith(f"{key}/")):
        file = folder / name.removeprefix(f"{key}/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(obstore.get(store, name).bytes()))


def arrays(folder: Path) -> dict[str, bytes]:
    """What stock Orbax restores of the step in a root, bit for bit."""
    tree = ocp.PyTreeCheckpointer().restore(folder / "3" / "state")
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf).tobytes() for path, leaf in flat}


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """Two words that a refusal has in it, out of those that the tests ask for."""
    capsys.readouterr()
    assert main(words) == 1
    said = capsys.readouterr().err
    return next((text for text in _REASONS if text in said), said)


_REASONS = (
    "exists and", "lies inside", "no network", "another conversion", "was made by", "is a save",
    "no credentials", "buckets need",
)  # fmt: skip


def broken(*_: object) -> None:
    raise StoreError("no network")


def saved(folder: Path, ocdbt: bool = True, **form: Any) -> Path:
    """A CheckpointManager's root with one step of a Linen training state."""
    state = linen_state(optax.adam(1e-3), **form)
    tree = {"params": state.params, "batch_stats": state.batch_stats, "step": state.step}
    args = ocp.args.Composite(
        state=ocp.args.PyTreeSave(tree),
        data=ocp.args.JsonSave({"position": 7}),
    )
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt)
    handlers = {"state": handler, "data": ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(folder, item_handlers=handlers) as manager:
        manager.save(3, args=args)
    return folder


@pytest.mark.parametrize(("ocdbt", "stacked"), [(True, False), (True, True), (False, True)])
def test_a_checkpoint_is_the_same_on_every_way(tmp_path, store, ocdbt, stacked):
    """Renamed or stacked, in one database or a folder for each array; to a disk and to buckets."""
    root = saved(tmp_path / "root", ocdbt, stacked=stacked)
    upload(store, root, "a/root")
    book = STACKS if stacked else RENAMES
    book.save(rules := tmp_path / "rules.yaml")
    words = ["--to", "nnx", "--rules", str(rules)]
    assert main(["inspect", "gs://mem/a/root"]) == 0
    assert main(["plan", "gs://mem/a/root", *words]) == 0
    assert main(["run", str(root), str(tmp_path / "local"), *words]) == 0
    ways = [
        ("gs://mem/a/root", str(tmp_path / "down")),
        (str(root), "s3://mem/b/up"),
        ("gs://mem/a/root", "gs://mem/b/inside"),
        ("gs://mem/a/root", "s3://other/b/across"),
    ]
    for source, out in ways:
        assert main(["run", source, out, *words]) == 0
        assert main(["verify", source, out]) == 0
        folder = tmp_path / out.rpartition("/")[2]
        if "://" in out:
            bucket_path = as_path(out)
            download(bucket_path.bucket.store, bucket_path.key, folder)
        assert arrays(folder) == arrays(tmp_path / "local")
        assert main(["run", source, out, *words]) == 0, "a second time it is there, and equal"


@pytest.mark.parametrize("name", ["m.msgpack", "m.safetensors"])
def test_a_file_goes_into_a_bucket_and_out_of_it(tmp_path, store, name):
    upload(store, saved(tmp_path / "root"), "a/root")
    (tmp_path / "book").mkdir()
    RENAMES.save(tmp_path / "book" / "rules.yaml")
    upload(store, tmp_path / "book", "a")
    words = ["--rules", "s3://mem/a/rules.yaml", "--model-only"]
    assert main(["run", "s3://mem/a/root", f"s3://mem/b/{name}", "--to", "nnx", *words]) == 0
    assert main(["run", f"s3://mem/b/{name}", "s3://mem/b/back", "--to", "linen", *words]) == 0
    assert main(["verify", f"s3://mem/b/{name}", "s3://mem/b/back", *words]) == 0


def test_nothing_is_ever_overwritten_or_left_behind(tmp_path, store, monkeypatch, capsys):
    upload(store, saved(tmp_path / "root"), "a/root")
    RENAMES.save(rules := tmp_path / "rules.yaml")
    words = ["--to", "nnx", "--rules", str(rules)]
    obstore.put(store, "b/theirs/notes.txt", b"mine")
    before = keys(store)

    assert refused(capsys, ["run", "s3://mem/a/root", "s3://mem/b/theirs", *words]) == "exists and"
    assert refused(capsys, ["run", "s3://mem/a/root", "s3://mem/a/root/x", *words]) == "lies inside"
    words = ["run", "s3://mem/a/root", "s3://mem/b/new", *words]
    with monkeypatch.context() as patch:
        patch.setattr(in_bucket.BucketPlacer, "put", broken)
        assert refused(capsys, words) == "no network"
    assert keys(store) == before
    with monkeypatch.context() as patch:
        patch.setattr(in_bucket.BucketPlacer, "put", broken)
        patch.setattr(bucket.Bucket, "remove", broken)  # nor can it be cleared away now
        assert refused(capsys, words) == "no network"
    assert len(keys(store)) > len(before)
    assert main(words) == 0, "by the next one it is"


@pytest.mark.parametrize("state", ["claimed", "writing"])
def test_a_claim_of_a_dead_process_is_taken_over(tmp_path, store, capsys, state):
    """What it has written is cleared away, and nothing that may have been there before."""
    upload(store, saved(tmp_path / "root"), "a/root")
    RENAMES.save(rules := tmp_path / "rules.yaml")
    words = ["run", "s3://mem/a/root", "s3://mem/b/out", "--to", "nnx", "--rules", str(rules)]
    alive = Claim(as_path("s3://mem/b/out"), print)
    alive.take()
    assert refused(capsys, words) == "another conversion"

    content = json.loads(bytes(obstore.get(store, "b/.out.converting").bytes()))
    alive.end(clear=False)
    dead = content | {"process": 2**22 + 1, "state": state}
    obstore.put(store, "b/.out.converting", json.dumps(dead).encode())
    obstore.put(store, "b/out/3/half", b"")
    if state == "claimed":
        assert refused(capsys, words) == "was made by"
        assert "b/out/3/half" in keys(store)
    else:
        assert main(words) == 0
        assert "b/out/3/half" not in keys(store)
    assert "b/.out.converting" not in keys(store)


def test_a_claim_of_another_machine_is_watched(store, monkeypatch):
    """Whether it is renewed tells whether its process is alive: clocks differ."""
    monkeypatch.setattr(claims, "_POLL", 0.0)
    monkeypatch.setattr(claims, "_LEASE", 0.05)
    out = as_path("s3://mem/b/out")
    content = {"made_by": "linen-nnx", "machine": "another", "state": "claimed"}
    obstore.put(store, "b/.out.converting", json.dumps(content).encode())
    ours = Claim(out, lambda text: obstore.put(store, "b/.out.converting", text.encode()))
    with pytest.raises(TargetError, match="another conversion is writing"):
        ours.take()
    obstore.put(store, "b/.out.converting", json.dumps(content).encode())
    ours = Claim(out, lambda text: None)
    ours.take()
    # One that was taken for dead, and was not, learns of it before it writes its marks.
    obstore.put(store, "b/.out.converting", json.dumps(content | {"id": "x"}).encode())
    with pytest.raises(TargetError, match="another one has taken its place"):
        ours.confirm()
    ours.end(clear=True)


def test_a_save_without_its_mark_is_none(tmp_path, store, capsys):
    """Orbax writes it last to gs://, and takes a save without it for one that was cut off."""
    upload(store, saved(tmp_path / "root"), "a/root")
    obstore.delete(store, "a/root/3/commit_success.txt")
    assert refused(capsys, ["inspect", "gs://mem/a/root/3"]) == "is a save"
    assert main(["inspect", "s3://mem/a/root/3"]) == 0, "which Orbax cannot have written there"
    obstore.put(store, "a/.root.converting", b"")
    assert refused(capsys, ["inspect", "s3://mem/a/root/3"]) == "is a save"


@pytest.mark.parametrize(
    ("scheme", "silent"), [("s3", "AWS_EC2_METADATA_DISABLED"), ("gs", "NO_GCE_CHECK")]
)
def test_missing_credentials_are_a_message(monkeypatch, capsys, tmp_path, scheme, silent):
    for name in os.environ:
        if name.startswith(("AWS_", "GOOGLE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(silent, "true")
    assert refused(capsys, ["inspect", f"{scheme}://nobody/a"]) == "no credentials"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"AWS_ENDPOINT_URL": "nonsense"}, "AWS_ENDPOINT_URL is 'nonsense': expected http://HOST"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, "cannot be reached at http://127.0.0.1:9: "),
        ({"AWS_SECRET_ACCESS_KEY": ""}, "Missing SecretAccessKey: set AWS_ACCESS_KEY_ID and"),
    ],
)
def test_a_wrong_environment_is_a_message(monkeypatch, capsys, changed, why):
    for name in os.environ:
        if name.startswith("AWS_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(bucket, "_RETRIES", {"max_retries": 0})
    monkeypatch.setattr(bucket, "_KNOWN", {})
    said = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_REGION": "c", **changed}
    for name, value in said.items():
        if value:
            monkeypatch.setenv(name, value)
    capsys.readouterr()
    assert main(["inspect", "s3://nobody/a"]) == 1
    assert why in capsys.readouterr().err


def test_a_missing_extra_is_a_message(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "obstore", None)
    assert refused(capsys, ["inspect", "s3://bucket/a"]) == "buckets need"


def test_files_need_no_obstore(tmp_path):
    code = f"from linen_nnx.cli import main; import sys; main(['inspect', {str(tmp_path)!r}])"
    code += "; sys.exit('obstore' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("az://bucket/a", "of a kind that is not read: known gs://, s3://"),
        ("s3://", "names no bucket"),
        ("s3://mem/a//b", "an element that is empty"),
        ("gs://mem/../b", "an element that is empty, `.` or `..`"),
    ],
)
def test_a_url_that_can_name_no_object_is_refused(text, why):
    with pytest.raises(StoreError, match=why):
        as_path(text)


def test_a_path_in_a_bucket_is_none_of_this_machine(store):
    """Handed to the system it would be a relative path, and make files there."""
    path = as_path("s3://mem/a/b")
    assert [str(one) for one in (path / "c", path.parent)] == ["s3://mem/a/b/c", "s3://mem/a"]
    assert str((path / "d/e").relative_to(path)) == "d/e"
    with pytest.raises(TypeError, match="lies in a bucket"):
        path.write_text("")
