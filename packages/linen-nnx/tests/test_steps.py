"""Which step of a folder is taken: only finished ones, and never one of several by chance."""

import json
import os
import shutil

import flax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.serialization import to_bytes
from flax.training import checkpoints
from orbax.checkpoint._src.path import atomicity

from linen_nnx import RuleBook
from linen_nnx.cli import main
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.convert import convert
from linen_nnx.disk.finding import find
from linen_nnx.disk.item import read_item
from linen_nnx.disk.steps import unfinished
from linen_nnx.proof.verify import verify

RULES = RuleBook.from_dict(
    {"version": 1, "rules": [{"linen": "params/fc/kernel", "nnx": "fc/kernel"}]}
)


def tree(value):
    return {"params": {"fc": {"kernel": jnp.full((2, 3), float(value))}}}


def save_root(root, *steps, prefix=None, digits=None):
    """Steps of a CheckpointManager, each filled with its own number."""
    options = ocp.CheckpointManagerOptions(step_prefix=prefix, step_format_fixed_length=digits)
    with ocp.CheckpointManager(root, options=options) as manager:
        for step in steps:
            manager.save(step, args=ocp.args.StandardSave(tree(step)))
    return root


def save_items(root, **values):
    """`save_items(root, model_100=1)`: a bare item `model-100` filled with 1."""
    for name, value in values.items():
        group, _, number = name.rpartition("_")
        ocp.PyTreeCheckpointer().save(root / f"{group}-{number}", tree(value))
    return root


def taken(path, **options):
    """The number that fills the checkpoint which is found."""
    source = find(path, **options)
    (leaf,) = source.leaves
    return source.reader.read([leaf])[0][0, 0]


