"""What tensorstore wrote is read, and what is written is read by tensorstore, key for key."""

import tempfile
from pathlib import Path

import google_crc32c
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from linen_nnx.disk import ocdbt, ocdbt_writing

KEYS = st.text("ab.é/0", min_size=1, max_size=9).filter(lambda key: key[0] != "/" != key[-1])
VALUES = st.binary(max_size=40) | st.integers(1, 3000).map(bytes)  # in the tree, or outside of it
PARTS = st.lists(st.dictionaries(KEYS, VALUES, min_size=1, max_size=40), min_size=1, max_size=3)
CONFIGS = st.fixed_dictionaries(
    {
        "compression": st.sampled_from([None, {"id": "zstd"}, {"id": "zstd", "level": 9}]),
        "max_decoded_node_bytes": st.sampled_from([60, 500, 100_000_000]),  # many nodes, or one
        "max_inline_value_bytes": st.sampled_from([0, 20, 1024]),
    }
)


def open_store(path, context, config=None):
    base = {"driver": "file", "path": f"{path}/"}
    spec = {"driver": "ocdbt", "base": base, "config": config or {}}
    return ts.KvStore.open(spec, context=context).result()


def save(path, parts, config):
    """A store of a few processes, merged as Orbax does it: `parts` are what each has written."""
    context = ts.Context()
    whole = open_store(path, context, config)
    for number, part in enumerate(parts):
        process = open_store(path / f"ocdbt.process_{number}", context, config)
        with ts.Transaction() as transaction:
            for key, value in part.items():
                process.with_transaction(transaction)[key] = value
        process.experimental_copy_range_to(whole).result()  # one version each


def by_tensorstore(path):
    store = open_store(path, ts.Context())
    return {key.decode(): store.read(key).result().value for key in store.list().result()}


def by_us(path):
    return {
        f"{name}/{rest}" if rest else name: ocdbt.fetch(path, value)
        for name, values in ocdbt.read(path).items()
        for rest, value in values.items()
    }


@settings(max_examples=40, deadline=None)
@given(PARTS, CONFIGS)
def test_what_tensorstore_wrote_is_read(parts, config):
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder), parts, config)
        assert by_us(Path(folder)) == by_tensorstore(folder)


@pytest.mark.long
@settings(max_examples=40, deadline=None)
@given(PARTS, CONFIGS, st.sampled_from([2, 3, 1000]))
def test_what_is_written_is_read_by_tensorstore(parts, config, arity):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ocdbt_writing, "_ARITY", arity)
        save(Path(folder), parts, config)
        before = by_tensorstore(folder)
        tree = {
            name: {rest or "x": value for rest, value in values.items()}
            for name, values in ocdbt.read(Path(folder)).items()
        }
        ocdbt_writing.write(Path(folder), tree)
        assert ocdbt.read(Path(folder)) == tree
        after = by_tensorstore(folder)
        assert sorted(after.values()) == sorted(before.values())
        assert after == by_us(Path(folder))
        (version,) = ts.ocdbt.dump(ts.KvStore.open(f"file://{folder}/").result()).result()[
            "versions"
        ]
        assert version["root"]["statistics"]["num_keys"] == len(after)


def test_an_empty_tree_is_read_and_written(tmp_path):
    save(tmp_path, [{"a": b"x"}], {})
    open_store(tmp_path, ts.Context()).delete_range(ts.KvStore.KeyRange()).result()
    assert ocdbt.read(tmp_path) == {}
    ocdbt_writing.write(tmp_path, {})
    assert by_tensorstore(tmp_path) == ocdbt.read(tmp_path) == {}


@pytest.fixture
def written(tmp_path):
    ocdbt_writing.write(
        tmp_path, {f"a{n}": {".zarray": b"{}", "0": ocdbt.Ref("d/x", n, 1)} for n in range(9)}
    )
    return tmp_path


def test_every_flipped_bit_and_every_cut_of_a_tree_is_found(written):
    (node,) = (written / "d").iterdir()
    for path in (written / ocdbt.MANIFEST, node):
        intact = path.read_bytes()
        for bit in range(8 * len(intact)):
            content = bytearray(intact)
            content[bit // 8] ^= 1 << bit % 8
            path.write_bytes(content)
            with pytest.raises(ValueError, match=r"manifest\.ocdbt|a node"):
                ocdbt.read(written)
        for length in range(len(intact)):
            path.write_bytes(intact[:length])
            with pytest.raises(ValueError, match=r"manifest\.ocdbt|a node|ends before byte"):
                ocdbt.read(written)
        path.write_bytes(intact)
    assert len(ocdbt.read(written)) == 9


def test_what_is_not_known_is_named(written):
    path = written / ocdbt.MANIFEST
    intact = path.read_bytes()
    for place, value, seen in ((12, 1, "version 1 and"), (13, 2, "compression 2, known")):
        content = bytearray(intact[:-4])
        content[place] = value
        path.write_bytes(content + google_crc32c.value(bytes(content)).to_bytes(4, "little"))
        with pytest.raises(ValueError, match=seen):
            ocdbt.read(written)
    ocdbt_writing.write(written, {"a": {"0": ocdbt.Ref("d/../../x", 0, 1)}})
    with pytest.raises(ValueError, match=r"'d/../../x', which lies outside of the store"):
        ocdbt.read(written)
    numbered = {"manifest_kind": "numbered"}
    open_store(written / "numbered", ts.Context(), numbered).write("a", b"x").result()
    with pytest.raises(ValueError, match=r"manifest_kind 1, expected 0"):
        ocdbt.read(written / "numbered")


def test_a_tree_of_many_values_is_cut_into_nodes_that_are_not_too_large(tmp_path, monkeypatch):
    monkeypatch.setattr(ocdbt_writing, "_FULL", 500)
    tree = {f"a{n}": {".zarray": bytes(100), "0": ocdbt.Ref("d/x", n, 1)} for n in range(100)}
    ocdbt_writing.write(tmp_path, tree)
    assert ocdbt.read(tmp_path) == tree
    (version,) = ts.ocdbt.dump(ts.KvStore.open(f"file://{tmp_path}/").result()).result()["versions"]
    assert version["root_height"] > 0
    assert version["root"]["statistics"]["num_keys"] == 200
