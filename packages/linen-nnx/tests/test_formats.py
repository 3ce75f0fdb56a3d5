"""Every layout and format in `docs/formats.md` is read, converted, and proved."""

import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax.serialization import msgpack_restore
from flax.training import checkpoints
from formats_table import ALONE, BEGIN, DATA, END, FORMATS, PAGE, WHOLE, page

from linen_nnx import RuleBook
from linen_nnx.cli import main
from linen_nnx.disk.convert import convert
from linen_nnx.disk.finding import find
from linen_nnx.disk.planning import plan_conversion
from linen_nnx.proof.verify import verify

RULES = RuleBook.from_dict(
    {
        "version": 1,
        "rules": [
            {"linen": "params/fc/{leaf}", "nnx": "up/{leaf}"},
            {"linen": "params/out/{leaf}", "nnx": "down/{leaf}"},
            {"linen": "batch_stats/norm/mean", "nnx": "norm/mean"},
        ],
    }
)


def flat(tree):
    """Arrays by path, without empty nodes: what a chain is made of does not matter."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {}
    for keys, leaf in leaves:
        names = (getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in keys)
        named["/".join(map(str, names))] = raw(leaf)
    return named


def raw(array):
    array = np.asarray(array)
    return str(array.dtype), array.shape, array.tobytes()


def read(path):
    """Every array of a checkpoint as the converter reads it."""
    source = find(path)
    held = [leaf for leaf in source.leaves if leaf.zarr is not None]
    arrays = source.reader.read(held)
    return {leaf.path: raw(array) for leaf, array in zip(held, arrays, strict=True)}


def model_of(leaves):
    return {p: leaf for p, leaf in leaves.items() if p.split("/")[0] in ("params", "batch_stats")}


@pytest.fixture(scope="module")
def tree():
    """The state that the samples hold, as Flax 0.8 wrote it and Flax of today reads it."""
    return msgpack_restore((DATA / "flax_0.8.0_file" / "checkpoint_10").read_bytes())


@pytest.fixture(scope="module", params=FORMATS, ids=lambda one: one.name)
def example(request, tmp_path_factory, tree):
    """One format, and the path of an example of it."""
    folder = tmp_path_factory.mktemp("example")
    return request.param, request.param.make(folder, tree)


def test_every_leaf_is_read_with_its_bits(example, tree):
    form, path = example
    expected = flat(tree)
    if form.holds == ALONE:
        expected = model_of(expected)
    if "several items" in form.name:  # which hold no step
        del expected["step"]
    assert read(path) == expected


def test_the_layout_found_is_said(example, capsys):
    form, path = example
    assert main(["inspect", str(path)]) == 0
    assert form.found in capsys.readouterr().out


def test_it_goes_to_nnx_and_is_proved(example, tree, tmp_path):
    form, path = example
    plan = plan_conversion(path, "nnx", RULES)
    assert plan.peak_memory < 200 << 20
    convert(path, tmp_path / "nnx", "nnx", rules=RULES)
    checks = verify(path, tmp_path / "nnx")
    assert [check.name for check in checks if check.passed is False] == []
    found = read(tmp_path / "nnx")
    base = "" if form.holds == ALONE else "model/"
    assert found[f"{base}up/kernel/value"] == raw(tree["params"]["fc"]["kernel"])
    assert found[f"{base}norm/mean/value"] == raw(tree["batch_stats"]["norm"]["mean"])
    if form.holds == WHOLE:
        mu = tree["opt_state"]["1"]["0"]["mu"]["fc"]["kernel"]
        (moment,) = [v for k, v in found.items() if k.endswith("mu/up/kernel/value")]
        assert moment == raw(mu)
    stock = ocp.PyTreeCheckpointer()
    item = find(tmp_path / "nnx").paths[0]
    assert len(flat(stock.restore(item))) == len(found)


@pytest.mark.parametrize(
    "name", [one.name for one in FORMATS if one.holds == WHOLE and one.make.__name__ == "<lambda>"]
)
def test_the_libraries_of_today_read_the_same_from_old_samples(name):
    (form,) = [one for one in FORMATS if one.name == name]
    path = form.make(None, None)
    if "Standard" in name:
        with pytest.raises(Exception, match="NOT_FOUND"):
            ocp.StandardCheckpointer().restore(path)
        return
    if name.startswith("Flax"):
        restored = checkpoints.restore_checkpoint(path, None)
    else:
        restored = ocp.PyTreeCheckpointer().restore(find(path).paths[0])
    assert read(path) == flat(restored)


def test_the_page_shows_the_table():
    text = PAGE.read_text()
    assert text.partition(BEGIN)[2].partition(END)[0] == page()


def test_what_describes_the_old_tree_stays_behind(tmp_path):
    for name in ("orbax_0.4.1_standard", "orbax_0.4.1_pytree", "orbax_0.2.6_pytree"):
        convert(DATA / name, tmp_path / name, "nnx", rules=RULES)
        left = {file.name for file in (tmp_path / name).iterdir()}
        assert "checkpoint" not in left
    bare = tmp_path / "bare"
    shutil.copytree(DATA / "orbax_0.2.6_pytree", bare)
    (bare / "_sharding").write_text('{"cGFyYW1z": "{}"}')  # of a tree that is no more
    convert(bare, tmp_path / "out", "nnx", rules=RULES)
    assert not (tmp_path / "out" / "_sharding").exists()
    ocp.PyTreeCheckpointer().restore(tmp_path / "out")


def test_what_only_t5x_can_use_is_left_out_and_said(tmp_path, tree, capsys):
    (form,) = [one for one in FORMATS if one.name == "T5X"]
    path = form.make(tmp_path, tree)
    assert main(["inspect", str(path)]) == 0
    assert "`optimizer/state` are left out: only T5X" in capsys.readouterr().out
