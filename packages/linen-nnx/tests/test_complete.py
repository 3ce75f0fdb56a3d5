"""A source that has lost bytes is refused before anything is written, without any digest."""

import json
import os
import shutil

import pytest
from convert_helpers import make_socket, save_small, save_zarr

from linen_nnx.book.specs import Spec
from linen_nnx.cli import main
from linen_nnx.disk import ocdbt, ocdbt_writing
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.chunks import source_grid
from linen_nnx.disk.complete import check_complete, files_below
from linen_nnx.disk.convert import convert
from linen_nnx.disk.item import Item
from linen_nnx.disk.leaves import DICT, Key, Leaf
from linen_nnx.disk.zarr_metadata import fresh_metadata
from linen_nnx.proof.verify import verify


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("source") / "linen")


@pytest.fixture
def source(original, tmp_path):
    return shutil.copytree(original, tmp_path / "linen")


def large(source):
    """Where the large array lies: its file, and the end of it there."""
    _, offset, length = ref = ocdbt.read(source)["params.a.kernel"]["0"]
    return source / ref.file, offset + length


def refused(source):
    """Why a conversion is refused, which must have written nothing."""
    beside = sorted(os.listdir(source.parent))
    with pytest.raises(StoreError) as caught:
        convert(source, source.parent / "nnx", "nnx")
    assert sorted(os.listdir(source.parent)) == beside
    return str(caught.value)


def replace(path, make):
    path.unlink()
    make(path)


def test_every_cut_of_a_data_file_is_refused_with_its_name(source):
    file, end = large(source)
    whole = file.read_bytes()
    for length in (0, 1, end // 2, end - 1):
        file.write_bytes(whole[:length])
        text = refused(source)
        assert str(file.relative_to(source)) in text or "OCDBT tree cannot be read" in text
    file.write_bytes(whole)
    convert(source, source.parent / "nnx", "nnx")


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda path: path.symlink_to("/dev/zero"), "device"),
        (os.mkfifo, "pipe"),
        (os.mkdir, "directory"),
        (make_socket, "socket"),
    ],
)
@pytest.mark.parametrize("name", ["data", "manifest.ocdbt", "_sharding"])
def test_what_is_no_file_is_refused_and_not_waited_for(source, make, kind, name):
    replace(large(source)[0] if name == "data" else source / name, make)
    if name == "_sharding":  # which need not be there, and so is not looked for in a pipe
        convert(source, source.parent / "nnx", "nnx")
        return
    text = refused(source)
    assert f"it is a {kind}, expected a regular file" in text or "has no manifest.ocdbt" in text


def test_a_chunk_that_the_tree_has_lost_is_not_read_as_zeros(source):
    tree = ocdbt.read(source)
    del tree["params.a.kernel"]["0"]
    ocdbt_writing.write(source, tree)
    assert "the array `params/a/kernel` has no chunk 0" in refused(source)


def test_verify_does_not_pass_what_is_not_complete(original, tmp_path, capsys):
    source = shutil.copytree(original, tmp_path / "linen")
    convert(source, tmp_path / "nnx", "nnx")
    file, end = large(source)
    os.truncate(file, end - 1)
    failed = [check for check in verify(source, tmp_path / "nnx") if check.passed is False]
    assert any("not complete" in detail for check in failed for detail in check.details)


CODECS = [None, {"id": "zstd", "level": 1}, {"id": "gzip"}, {"id": "zlib"}, {"id": "blosc"}]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec and codec["id"])
def test_every_cut_of_a_chunk_in_a_folder_is_refused(tmp_path, codec):
    source = save_zarr(tmp_path / "linen", codec)
    chunk = source / "params.a.kernel" / "2"
    whole = chunk.read_bytes()
    # What zlib has encoded states no length: of it only a missing or an empty file is noticed.
    lengths = range(0, len(whole), 1 + len(whole) // 40) if codec != {"id": "zlib"} else [0]
    for length in lengths:
        chunk.write_bytes(whole[:length])
        assert "params.a.kernel/2" in refused(source)
    chunk.unlink()
    assert "the array `params/a/kernel` has no chunk 2" in refused(source)
    os.mkfifo(chunk)
    assert "params.a.kernel/2 is neither a file nor a folder" in refused(source)
    replace(chunk, lambda path: path.write_bytes(whole))
    convert(source, tmp_path / "nnx", "nnx")


def test_chunks_of_fill_values_that_an_old_writer_left_out_are_said(tmp_path, capsys):
    source = save_zarr(tmp_path / "linen", None, fill_value=0)
    (source / "params.a.kernel" / "2").unlink()
    assert main(["run", str(source), str(tmp_path / "nnx"), "--to", "nnx"]) == 0
    assert "1 arrays have chunks that are not stored" in capsys.readouterr().out


def test_a_folder_that_leads_round_in_a_circle_is_refused(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").symlink_to(tmp_path / "a")
    with pytest.raises(StoreError, match="is a symbolic link to a folder above it"):
        files_below(tmp_path)


def enlarged(metadata):
    """Metadata of an array, as JSON, that says it has one chunk of 16 TB."""
    return json.dumps({**json.loads(metadata), "shape": [1 << 42], "chunks": [1 << 42]}).encode()


def test_a_shape_that_its_bytes_cannot_hold_is_refused(source):
    tree = ocdbt.read(source)
    entries = tree["params.a.kernel"]
    entries[".zarray"] = enlarged(ocdbt.fetch(source, entries[".zarray"]))
    ocdbt_writing.write(source, tree)
    assert "bytes cannot hold a chunk of 17592186044416" in refused(source)


def test_a_shape_that_the_bytes_of_a_folder_cannot_hold_is_refused(tmp_path):
    source = save_zarr(tmp_path / "linen", {"id": "zstd", "level": 1})
    path = source / "params.a.bias" / ".zarray"
    path.write_bytes(enlarged(path.read_bytes()))
    assert "bytes cannot hold a chunk of 17592186044416" in refused(source)


@pytest.mark.parametrize("shape", [[1 << 42], [3, 1 << 42], [1 << 42, 0]])
def test_a_shape_of_more_chunks_than_memory_holds_is_counted_one_by_one(tmp_path, shape):
    metadata = fresh_metadata(Spec(shape, "float32"), zarr3=False)
    metadata["chunks"] = [1] * len(shape)
    leaf = Leaf((Key("a", DICT),), "np.ndarray", metadata, stored="a")
    item = Item(tmp_path, (leaf,), {}, {"a": {}})
    if 0 in shape:
        assert check_complete([item]) == []
    else:
        with pytest.raises(StoreError, match="has no chunk 0"):
            check_complete([item])
    assert source_grid(leaf) is None or 0 in shape
