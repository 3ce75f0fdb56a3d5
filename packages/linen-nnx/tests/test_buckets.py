"""Checkpoints in buckets, on a store in memory; test_bucket_server.py asks a real server."""

from pathlib import Path

import obstore
import optax
import orbax.checkpoint as ocp
import pytest
from convert_helpers import RENAMES, STACKS, linen_state
from obstore.store import MemoryStore

from linen_nnx.cli import main
from linen_nnx.disk import bucket
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.remote import as_path


@pytest.fixture(name="store")
def memory(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """What lies in `s3://mem` and in `gs://mem`."""
    monkeypatch.setattr(bucket, "_KNOWN", {})
    store = MemoryStore()
    bucket.use_store("s3", "mem", store)
    bucket.use_store("gs", "mem", store)
    return store


def upload(store: MemoryStore, folder: Path, key: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            obstore.put(store, f"{key}/{file.relative_to(folder)}", file)


def saved(folder: Path, ocdbt: bool = True, stacked: bool = False) -> Path:
    """A CheckpointManager's root with one step of a Linen training state."""
    state = linen_state(optax.adam(1e-3), stacked=stacked)
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


@pytest.mark.parametrize("ocdbt", [True, False])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_checkpoint_in_a_bucket_is_converted_to_a_disk_as_its_copy_is(
    tmp_path, store, ocdbt, stacked
):
    """Renamed or stacked, in one database or a folder for each array."""
    book = STACKS if stacked else RENAMES
    book.save(rules := tmp_path / "rules.yaml")
    upload(store, saved(tmp_path / "root", ocdbt, stacked), "a/root")
    words = ["--to", "nnx", "--rules", str(rules)]
    assert main(["inspect", "gs://mem/a/root"]) == 0
    assert main(["plan", "gs://mem/a/root", *words]) == 0
    for source, out in ((str(tmp_path / "root"), "one"), ("gs://mem/a/root", "other")):
        assert main(["run", source, str(tmp_path / out), *words]) == 0
    assert main(["verify", str(tmp_path / "root"), str(tmp_path / "other")]) == 0
    upload(store, tmp_path / "one", "a/one")
    assert main(["verify", "gs://mem/a/root", "gs://mem/a/one"]) == 0


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
