"""Every layout that people have is read, and what is written is what stock Orbax expects."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as v1
import pytest
from convert_helpers import RENAMES, bits, linen_state, nnx_state, nnx_tree, restore, save
from flax import linen as nn
from flax import nnx

from linen_nnx import RuleBook, RuleError
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.convert import convert
from linen_nnx.disk.finding import find
from linen_nnx.disk.planning import plan_conversion
from linen_nnx.proof.verify import verify

DTYPES = [
    "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "int8",
    "int32", "uint32", "bool", "complex64",
]  # fmt: skip
LAYERS = 13

BOOKS = {
    "rename": [{"linen": "params/blk_{i}/{name}", "nnx": "blocks/{i}/{name}"}],
    "stack": [
        {
            "linen": "params/blk_{i}/{name}",
            "nnx": "blocks/{name}",
            "ops": [{"op": "stack", "capture": "i", "axis": 1}],
        }
    ],
    "transpose": [
        {
            "linen": "params/blk_{i}/{name}",
            "nnx": "blocks/{i}/{name}",
            "ops": [{"op": "transpose", "perm": [1, 0]}],
        }
    ],
    "reshape": [
        {
            "linen": "params/blk_{i}/{name}",
            "nnx": "blocks/{i}/{name}",
            "ops": [{"op": "reshape", "linen": [2, 3], "nnx": [6]}],
        }
    ],
}
OPTIONS = {  # how Orbax stores an item
    "standard": lambda: ocp.StandardCheckpointer(),
    "pytree": lambda: ocp.Checkpointer(ocp.PyTreeCheckpointHandler()),
    "zarr3": lambda: ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_zarr3=True)),
    "folders": lambda: ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=False)),
    "zarr3 folders": lambda: ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_zarr3=True)
    ),
}


def book(name):
    return RuleBook.from_dict({"version": 1, "rules": BOOKS[name]})


def every_dtype():
    """Linen parameters of thirteen layers with one leaf for each dtype that Orbax saves."""
    rng = np.random.default_rng(0)

    def leaf(dtype):
        numbers = rng.integers(0, 2 if dtype == "bool" else 7, (2, 3))
        return jnp.asarray(numbers).astype(dtype)

    return {f"blk_{i}": {dtype: leaf(dtype) for dtype in DTYPES} for i in range(LAYERS)}


def tree_metadata(path):
    """What `_METADATA` says of each leaf, and the kinds of typed keys."""
    entries = json.loads((path / "_METADATA").read_text())["tree_metadata"].values()
    tree = {json.dumps(e["key_metadata"]): e["value_metadata"]["value_type"] for e in entries}
    arrays = json.loads((path / "array_metadatas" / "process_0").read_text())["array_metadatas"]
    kinds = {a["array_metadata"]["param_name"]: a["array_metadata"]["ext_metadata"] for a in arrays}
    return tree, kinds


def nested(leaves):
    tree = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = {"value": leaf}
    return tree


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rules", BOOKS)
@pytest.mark.parametrize("option", OPTIONS)
def test_every_dtype_survives_every_store_there_and_back(tmp_path, option, rules):
    params, linen, there = every_dtype(), tmp_path / "linen", tmp_path / "nnx"
    checkpointer = OPTIONS[option]()
    checkpointer.save(linen, {"params": params})
    if option == "standard":
        checkpointer.wait_until_finished()
    convert(linen, there, "nnx", rules=book(rules))
    expected = nested(
        book(rules).to_nnx(
            {f"params/{b}/{d}": x for b, ls in params.items() for d, x in ls.items()}
        )
    )
    assert bits(checkpointer.restore(there)) == bits(expected)
    assert all(check.passed is not False for check in verify(linen, there))
    convert(there, tmp_path / "back", "linen")
    assert bits(checkpointer.restore(tmp_path / "back")) == bits({"params": params})
    assert tree_metadata(tmp_path / "back") == tree_metadata(linen)


def test_typed_keys_strings_numbers_and_empty_nodes_are_carried(tmp_path):
    tree = {
        "params": {"blk_0": {"kernel": jnp.ones((2, 3))}},
        "rng": jax.random.key(3, impl="rbg"),
        "raw": jax.random.PRNGKey(1),
        "epoch": 4,
        "best": 0.5,
        "scale": np.float16(3),
        "note": "a text",
        "nothing": None,
        "empty": {},
        "step": jnp.int32(7),
    }
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    checkpointer.save(tmp_path / "linen", tree)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=book("rename"))
    restored = checkpointer.restore(tmp_path / "nnx")
    assert restored.pop("model") == {"blocks": {"0": {"kernel": {"value": pytest.approx(1)}}}}
    expected = checkpointer.restore(tmp_path / "linen")
    assert {k: v for k, v in expected.items() if k != "params"}.keys() == restored.keys()
    del expected["params"]
    assert restored.pop("note") == expected.pop("note") == "a text"
    assert bits(restored) == bits(expected)
    convert(tmp_path / "nnx", tmp_path / "back", "linen")
    assert tree_metadata(tmp_path / "back") == tree_metadata(tmp_path / "linen")


def fresh_linen():
    return linen_state(optax.adamw(1e-3))


LINEN_TREES = {
    "TrainState": lambda s: s,
    "variables": lambda s: {"params": s.params, "batch_stats": s.batch_stats},
    "params in params": lambda s: {
        "params": {"params": s.params, "batch_stats": s.batch_stats},
        "step": s.step,
    },
    "bare parameters": lambda s: s.params,
    "inside a dict": lambda s: {"model": s, "config": {"width": 3}, "data": [jnp.ones(3)]},
    "boxed": lambda s: {
        "params": jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), s.params),
        "batch_stats": s.batch_stats,
    },
    "chain as a list": lambda s: {
        "params": s.params,
        "batch_stats": s.batch_stats,
        "opt_state": [[{"count": jnp.int32(1), "mu": s.params, "nu": s.params}, None], None],
    },
    "chain as a dict": lambda s: {
        "params": s.params,
        "batch_stats": s.batch_stats,
        "opt_state": {"0": {"count": jnp.int32(1), "mu": s.params}, "1": {}},
    },
}


@pytest.mark.parametrize("name", LINEN_TREES)
def test_every_linen_tree_goes_to_nnx_and_back(tmp_path, name):
    tree = LINEN_TREES[name](fresh_linen())
    save(tmp_path / "linen", tree)
    rules = RENAMES
    if name == "bare parameters":
        rules = RuleBook(r for r in RENAMES.rules if "batch_stats" not in str(r))
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=rules)
    restored = restore(tmp_path / "nnx")
    model = restored.get("model", restored)
    assert set(model) == {"blocks", "norm", "out"}
    assert set(model["norm"]) >= {"scale", "bias"}
    convert(tmp_path / "nnx", tmp_path / "back", "linen")
    assert bits(restore(tmp_path / "back")) == bits(restore(tmp_path / "linen"))
    assert tree_metadata(tmp_path / "back") == tree_metadata(tmp_path / "linen")
    assert bits(restore(tmp_path / "back", tree)) == bits(tree)


NNX_TREES = {
    "model": lambda m, o: nnx.state(m),
    "model as a pure dict": lambda m, o: nnx.to_pure_dict(nnx.state(m)),
    "model and optimizer": lambda m, o: {"model": nnx.state(m), "optimizer": nnx.state(o)},
    "a tuple of both": lambda m, o: (nnx.state(m), nnx.state(o)),
    "other names": lambda m, o: {"net": nnx.state(m), "opt": nnx.state(o), "epoch": 3},
}


@pytest.mark.parametrize("name", NNX_TREES)
def test_every_nnx_tree_goes_to_linen_and_back(tmp_path, name):
    model, optimizer, _ = nnx_state(optax.adamw(1e-3))
    tree = NNX_TREES[name](model, optimizer)
    save(tmp_path / "nnx", tree)
    convert(tmp_path / "nnx", tmp_path / "linen", "linen", rules=RENAMES)
    restored = restore(tmp_path / "linen")
    assert set(restored["params"]) == {"blk_0", "blk_1", "blk_2", "bn", "out"}
    assert set(restored["batch_stats"]["bn"]) == {"mean", "var"}
    convert(tmp_path / "linen", tmp_path / "back", "nnx")
    assert bits(restore(tmp_path / "back")) == bits(restore(tmp_path / "nnx"))
    assert tree_metadata(tmp_path / "back") == tree_metadata(tmp_path / "nnx")


def test_stock_readers_restore_what_is_written(tmp_path):
    state = fresh_linen()
    model, optimizer, ema = nnx_state(optax.adamw(1e-3))
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx_tree(model, optimizer, ema))
    save(tmp_path / "linen", state)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=RENAMES)
    standard = restore(tmp_path / "nnx", target)
    assert jax.tree.structure(standard) == jax.tree.structure(target)
    pytree = ocp.PyTreeCheckpointer().restore(tmp_path / "nnx", item=target)
    assert bits(pytree) == bits(standard)
    assert bits(v1.load(tmp_path / "nnx", target)) == bits(standard)
    nnx.update(model, standard["model"])
    assert (model.blocks[1].kernel[...] == state.params["blk_1"]["kernel"]).all()


def test_a_manager_goes_on_in_a_converted_root(tmp_path):
    tree = {"params": fresh_linen().params, "batch_stats": fresh_linen().batch_stats}
    item = ocp.args.Composite(state=ocp.args.StandardSave(tree), data=ocp.args.JsonSave({"at": 9}))
    with ocp.CheckpointManager(tmp_path / "linen") as manager:
        manager.save(2, args=item)
        manager.save(12, args=item)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=RENAMES)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(tmp_path / "nnx", options=options) as manager:
        assert manager.all_steps() == [12]
        restored = manager.restore(12)
        assert restored.data == {"at": 9}
        manager.save(13, args=ocp.args.Composite(state=ocp.args.StandardSave(restored.state)))
        manager.save(14, args=ocp.args.Composite(state=ocp.args.StandardSave(restored.state)))
        manager.wait_until_finished()
        assert manager.all_steps() == [13, 14]


def test_a_chosen_step_is_taken_and_a_missing_one_named(tmp_path):
    with ocp.CheckpointManager(tmp_path / "linen") as manager:
        for step in (2, 9, 10):
            manager.save(step, args=ocp.args.StandardSave({"params": fresh_linen().params}))
    assert find(tmp_path / "linen").folder.name == "10"
    assert find(tmp_path / "linen", step=9).folder.name == "9"
    with pytest.raises(StoreError, match=r"has no step 3, only \[2, 9, 10\]"):
        find(tmp_path / "linen", step=3)


def test_items_that_share_one_state_are_joined(tmp_path):
    state = fresh_linen()
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        batch_stats=ocp.args.StandardSave(state.batch_stats),
        opt_state=ocp.args.StandardSave(state.opt_state),
        extra=ocp.args.StandardSave({"untouched": jnp.ones(5)}),
    )
    with ocp.CheckpointManager(tmp_path / "linen") as manager:
        manager.save(1, args=items)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=RENAMES)
    with ocp.CheckpointManager(tmp_path / "nnx") as manager:
        restored = manager.restore(1)
    assert bits(restored.extra) == bits({"untouched": jnp.ones(5)})
    assert set(restored.state) == {"model", "optimizer"}
    kernel = restored.state["optimizer"]["opt_state"]["0"]["mu"]["blocks"]["1"]["kernel"]["value"]
    assert kernel.shape == (8, 8)


def test_v1_checkpoints_are_read_and_restored(tmp_path):
    tree = {"params": fresh_linen().params, "batch_stats": fresh_linen().batch_stats}
    v1.save(tmp_path / "linen", tree)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=RENAMES)
    restored = v1.load(tmp_path / "nnx")
    assert set(restored) == {"blocks", "norm", "out"}
    convert(tmp_path / "nnx", tmp_path / "back", "linen")
    assert bits(v1.load(tmp_path / "back")) == bits(tree)


@pytest.mark.parametrize("suffix", [".msgpack", ".safetensors"])
def test_files_take_the_model_there_and_back(tmp_path, suffix):
    state = fresh_linen()
    save(tmp_path / "linen", state)
    file, nnx_file = tmp_path / f"linen{suffix}", tmp_path / f"nnx{suffix}"
    convert(tmp_path / "linen", nnx_file, "nnx", rules=RENAMES, model_only=True)
    convert(nnx_file, file, "linen", rules=RENAMES)
    assert all(c.passed is not False for c in verify(nnx_file, file, "linen", rules=RENAMES))
    convert(file, tmp_path / "orbax", "nnx", rules=RENAMES)
    restored = restore(tmp_path / "orbax", nnx.state(nnx_state(optax.adamw(1e-3))[0]))
    assert (restored["blocks"][1]["kernel"][...] == state.params["blk_1"]["kernel"]).all()
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    if suffix == ".msgpack":
        from flax.serialization import from_bytes

        assert bits(from_bytes(variables, file.read_bytes())) == bits(variables)
    else:
        from safetensors.flax import load_file

        flat = load_file(file)
        assert bits(flat["params.blk_1.kernel"]) == bits(state.params["blk_1"]["kernel"])
        assert len(flat) == len(jax.tree.leaves(variables))


def test_a_parameter_may_be_called_value(tmp_path):
    tree = {"params": {"temperature": {"value": jnp.ones(2)}, "fc": {"kernel": jnp.ones((2, 2))}}}
    rules = RuleBook.from_dict(
        {
            "version": 1,
            "rules": [
                {"linen": "params/temperature/value", "nnx": "temperature/value"},
                {"linen": "params/fc/kernel", "nnx": "fc/kernel"},
            ],
        }
    )
    save(tmp_path / "linen", tree)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=rules)
    assert restore(tmp_path / "nnx")["temperature"]["value"]["value"].shape == (2,)
    convert(tmp_path / "nnx", tmp_path / "back", "linen")
    assert bits(restore(tmp_path / "back")) == bits(tree)


def test_more_than_one_model_is_refused(tmp_path):
    params = {"params": fresh_linen().params}
    save(tmp_path / "gan", {"generator": params, "critic": params})
    with pytest.raises(RuleError, match=r"critic/params[\s\S]*generator/params"):
        plan_conversion(tmp_path / "gan", "nnx", rules=RENAMES)


def test_the_form_already_there_is_refused(tmp_path):
    save(tmp_path / "linen", {"params": fresh_linen().params})
    with pytest.raises(RuleError, match="looks like linen form already"):
        plan_conversion(tmp_path / "linen", "linen", rules=RENAMES)


def test_names_that_collide_are_refused(tmp_path):
    save(tmp_path / "linen", {"params": {"a.b": jnp.ones(1), "a": {"b": jnp.zeros(1)}}})
    with pytest.raises(StoreError, match=r"`params\.a\.b` names 2 leaves"):
        plan_conversion(tmp_path / "linen", "nnx", rules=RENAMES)


def test_a_directory_without_a_checkpoint_says_what_it_saw(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(StoreError, match=r"no checkpoint found[\s\S]*photos"):
        find(tmp_path)
    with pytest.raises(StoreError, match="does not exist"):
        find(tmp_path / "missing")
    (tmp_path / "model.txt").write_bytes(b"")
    with pytest.raises(StoreError, match=r"none of \.msgpack, \.safetensors, \.npz, nor of Flax"):
        find(tmp_path / "model.txt")


def test_a_pytree_with_several_candidate_items_asks(tmp_path):
    tree = {"params": fresh_linen().params}
    with ocp.CheckpointManager(tmp_path / "linen") as manager:
        items = {"teacher": ocp.args.StandardSave(tree), "student": ocp.args.StandardSave(tree)}
        manager.save(1, args=ocp.args.Composite(**items))
    with pytest.raises(StoreError, match=r"choose with --item from \['student', 'teacher'\]"):
        find(tmp_path / "linen")
    assert [p.name for p in find(tmp_path / "linen", item="teacher").paths] == ["teacher"]
    with pytest.raises(StoreError, match="has no pytree item `x`"):
        find(tmp_path / "linen", item="x")
