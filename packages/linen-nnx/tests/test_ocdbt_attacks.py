"""A tree that was made to break its reader is refused at once: its checksums are all right."""

import time
import tracemalloc
from pathlib import Path

import pytest
from backports import zstd

from linen_nnx.disk import ocdbt, ocdbt_writing

_MIB = 1 << 20


def sealed_node(body: bytes) -> bytes:
    return ocdbt_writing.sealed(ocdbt.NODE_MAGIC, body)


def manifest(root: ocdbt.Child, height: int) -> bytes:
    """A manifest whose only version has this root."""
    config = [bytes(16), b"\0", ocdbt_writing.varints([1024, 100_000_000]), b"\4\1", bytes(4)]
    version = [b"\1\1", bytes([height]), ocdbt_writing.children([root], [root.ref.file]), bytes(9)]
    table = ocdbt_writing.file_table([root.ref.file])
    return ocdbt_writing.sealed(ocdbt.MANIFEST_MAGIC, b"".join([*config, table, *version]))


def store(folder: Path, node: bytes, height: int = 0) -> Path:
    """A store of one node."""
    (folder / "d").write_bytes(node)
    root = ocdbt.Child(ocdbt.Ref("d", 0, len(node)), keys=1)
    (folder / ocdbt.MANIFEST).write_bytes(manifest(root, height))
    return folder


def refused(folder: Path) -> str:
    """Why a store is refused; it must take less than 2 s and 256 MiB."""
    start = time.process_time()
    with pytest.raises(ValueError, match=r"."):
        ocdbt.read(folder)
    assert time.process_time() - start < 2
    tracemalloc.start()  # which makes everything slower
    with pytest.raises(ValueError, match=r".") as caught:
        ocdbt.read(folder)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 256 * _MIB
    return str(caught.value)


def inner_node(height: int, children: list[ocdbt.Ref]) -> bytes:
    """A node above some others, with keys `a`, `b`, ..."""
    keys = [bytes([97 + number]) for number in range(len(children))]
    entries = [(key, ocdbt.Child(ref, keys=1)) for key, ref in zip(keys, children, strict=True)]
    return ocdbt_writing.node(height, entries)


def test_a_node_that_refers_to_itself_is_refused(tmp_path):
    itself = ocdbt.Ref("d", 0, 0)
    for _ in range(8):  # until the length that it states is the one that it has
        node = inner_node(5, [itself])
        itself = ocdbt.Ref("d", 0, len(node))
    assert "two nodes refer to the node" in refused(
        store(tmp_path, inner_node(5, [itself]), height=5)
    )


def test_a_tree_of_sixty_levels_whose_nodes_share_their_children_is_refused(tmp_path):
    leaf = ocdbt_writing.node(0, [(b"x", b"value")])
    content, below = leaf, ocdbt.Ref("d", 0, len(leaf))
    for height in range(1, 61):
        node = inner_node(height, [below, below])
        below = ocdbt.Ref("d", len(content), len(node))
        content += node
    (tmp_path / "d").write_bytes(content)
    (tmp_path / ocdbt.MANIFEST).write_bytes(manifest(ocdbt.Child(below, keys=2**60), 60))
    assert "two nodes refer to the node at byte 0" in refused(tmp_path)


def test_a_tree_that_is_too_high_is_refused(tmp_path):
    node = inner_node(200, [ocdbt.Ref("d", 0, 9)])
    assert "height 200, expected at most 64" in refused(store(tmp_path, node, height=200))


def test_a_node_that_unpacks_to_a_gigabyte_is_refused(tmp_path):
    packer = zstd.ZstdCompressor()
    packed = [packer.compress(bytes(16 * _MIB)) for _ in range(64)]
    content = b"\0\1" + b"".join([*packed, packer.flush()])
    assert len(content) < 2 * _MIB
    content = ocdbt.NODE_MAGIC + (len(content) + 16).to_bytes(8, "little") + content
    node = content + ocdbt.google_crc32c.value(content).to_bytes(4, "little")
    assert "decodes to more than 104857600 bytes" in refused(store(tmp_path, node))


def test_keys_that_repeat_a_megabyte_each_are_refused(tmp_path):
    count, long = 100_000, 1_000_000
    columns = [b"\0", b"\0", ocdbt_writing.varints([count])]  # the height, no file, the entries
    columns += [
        ocdbt_writing.varints([long] * (count - 1)),
        ocdbt_writing.varints([long] + [1] * (count - 1)),
    ]
    node = sealed_node(b"".join([*columns, b"a" * (long + count - 1)]))
    assert "decodes to more than 268435456 bytes" in refused(store(tmp_path, node))


@pytest.mark.parametrize("count", [2**20, 2**40, 2**63, 2**64 - 1])
def test_more_entries_than_bytes_are_refused(tmp_path, count):
    node = sealed_node(b"\0\0" + ocdbt_writing.varints([count]) + bytes(100))
    assert f"lists {count} things in 100 bytes" in refused(store(tmp_path, node))


def test_a_number_without_an_end_is_refused(tmp_path):
    node = sealed_node(b"\0\0" + b"\xff" * 1000)
    assert "a number that ends too early, or takes over 64 bits" in refused(store(tmp_path, node))


@pytest.mark.parametrize("place", [2**31, 2**63, 2**64 - 1])
def test_a_place_beyond_the_end_of_its_file_is_refused(tmp_path, place):
    (tmp_path / "d").write_bytes(b"short")
    root = ocdbt.Child(ocdbt.Ref("d", place, 100), keys=1)
    (tmp_path / ocdbt.MANIFEST).write_bytes(manifest(root, 0))
    assert refused(tmp_path) in {
        f"d: it ends before byte {place + 100}",
        "the tree has 0 keys, expected 1 by its manifest",  # 2**64 - 1 stands for an empty tree
    }


def test_a_file_that_is_none_of_the_table_is_refused(tmp_path):
    body = b"\0\0\1" + b"\1" + b"a" + b"\1\1" + b"\7" + b"\0"  # one key, in file 7 of none
    assert "file 7 of 0" in refused(store(tmp_path, sealed_node(body)))
