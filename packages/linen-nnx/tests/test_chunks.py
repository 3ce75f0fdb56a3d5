"""Naming stored chunks anew gives what running the actions gives; small ones are read as large."""

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from linen_nnx.book.actions import Gather, Permute, Reform, Spread
from linen_nnx.book.specs import Spec
from linen_nnx.disk.chunks import apply
from linen_nnx.disk.finding import find
from linen_nnx.disk.leaves import DICT, Key, Leaf
from linen_nnx.disk.stream import ItemReader, _read_small, open_array
from linen_nnx.disk.zarr_metadata import fresh_metadata


def metadata_of(shape, chunk, zarr3):
    """Metadata of an array that Orbax saved in shards of shape `chunk`."""
    metadata = fresh_metadata(Spec(tuple(chunk), "int32"), zarr3)
    return {**metadata, "shape": list(shape)}


@st.composite
def stored_arrays(draw):
    """Equal-shaped arrays, their chunk shape, and actions that fit them."""
    rank = draw(st.integers(1, 3))
    shape = draw(st.lists(st.integers(1, 6), min_size=rank, max_size=rank))
    start, chunk = shape, [draw(st.integers(1, size)) for size in shape]
    count = draw(st.integers(1, 4))
    actions, length = [], count
    for _ in range(draw(st.integers(1, 3))):
        axis = draw(st.integers(0, max(len(shape) - 1, 0)))
        kind = draw(st.sampled_from(["stack", "concat", "cut", "unstack", "reshape"]))
        if kind == "stack":
            axis = draw(st.integers(0, len(shape)))
            actions.append(Gather("stack", axis, length, 1))
            shape, length = [*shape[:axis], length, *shape[axis:]], 1
        elif kind == "concat" and shape:
            actions.append(Gather("concat", axis, length, 1))
            shape = [*shape[:axis], shape[axis] * length, *shape[axis + 1 :]]
            length = 1
        elif kind == "cut" and shape and shape[axis] % 2 == 0:
            half = shape[axis] // 2
            actions.append(Spread("concat", axis, (half, half)))
            shape = [*shape[:axis], half, *shape[axis + 1 :]]
            length *= 2
        elif kind == "unstack" and shape:
            actions.append(Spread("stack", axis, (1,) * shape[axis]))
            length *= shape[axis]
            shape = [*shape[:axis], *shape[axis + 1 :]]
        elif kind == "reshape":
            shape = [int(np.prod(shape))]
            actions.append(Reform((tuple(shape),) * length))
    return count, start, chunk, actions, draw(st.booleans())


@settings(max_examples=300)
@given(stored_arrays())
def test_chunks_named_anew_decode_to_what_the_actions_give(case):
    count, shape, chunk, actions, zarr3 = case
    context = ts.Context()
    store = ts.KvStore.open("memory://", context=context).result()
    arrays, leaves = [], []
    for number in range(count):
        array = np.arange(number * 1000, number * 1000 + np.prod(shape), dtype=np.int32)
        array = array.reshape(shape)
        name, metadata = f"old{number}", metadata_of(shape, chunk, zarr3)
        open_array(store, name, metadata, context, create=True).result().write(array).result()
        key = "zarr.json" if zarr3 else ".zarray"
        metadata = json.loads(store.read(f"{name}/{key}").result().value)
        arrays.append(array)
        leaves.append(Leaf((Key(name, DICT),), "np.ndarray", zarr=metadata, stored=name))
    grids = apply(actions, leaves)
    if grids is None:
        return  # what is refused is tested below
    for action in actions:
        arrays = action.run(arrays)
    for number, (grid, array) in enumerate(zip(grids, arrays, strict=True)):
        name = f"new{number}"
        store.write(f"{name}/{key}", json.dumps(grid.metadata)).result()
        for place, ref in grid.chunks.items():
            value = store.read(f"{ref.array}/{ref.key}").result().value
            store.write(f"{name}/{grid.key(place)}", value).result()
        found = open_array(store, name, grid.metadata, context).result().read().result()
        assert found.dtype == array.dtype
        assert found.tobytes() == array.tobytes()


def leaf(shape, chunk, zarr3=False):
    metadata = metadata_of(shape, chunk, zarr3)
    return Leaf((Key("a", DICT),), "np.ndarray", zarr=metadata, stored="a")


def test_what_must_be_decoded_is_left_to_the_stream():
    assert apply([Permute((1, 0))], [leaf([4, 4], [4, 4])]) is None
    assert apply([Spread("stack", 0, (1, 1))], [leaf([2, 4], [2, 4])]) is None
    assert apply([Spread("concat", 0, (1, 3))], [leaf([4], [2])]) is None
    assert apply([Gather("concat", 0, 2, 1)], [leaf([3], [2])] * 2) is None
    assert apply([Reform(((4,),))], [leaf([2, 2], [1, 2])]) is None
    assert apply([Gather("stack", 0, 2, 1)], [leaf([4], [4]), leaf([4], [2])]) is None


def test_orbax_arrays_of_one_chunk_stack_cut_and_reshape_without_decoding():
    whole = leaf([4, 6], [4, 6])
    assert apply([Gather("stack", 1, 2, 1)], [whole, whole]) is not None
    assert apply([Gather("concat", 0, 2, 1)], [whole, whole]) is not None
    assert apply([Reform(((24,),))], [whole]) is not None
    stacked = leaf([3, 4], [1, 4], zarr3=True)
    assert apply([Spread("stack", 0, (1, 1, 1))], [stacked]) is not None


# Arrays of one small chunk, which are decoded without tensorstore

DTYPES = ("float32", "float64", "bfloat16", "int8", "uint8", "int64", "bool", "complex64", "int4")
SHAPES = ((), (3,), (1, 1), (5, 1, 4), (300, 400))


@pytest.mark.parametrize("in_tree", [True, False], ids=["ocdbt", "folders"])
def test_small_arrays_are_read_as_tensorstore_reads_them(tmp_path, in_tree):
    rng = np.random.default_rng(0)
    tree = {
        f"{dtype} {'x'.join(map(str, shape))}": rng.integers(0, 7, shape).astype(dtype)
        for dtype in DTYPES
        for shape in SHAPES
    }
    tree["with a scalar"] = 1.5
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=in_tree)
    ocp.Checkpointer(handler).save(tmp_path / "it", tree)
    source = find(tmp_path / "it")
    reader = ItemReader(source.items)
    leaves = source.leaves
    expected = reader._read_large(leaves)
    small = 0
    for leaf, array, other in zip(leaves, reader.read(leaves), expected, strict=True):
        assert (array.dtype, array.shape) == (other.dtype, other.shape), leaf
        assert array.tobytes() == other.tobytes(), leaf
        small += _read_small(source.items[0], leaf) is not None
    # All but booleans, int4, and those of more than 64 kB.
    assert small == 7 * 4 + 1


@pytest.mark.parametrize("what", ["flipped", "cut", "empty", "longer", "no file"])
def test_a_small_chunk_that_is_damaged_is_never_read_as_something_else(tmp_path, what):
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
    ocp.Checkpointer(handler).save(tmp_path / "it", {"a": np.arange(30.0)})
    source = find(tmp_path / "it")
    chunk = tmp_path / "it" / "a" / "0"
    data = chunk.read_bytes()
    damaged = {"flipped": bytes([data[0] ^ 1]) + data[1:], "cut": data[:-3], "empty": b""}
    chunk.unlink()
    if what != "no file":
        chunk.write_bytes(damaged.get(what, data + data))
    assert _read_small(source.items[0], source.leaves[0]) is None