# What Orbax of several ages, killed at several moments, has left beside the finished steps.
LEFT_OVERS = {
    "6.orbax-checkpoint-tmp": 6,
    "6.orbax-checkpoint-tmp-30": 6,
    "70.orbax-checkpoint-tmp-1764290000": 70,
    "step_6.orbax-checkpoint-tmp-30": 6,
    "my_long-prefix_6.orbax-checkpoint-tmp-3": 6,
    "6": None,
    "checkpoint_6": None,
    "006": None,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Two steps of a CheckpointManager, which the tests copy."""
    return save_root(tmp_path_factory.mktemp("saved"), 4, 5)


@pytest.mark.parametrize("name", LEFT_OVERS)
def test_a_save_counts_where_orbax_would_restore_it(saved, tmp_path, name):
    shutil.copytree(saved / "5", tmp_path / name)
    finished = ocp.path.step.is_path_finalized(tmp_path / name)
    assert (unfinished(tmp_path / name) is None) == finished == (LEFT_OVERS[name] is None)


@pytest.mark.parametrize("name", [name for name, step in LEFT_OVERS.items() if step])
def test_an_unfinished_save_is_no_step_and_by_itself_is_refused(saved, tmp_path, name):
    root = tmp_path / "root"
    shutil.copytree(saved, root)
    shutil.copytree(saved / "5", root / name)
    assert ocp.CheckpointManager(root).latest_step() == 5
    assert taken(root) == 5
    with pytest.raises(StoreError, match="never finished: its name holds"):
        find(root / name)
    convert(root, tmp_path / "out", "nnx", rules=RULES)
    assert ocp.CheckpointManager(tmp_path / "out").all_steps() == [5]


def test_what_was_left_aside_is_said(saved, tmp_path, capsys):
    root = tmp_path / "root"
    shutil.copytree(saved, root)
    shutil.copytree(saved / "5", root / "6.orbax-checkpoint-tmp-30")
    RULES.save(tmp_path / "rules.yaml")
    words = [str(root), "--to", "nnx", "--rules", str(tmp_path / "rules.yaml")]
    assert main(["plan", *words]) == 0
    assert "6.orbax-checkpoint-tmp-30 was never finished" in capsys.readouterr().out


def as_in_a_bucket(folder, committed):
    """A step as it lies in a bucket: no rename, and the mark is written last."""
    history = json.loads((folder / "_CHECKPOINT_METADATA").read_text())
    if not committed:
        history["commit_timestamp_nsecs"] = None
        (folder / "commit_success.txt").unlink()
    (folder / "_CHECKPOINT_METADATA").write_text(json.dumps(history))


@pytest.mark.parametrize("committed", [True, False])
def test_a_save_that_a_bucket_never_committed_is_no_step(saved, tmp_path, committed):
    root = tmp_path / "root"
    shutil.copytree(saved, root)
    shutil.copytree(saved / "5", root / "6")
    as_in_a_bucket(root / "6", committed)
    in_bucket = {"temporary_path_cls": atomicity.CommitFileTemporaryPath}
    assert ocp.path.step.is_path_finalized(root / "6", **in_bucket) == committed
    assert find(root).folder.name == ("6" if committed else "5")
    if not committed:
        with pytest.raises(StoreError, match=r"no `commit_success\.txt`"):
            find(root / "6")


def test_a_step_without_the_mark_that_older_orbax_never_wrote_is_one(saved, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(saved, root)
    for mark in root.rglob("commit_success.txt"):
        mark.unlink()
    assert ocp.CheckpointManager(root).all_steps() == [4, 5]
    assert taken(root) == 5


def test_a_step_with_a_half_saved_item_is_no_step(saved, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(saved, root)
    shutil.copytree(saved / "5", root / "6")
    shutil.copytree(saved / "5" / "default", root / "6" / "opt_state.orbax-checkpoint-tmp-3")
    assert taken(root) == 5
    with pytest.raises(StoreError, match=r"opt_state\.orbax-checkpoint-tmp-3"):
        find(root / "6")


def test_a_root_of_nothing_but_unfinished_saves_is_refused(saved, tmp_path):
    shutil.copytree(saved / "5", tmp_path / "6.orbax-checkpoint-tmp-30")
    with pytest.raises(StoreError, match="were never finished, and no other save"):
        find(tmp_path)


@pytest.mark.parametrize(
    ("options", "name"),
    [({"prefix": "step"}, "step_7"), ({"digits": 5}, "00007"), ({}, "7")],
)
def test_the_result_has_the_step_where_orbax_finds_it(tmp_path, options, name):
    save_root(tmp_path / "linen", 3, 7, **options)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=RULES)
    assert os.listdir(tmp_path / "nnx") == [name]
    again = ocp.CheckpointManagerOptions(
        step_prefix=options.get("prefix"), step_format_fixed_length=options.get("digits")
    )
    with ocp.CheckpointManager(tmp_path / "nnx", options=again) as manager:
        assert manager.all_steps() == [7]
    assert all(check.passed is not False for check in verify(tmp_path / "linen", tmp_path / "nnx"))


def test_several_series_in_one_folder_are_refused_by_name(tmp_path):
    save_items(tmp_path, model_100=1, model_200=2, model_ema_100=9, model_ema_200=9)
    message = r"`model-N` \(100, 200\) and `model_ema-N` \(100, 200\)[\s\S]*--prefix model-"
    with pytest.raises(StoreError, match=message):
        find(tmp_path)
    with pytest.raises(StoreError, match="several series"):
        find(tmp_path, step=100)
    with pytest.raises(StoreError, match="no step 7"):
        find(tmp_path, step=7)


@pytest.mark.parametrize("prefix", ["model-", "model"])
def test_a_prefix_chooses_one_series(tmp_path, prefix):
    save_items(tmp_path / "in", model_100=1, model_200=2, model_ema_100=8, model_ema_200=9)
    assert taken(tmp_path / "in", prefix=[prefix]) == 2
    assert taken(tmp_path / "in", prefix=["model_ema-"]) == 9
    assert taken(tmp_path / "in", step=100, prefix=["model_ema"]) == 8
    with pytest.raises(StoreError, match=r"no steps `modl-N`[\s\S]*did you mean `model-`"):
        find(tmp_path / "in", prefix=["modl-"])


def test_the_remedy_for_several_series_works_on_the_command_line(tmp_path, capsys):
    root = save_items(tmp_path / "in", model_100=1, model_ema_100=9)
    RULES.save(tmp_path / "rules.yaml")
    words = [str(root), str(tmp_path / "out")]
    to = ["--to", "nnx", "--rules", str(tmp_path / "rules.yaml")]
    assert main(["run", *words, *to]) == 1
    remedy = capsys.readouterr().err.partition("choose with ")[2].partition(";")[0].split()
    assert main(["run", *words, *to, *remedy]) == 0
    assert main(["verify", *words, *remedy]) == 0
    assert main(["inspect", str(root), *remedy]) == 0
    # `model-100` is a name that no CheckpointManager looks for.
    with ocp.CheckpointManager(tmp_path / "out") as manager:
        assert manager.all_steps() == [100]
    assert taken(tmp_path / "out") == 1


def test_a_step_that_only_one_series_has_needs_no_prefix(tmp_path):
    save_items(tmp_path, model_100=1, model_ema_50=9)
    assert taken(tmp_path, step=50) == 9


def save_model_and_optimizer(root, *steps):
    for step in steps:
        kernel = tree(step)["params"]["fc"]["kernel"]
        checkpointer = ocp.PyTreeCheckpointer()
        checkpointer.save(root / f"model-{step}", {"fc": {"kernel": {"value": kernel}}})
        moments = {"opt_state": {"0": {"mu": {"fc": {"kernel": {"value": -kernel}}}}}}
        checkpointer.save(root / f"optimizer-{step}", moments)
    return root


def test_model_and_optimizer_are_taken_as_one_state(tmp_path):
    root = save_model_and_optimizer(tmp_path / "nnx", 100, 200)
    together = ["model-", "optimizer-"]
    convert(root, tmp_path / "linen", "linen", rules=RULES, prefix=together)
    with ocp.CheckpointManager(tmp_path / "linen") as manager:
        assert manager.all_steps() == [200]
        args = ocp.args.Composite(state=ocp.args.PyTreeRestore())
        state = manager.restore(200, args=args).state
    assert (state["params"]["fc"]["kernel"] == 200).all()
    assert (state["opt_state"][0]["mu"]["fc"]["kernel"] == -200).all()
    checks = verify(root, tmp_path / "linen", prefix=together)
    assert all(check.passed is not False for check in checks)


PARTS = {  # a model as people save it beside its optimizer
    "variables": {"params": {"fc": {"kernel": jnp.ones((2, 3))}}},
    "bare parameters": {"fc": {"kernel": jnp.ones((2, 3))}},
}


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("as_files", [False, True])
def test_model_and_optimizer_of_linen_make_a_train_state(tmp_path, kind, as_files):
    params = {"fc": {"kernel": jnp.ones((2, 3))}}
    moments = optax.adam(0.1).init(params)
    root, out = tmp_path / "linen", tmp_path / "nnx"
    root.mkdir()
    for name, part in (("model_3", PARTS[kind]), ("optimizer_3", moments)):
        if as_files:
            (root / name).write_bytes(to_bytes(part))
        else:
            ocp.PyTreeCheckpointer().save(root / name, part)
    together = ["model", "optimizer"]
    convert(root, out, "nnx", rules=RULES, prefix=together)
    assert os.listdir(out) == ["3"]
    paths = {leaf.path for leaf in find(out).leaves}
    assert {"model/fc/kernel/value", "optimizer/opt_state/0/mu/fc/kernel/value"} <= paths
    assert all(check.passed is not False for check in verify(root, out, prefix=together))


def test_parts_that_share_a_path_are_refused(tmp_path):
    save_items(tmp_path, model_1=1, model_ema_1=9)
    with pytest.raises(StoreError, match=r"both have `params/fc/kernel`: take one of them alone"):
        _ = find(tmp_path, prefix=["model", "model_ema"]).leaves


def test_the_latest_step_that_all_series_have_is_taken_and_said(tmp_path):
    root = save_model_and_optimizer(tmp_path, 100, 200)
    shutil.rmtree(root / "optimizer-200")
    source = find(root, prefix=["model", "optimizer"])
    assert source.step.number == 100
    assert any("[200] are not in all of" in note for note in source.notes)
    shutil.rmtree(root / "optimizer-100")
    save_items(root, optimizer_7=1)
    with pytest.raises(StoreError, match="no step is in all of the groups"):
        find(root, prefix=["model", "optimizer"])


def test_one_step_under_two_names_is_refused(saved, tmp_path):
    for name in ("5", "0005"):
        shutil.copytree(saved / "5", tmp_path / name)
    with pytest.raises(StoreError, match=r"step 5 twice, as `0005` and as `5`"):
        find(tmp_path)


def test_anybodys_folder_with_checkpoints_inside_is_a_root(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "in" / "checkpoints")
    (tmp_path / "in" / "config.yaml").write_text("lr: 0.1\n")
    convert(tmp_path / "in", tmp_path / "out", "nnx", rules=RULES)
    with ocp.CheckpointManager(tmp_path / "out") as manager:
        assert manager.all_steps() == [5]
    checks = verify(tmp_path / "in", tmp_path / "out")
    assert all(check.passed is not False for check in checks)
    shutil.copytree(saved / "4", tmp_path / "in" / "7")
    with pytest.raises(StoreError, match="name one"):
        find(tmp_path / "in")


NAMES = ["a~", "ab~", "abc~", "полный", "层", "a?b", "a+b", "plain"]


@pytest.mark.parametrize("name", NAMES)
def test_names_beyond_letters_are_read_and_restored(tmp_path, name):
    rules = RuleBook.from_dict(
        {"version": 1, "rules": [{"linen": f"params/{name}/kernel", "nnx": "fc/kernel"}]}
    )
    linen = {"params": {name: {"kernel": jnp.ones((2, 3))}}}
    with ocp.CheckpointManager(tmp_path / "linen") as manager:
        manager.save(1, args=ocp.args.StandardSave(linen))
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=rules)
    convert(tmp_path / "nnx", tmp_path / "back", "linen")
    with ocp.CheckpointManager(tmp_path / "back") as manager:
        restored = manager.restore(1, args=ocp.args.StandardRestore())
    assert (restored["params"][name]["kernel"] == 1).all()


def test_shardings_that_this_library_once_wrote_are_read(tmp_path):
    save_items(tmp_path, model_1=1)
    item = tmp_path / "model-1"
    new = (item / "_sharding").read_text()
    (item / "_sharding").write_text(new.replace("-", "+").replace("_", "/"))
    assert all(leaf.sharding for leaf in read_item(item).leaves)


def test_a_key_with_a_slash_is_refused_for_that(tmp_path):
    ocp.PyTreeCheckpointer().save(tmp_path / "item", {"params": {"a/b": jnp.ones(3)}})
    with pytest.raises(StoreError, match="'a/b' holds a `/`"):
        _ = find(tmp_path / "item").leaves


# Steps of Flax, which may be any number


@pytest.mark.filterwarnings("ignore:Flax Checkpointing will soon be deprecated")
@pytest.mark.parametrize("as_files", [False, True])
def test_steps_of_any_number_are_found_as_flax_finds_them(tmp_path, capsys, as_files):
    root = tmp_path / "in"
    with flax.config.temp_flip_flag("use_orbax_checkpointing", not as_files):
        for step in (-2, 1e-05, 0.5, 1, 2.0, 2.5):
            checkpoints.save_checkpoint(root, tree(step), step=step, keep=9)
    assert checkpoints.latest_checkpoint(root) == str(root / "checkpoint_2.5")
    assert taken(root) == 2.5
    RULES.save(tmp_path / "r.yaml")
    for step in (-2, 1e-05, 1, 2.0, 2.5):
        assert taken(root, step=step) == np.float32(step)
        out = str(tmp_path / f"out{step}") + ".msgpack" * as_files
        words = [str(root), out, "--step", str(step), "--to", "nnx"]
        words += ["--rules", str(tmp_path / "r.yaml")]
        assert main(["run", *words]) == 0
        assert ("a CheckpointManager counts steps" in capsys.readouterr().out) == (step != 1)
        assert main(["verify", *words]) == 0
        assert taken(out) == np.float32(step)
    if not as_files:
        restored = checkpoints.restore_checkpoint(tmp_path / "out2.5", None)
        assert (restored["fc"]["kernel"]["value"] == 2.5).all()
    with pytest.raises(StoreError, match=r"no step 3\.5, only \[-2, 1e-05, 0\.5, 1, 2\.0, 2\.5\]"):
        find(root, step=3.5)


def test_a_step_under_two_numbers_of_one_value_is_refused(saved, tmp_path):
    for name in ("checkpoint_5", "checkpoint_5.0"):
        shutil.copytree(saved / "5", tmp_path / name)
    with pytest.raises(StoreError, match=r"`checkpoint_5` and as `checkpoint_5\.0`"):
        find(tmp_path)
