"""Files: trees of msgpack leaf by leaf, shards with their index, npz; pickles are refused."""

import json
import pickle
import shutil
from typing import Any

import flax.serialization as serialization
import jax
import jax.numpy as jnp
import ml_dtypes
import msgpack
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from formats_table import DATA, shards, write_zarr
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from linen_nnx import RuleBook
from linen_nnx.cli import main
from linen_nnx.disk import msgpack_tree
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.convert import TargetError, convert
from linen_nnx.disk.finding import find
from linen_nnx.disk.leaves import DICT, SEQUENCE
from linen_nnx.disk.ranges import FileArray
from linen_nnx.proof.verify import verify

DTYPES = [
    "float32", "float16", "float64", "bfloat16", "float8_e4m3fn", "int8", "int64", "uint32",
    "bool", "complex64",
]  # fmt: skip


def leaf(dtype, shape=(2, 3)):
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def whole(tree):
    """A tree as it was read, with its arrays in memory."""
    if isinstance(tree, dict):
        return {key: whole(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [whole(value) for value in tree]
    return tree.read() if isinstance(tree, FileArray) else tree


def same(left, right):
    """Whether two trees hold the same types and bits."""
    if isinstance(left, dict):
        keys = isinstance(right, dict) and list(left) == list(right)
        return keys and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list):
        lists = isinstance(right, list) and len(left) == len(right)
        return lists and all(map(same, left, right))
    if isinstance(left, np.ndarray | np.generic):
        left, right = np.asarray(left), np.asarray(right)
        forms = left.dtype == right.dtype and left.shape == right.shape
        return forms and left.tobytes() == right.tobytes()
    return type(left) is type(right) and (left == right or left != left)


ARRAYS = st.builds(leaf, st.sampled_from(DTYPES), st.sampled_from([(), (0,), (3,), (2, 3)]))
LEAVES = st.one_of(
    ARRAYS,
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=40),
)
KEYS = st.text(min_size=1, max_size=40).filter(lambda text: "\0" not in text)
TREES = st.recursive(LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=6)
WIDE = {f"{'key' * (n % 300)}{n}": n for n in range(70_000)}  # lengths of all sizes


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file that every example of a property writes anew."""
    return tmp_path_factory.mktemp("file") / "tree.msgpack"


@example(WIDE)
@example({str(n): n for n in range(20)})
@given(st.dictionaries(KEYS, TREES, max_size=3))
def test_what_flax_writes_is_read_as_flax_reads_it(path, tree):
    path.write_bytes(serialization.msgpack_serialize(tree))
    assert same(whole(msgpack_tree.read(path)), serialization.msgpack_restore(path.read_bytes()))


@given(st.dictionaries(KEYS, TREES, max_size=3))
def test_what_is_written_flax_reads_back(path, tree):
    msgpack_tree.write(path, tree)
    assert same(serialization.msgpack_restore(path.read_bytes()), tree)


@given(TREES.map(lambda tree: [tree, [1, [], tree]]))
def test_lists_of_any_form_are_read(path, tree):
    path.write_bytes(serialization.msgpack_serialize(tree))
    assert same(whole(msgpack_tree.read(path)), serialization.msgpack_restore(path.read_bytes()))


def test_large_arrays_are_cut_and_joined_as_flax_does(tmp_path, monkeypatch):
    tree = {"a": leaf("float32", (5, 7)), "b": {"c": leaf("bfloat16", (40,))}}
    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 16)
    monkeypatch.setattr(msgpack_tree, "_CHUNK", 16)
    theirs, ours = tmp_path / "theirs.msgpack", tmp_path / "ours.msgpack"
    theirs.write_bytes(serialization.msgpack_serialize(tree))
    msgpack_tree.write(ours, tree)
    assert b"__msgpack_chunked_array__" in theirs.read_bytes()
    assert same(whole(msgpack_tree.read(theirs)), tree)
    assert same(serialization.msgpack_restore(ours.read_bytes()), tree)


def test_each_leaf_keeps_what_it_is(tmp_path):
    tree = {
        "layers": [leaf("float32"), leaf("float32")],
        "uneven": [leaf("int32", (2,)), leaf("int32", (3,))],
        "name": "a text",
        "nothing": None,
        "epoch": 3,
        "rate": 0.5,
        "on": True,
        "empty": {},
        "none_in_it": [],
    }
    (tmp_path / "a.msgpack").write_bytes(serialization.msgpack_serialize(tree))
    leaves = {one.path: one for one in find(tmp_path / "a.msgpack").leaves}
    assert {path: one.value_type for path, one in leaves.items()} == {
        "layers/0": "np.ndarray", "layers/1": "np.ndarray",
        "uneven/0": "np.ndarray", "uneven/1": "np.ndarray",
        "name": "string", "nothing": "None", "epoch": "scalar", "rate": "scalar", "on": "scalar",
        "empty": "Dict", "none_in_it": "List",
    }  # fmt: skip
    assert [key.kind for key in leaves["layers/1"].keys] == [DICT, SEQUENCE]
    assert leaves["name"].string == "a text"
    assert str(leaves["layers/0"].spec) == "float32[2,3]"
    assert [str(leaves[name].spec) for name in ("epoch", "rate", "on")] == [
        "int64[]", "float64[]", "bool[]",
    ]  # fmt: skip


def packed(value):
    return msgpack.packb(value, strict_types=True)


def array_of(shape, dtype, data):
    return msgpack.ExtType(1, packed([shape, dtype, data]))


DAMAGED = {
    "empty": b"",
    "one array": packed(array_of([1], "int8", b"1")),
    "cut off": serialization.msgpack_serialize({"a": leaf("float32")})[:-1],
    "more behind": packed({"a": 1}) + b"\x01",
    "too few bytes": packed({"a": array_of([9], "int8", b"1")}),
    "negative": packed({"a": array_of([-1], "int8", b"1")}),
    "huge": packed({"a": array_of([2**62, 2**62], "int8", b"1")}),
    "objects": packed({"a": array_of([1], "object", b"12345678")}),
    "unknown dtype": packed({"a": array_of([1], "float9", b"1")}),
    "unknown extension": packed({"a": msgpack.ExtType(9, b"1")}),
    "raw bytes": packed({"a": b"raw"}),
    "twice": b"\x82\xa1a\x01\xa1a\x02",
    "twice as a number": b"\x82\xa11\x01\x01\x02",
    "empty key": packed({"": 1}),
    "slash": packed({"a/b": 1}),
    "deep": b"\x81\xa1a" * 5000 + b"\x01",
    "billions announced": b"\xdf\xff\xff\xff\xff\xa1a",
    "too large": packed({"a": 2**64 - 1}),
    "not UTF-8": b"\x81\xa1\xff\x01",
    "no chunks": packed({"a": {"__msgpack_chunked_array__": True, "shape": {}, "chunks": {}}}),
    "pickle": pickle.dumps({"a": 1}),
    "several processes": packed({"a": "//GDAPlaceholder:a"}),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_by_name(tmp_path, name):
    path = tmp_path / "a.msgpack"
    path.write_bytes(DAMAGED[name])
    with pytest.raises(StoreError, match=r"a\.msgpack"):
        _ = find(path).leaves


class Runs:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize(
    "name",
    ["a.pkl", "a.pickle", "a.bin", "a.pt", "a.ckpt", "a.npy", "a.msgpack", "a.npz", "checkpoint_3"],
)
def test_a_pickle_is_refused_and_runs_nothing(tmp_path, name, capsys):
    path, trace = tmp_path / name, tmp_path / "ran"
    if name == "a.npz":
        np.savez(path, a=np.array([Runs(trace)], object))
    else:
        path.write_bytes(pickle.dumps({"a": Runs(trace)}))
    assert main(["inspect", str(path)]) == 1
    assert str(path) in capsys.readouterr().err
    assert not trace.exists()


MODEL = {
    "params": {
        "fc": {"kernel": leaf("float32"), "bias": leaf("bfloat16", (3,))},
        "out": {"kernel": leaf("float32", (3, 1))},
    }
}
RULES = RuleBook.from_dict(
    {
        "version": 1,
        "rules": [
            {"linen": "params/fc/{leaf}", "nnx": "up/{leaf}"},
            {"linen": "params/out/{leaf}", "nnx": "down/{leaf}"},
        ],
    }
)


def arrays(path):
    source = find(path)
    read = source.reader.read(source.leaves)
    return {leaf.path: array for leaf, array in zip(source.leaves, read, strict=True)}


@pytest.mark.parametrize("separator", ["/", "."])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_the_remedy_for_pickles_works_and_bfloat16_is_said(tmp_path, separator, save, capsys):
    save(tmp_path / "a.npz", **flatten_dict(MODEL, sep=separator))
    found = arrays(tmp_path / "a.npz")
    assert found["params/fc/bias"].dtype == ml_dtypes.bfloat16
    assert same(found, flatten_dict(MODEL, sep="/"))
    assert main(["inspect", str(tmp_path / "a.npz")]) == 0
    assert "read as that" in capsys.readouterr().out


def test_an_npz_is_converted(tmp_path):
    np.savez(tmp_path / "a.npz", **flatten_dict(MODEL, sep="/"))
    convert(tmp_path / "a.npz", tmp_path / "out", "nnx", rules=RULES)
    assert same(arrays(tmp_path / "out")["up/bias/value"], MODEL["params"]["fc"]["bias"])


def save_msgpack(flat, path):
    tree = {}
    for name, array in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = array
    path.write_bytes(serialization.msgpack_serialize(tree))


SHARDS = {"msgpack": ("/", save_msgpack), "safetensors": (".", save_file)}


@pytest.fixture(params=SHARDS)
def sharded(request, tmp_path):
    """A folder of two shards, their kind, and their index."""
    separator, save = SHARDS[request.param]
    folder = shards(tmp_path, flatten_dict(MODEL, sep=separator), request.param, save)
    return folder, request.param, next(folder.glob("*.index.json"))


def test_shards_are_read_as_one_by_folder_or_index(sharded):
    folder, _, index = sharded
    expected = flatten_dict(MODEL, sep="/")
    for path in (folder, index):
        found = arrays(path)
        assert {name: same(found[name], expected[name]) for name in expected} == dict.fromkeys(
            found, True
        )


def test_a_missing_shard_is_named(sharded):
    folder, kind, _ = sharded
    (shard,) = folder.glob(f"*-00002-of-00002.{kind}")
    shard.unlink()
    with pytest.raises(StoreError, match=f"not there: {shard.name}"):
        arrays(folder)


def test_one_shard_alone_is_no_checkpoint_and_the_remedy_works(sharded):
    folder, kind, _ = sharded
    (shard,) = folder.glob(f"*-00001-of-00002.{kind}")
    with pytest.raises(StoreError, match="name its folder"):
        arrays(shard)
    assert arrays(folder)


def test_names_that_index_and_shards_do_not_share_are_named(sharded):
    folder, _, index = sharded
    content = json.loads(index.read_text())
    gone, shard = content["weight_map"].popitem()
    content["weight_map"]["params/new"] = shard
    index.write_text(json.dumps(content))
    with pytest.raises(StoreError) as caught:
        arrays(folder)
    assert "`params/new` is not in" in str(caught.value)
    assert f"`{gone}` in {shard} is not listed" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": "../a.msgpack"}}',
             '{"weight_map": {"a": 3}}', '{"weight_map": [3]}'],
)  # fmt: skip
def test_a_damaged_index_is_refused(tmp_path, text):
    (tmp_path / "flax_model.msgpack.index.json").write_text(text)
    with pytest.raises(StoreError, match=r"flax_model\.msgpack\.index\.json"):
        arrays(tmp_path)


def test_several_files_in_a_folder_are_named(tmp_path):
    for name in ("model.safetensors", "flax_model.msgpack"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(StoreError, match=r"Name a file[^:]*: flax_model\.msgpack, model\.safe"):
        find(tmp_path)


def test_an_index_that_is_named_itself_leads_to_its_folder():
    with pytest.raises(StoreError, match="name its folder"):
        find(DATA / "orbax_0.2.6_pytree" / "checkpoint")


def test_an_index_with_arrays_in_it_and_beside_it_is_read_and_converted(tmp_path):
    """As Orbax up to 0.4 wrote where some leaves were aggregated, and T5X small ones."""
    folder = tmp_path / "in"
    write_zarr(folder / "params.fc.kernel", MODEL["params"]["fc"]["kernel"], {"id": "gzip"})
    index = {
        "params": {
            "fc": {"kernel": "PLACEHOLDER://params.fc.kernel", "bias": leaf("float32", (3,))},
            "out": {"kernel": leaf("float32", (3, 1))},
        },
        "step": 7,
    }
    (folder / "checkpoint").write_bytes(serialization.msgpack_serialize(index))
    convert(folder, tmp_path / "out", "nnx", rules=RULES)
    found = arrays(tmp_path / "out")
    assert same(found["model/up/kernel/value"], MODEL["params"]["fc"]["kernel"])
    assert same(found["model/up/bias/value"], leaf("float32", (3,)))
    assert found["step"] == 7


@pytest.mark.parametrize("name", ["../secret", "..", "", "a/b"])
def test_an_index_stays_in_its_folder(tmp_path, name):
    index = {"params": {"kernel": f"PLACEHOLDER://{name}"}}
    (tmp_path / "checkpoint").write_bytes(serialization.msgpack_serialize(index))
    with pytest.raises(StoreError, match="none of arrays in its folder"):
        _ = find(tmp_path).leaves


def test_an_index_that_lacks_an_array_names_it(tmp_path):
    shutil.copytree(DATA / "orbax_0.2.6_pytree", tmp_path / "in")
    shutil.rmtree(tmp_path / "in" / "params.fc.kernel")
    with pytest.raises(StoreError, match=r"lacks 1 of its arrays[^:]*: `params\.fc\.kernel`"):
        _ = find(tmp_path / "in").leaves


def test_names_of_shardings_were_once_plain():
    leaves = {leaf.path: leaf for leaf in find(DATA / "orbax_0.4.1_sharded").leaves}
    assert "NamedSharding" in leaves["params/fc/kernel"].sharding


def test_a_file_of_tensorflow_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoint").write_text('model_checkpoint_path: "model-3"\n')
    with pytest.raises(StoreError, match="no checkpoint found"):
        find(tmp_path)


def test_a_table_of_steps_in_files_is_a_folder_of_steps(tmp_path):
    for step in (3, 10):
        tree = {"params": {"a": jnp.full(2, float(step))}}
        (tmp_path / f"checkpoint_{step}").write_bytes(serialization.to_bytes(tree))
    assert arrays(tmp_path)["params/a"][0] == 10
    assert find(tmp_path, step=3).folder.name == "checkpoint_3"


def train_state(seed):
    """A TrainState after one step: a chain with empty states, statistics, a text, a None."""
    params = {
        "fc": {"kernel": jnp.full((2, 3), seed + 1.0), "bias": jnp.zeros(3, jnp.bfloat16)},
        "out": {"kernel": jnp.full((3, 1), seed + 2.0)},
    }
    state = Whole.create(apply_fn=None, params=params, tx=TX, note="a text", nothing=None)
    return state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))


MASK = {"fc": {"kernel": True, "bias": False}, "out": {"kernel": True}}
TX = optax.chain(optax.clip(1.0), optax.adam(0.1), optax.masked(optax.trace(0.9), MASK))


class Whole(TrainState):
    note: str
    nothing: Any


def assert_equal(back, state):
    """The same containers, the same bits, the same text."""
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for restored, leaf in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        text = isinstance(leaf, str)
        assert restored == leaf if text else same(np.asarray(restored), np.asarray(leaf))


def test_a_whole_state_goes_through_msgpack_there_and_back(tmp_path):
    state = train_state(1)
    source = tmp_path / "state.msgpack"
    source.write_bytes(serialization.to_bytes(state))
    convert(source, tmp_path / "nnx", "nnx", rules=RULES)
    convert(tmp_path / "nnx", tmp_path / "back.msgpack", "linen")
    back = serialization.from_bytes(train_state(5), (tmp_path / "back.msgpack").read_bytes())
    assert_equal(back, state)
    checks = verify(tmp_path / "nnx", tmp_path / "back.msgpack", "linen")
    assert [check.name for check in checks if check.passed is False] == []


def test_a_whole_state_of_orbax_is_written_as_flax_restores_it(tmp_path):
    state = train_state(1)
    ocp.PyTreeCheckpointer().save(tmp_path / "linen", state)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=RULES)
    convert(tmp_path / "nnx", tmp_path / "back.msgpack", "linen")
    back = serialization.from_bytes(train_state(5), (tmp_path / "back.msgpack").read_bytes())
    assert_equal(back, state)


def test_npz_is_read_and_not_written(tmp_path):
    np.savez(tmp_path / "a.npz", **flatten_dict(MODEL, sep="/"))
    with pytest.raises(TargetError, match=r"\.npz is read and not written[\s\S]*\.safetensors"):
        convert(tmp_path / "a.npz", tmp_path / "out.npz", "nnx", rules=RULES)
    convert(tmp_path / "a.npz", tmp_path / "out.safetensors", "nnx", rules=RULES)
