"""A conversion is complete or absent, leaves its source alone, and damage is found."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from convert_helpers import RENAMES, STACKS, bits, linen_state, linen_train, restore, save
from flax.serialization import msgpack_serialize
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from linen_nnx import RuleBook, RuleError
from linen_nnx.cli import main
from linen_nnx.disk import digests
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.convert import TargetError, convert
from linen_nnx.disk.digests import DigestError
from linen_nnx.disk.planning import plan_conversion
from linen_nnx.disk.sources import SUFFIXES
from linen_nnx.proof.verify import verify

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A trained Linen state, with its rule book and its digests beside it.

    Some of its arrays are small and lie in the store's tree, others in data files of their own.
    """
    path = tmp_path_factory.mktemp("source") / "linen"
    state, _ = linen_train(linen_state(optax.adamw(1e-2), width=20), range(2))
    save(path, state)
    RENAMES.save(path / "rules.yaml")
    digests.write(path)
    return path


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "nnx"
    convert(source, out, "nnx")
    return out


def snapshot(path):
    """Bytes and times of every file below a directory."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return {p.relative_to(path): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


def _data(path):
    """The files that hold a checkpoint's bytes and tree, the largest first."""
    return sorted(path.rglob("d/*"), key=lambda file: -file.stat().st_size)


def passes(checks):
    return all(check.passed is not False for check in checks)


def test_what_cannot_be_known_is_said(converted, tmp_path, capsys):
    shutil.copytree(converted, tmp_path / "nnx")
    (tmp_path / "nnx" / "report.json").unlink()
    assert main(["plan", str(tmp_path / "nnx"), "--to", "linen"]) == 0
    assert "convert again with --like and its path" in capsys.readouterr().out
    assert main(["plan", str(converted), "--to", "linen"]) == 0
    assert "--like" not in capsys.readouterr().out
    file = tmp_path / "linen.safetensors"
    assert main(["run", str(converted), str(file), "--to", "linen"]) == 1
    assert "32 leaves would be lost" in capsys.readouterr().err
    assert main(["run", str(converted), str(file), "--to", "linen", "--model-only"]) == 0
    assert "(the model alone)" in capsys.readouterr().out


@pytest.mark.parametrize("link", [False, True])
def test_the_source_stays_as_it_was(source, tmp_path, link):
    before = snapshot(source)
    convert(source, tmp_path / "nnx", "nnx", link=link)
    assert snapshot(source) == before
    assert os.listdir(tmp_path) == ["nnx"]


def test_links_share_their_bytes_and_carry_their_digests(source, tmp_path):
    result = convert(source, tmp_path / "nnx", "nnx", link=True)
    data = _data(source)[0]
    assert (tmp_path / "nnx" / data.relative_to(source)).samefile(data)
    assert digests.check(tmp_path / "nnx")
    assert result.reports[0]["linked"] is True


def test_links_without_digests_at_the_source_say_so(source, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    (bare / "digests.json").unlink()
    assert main(["run", str(bare), str(tmp_path / "a"), "--to", "nnx", "--link"]) == 0
    assert "no digests: the source has none" in capsys.readouterr().out
    assert digests.check(tmp_path / "a") is False
    assert main(["run", str(bare), str(tmp_path / "b"), "--to", "nnx", "--link", "--digest"]) == 0
    assert digests.check(tmp_path / "b") is True


def test_links_fall_back_to_copies_and_say_so(source, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    assert main(["run", str(source), str(tmp_path / "nnx"), "--to", "nnx", "--link"]) == 0
    assert "hard links are not possible here: Invalid cross-device" in capsys.readouterr().out
    assert passes(verify(source, tmp_path / "nnx"))


def test_a_second_run_finds_the_target_equal_or_refuses(source, tmp_path, capsys):
    out = tmp_path / "nnx"
    assert main(["run", str(source), str(out), "--to", "nnx"]) == 0
    before = snapshot(out)
    assert main(["run", str(source), str(out), "--to", "nnx"]) == 0
    assert "was there already and is equal" in capsys.readouterr().out
    assert snapshot(out) == before
    assert main(["run", str(source), str(out), "--to", "nnx", "--reset-optimizer"]) == 1
    assert "is not this conversion's result" in capsys.readouterr().err
    victim = next(p for p in (out / "d").iterdir())
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(DigestError, match=r"d/.* has \d+ bytes, expected"):
        convert(source, out, "nnx")
    (tmp_path / "mine").mkdir()
    with pytest.raises(TargetError, match="is not this conversion's result"):
        convert(source, tmp_path / "mine", "nnx")


def _flip(path, rng):
    """Flips one random bit of a file."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def test_every_flipped_bit_is_found(source, converted, tmp_path):
    rng = random.Random(0)
    out = tmp_path / "nnx"
    shutil.copytree(converted, out)
    data = _data(out)
    for _ in range(200):
        victim = rng.choice(data)
        intact = victim.read_bytes()
        _flip(victim, rng)
        checks = {check.name: check.passed for check in verify(source, out)}
        assert checks["digests"] is False
        victim.write_bytes(intact)
    assert passes(verify(source, out))


def test_bits_are_compared_even_without_digests(tmp_path):
    tree = {"params": {"blk_0": {"kernel": jnp.arange(4096.0)}}}
    rules = RuleBook(r for r in RENAMES.rules if "blk" in str(r))
    save(tmp_path / "linen", tree)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=rules)
    (tmp_path / "nnx" / "digests.json").unlink()
    assert passes(verify(tmp_path / "linen", tmp_path / "nnx"))
    data = _data(tmp_path / "nnx")[0]
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    assert not passes(verify(tmp_path / "linen", tmp_path / "nnx"))


def test_a_missing_a_truncated_and_a_foreign_file_are_found(source, converted, tmp_path):
    for change, reason in (
        (lambda p: p.unlink(), "is missing"),
        (lambda p: p.write_bytes(p.read_bytes()[:10]), "has 10 bytes"),
        (lambda p: p.with_name("stranger").write_bytes(b"?"), "stranger is foreign"),
    ):
        out = tmp_path / reason.replace(" ", "-")
        shutil.copytree(converted, out)
        change(out / "_METADATA")
        with pytest.raises(DigestError, match=reason):
            digests.check(out)


def test_swapped_leaves_are_found(tmp_path):
    tree = {"params": {"blk_0": {"a": jnp.arange(4.0), "b": jnp.arange(4.0) + 9}}}
    rules = RuleBook(r for r in RENAMES.rules if "blk" in str(r))
    wrong = RuleBook.from_dict(
        {
            "version": 1,
            "rules": [
                {"linen": "params/blk_0/a", "nnx": "blocks/0/b"},
                {"linen": "params/blk_0/b", "nnx": "blocks/0/a"},
            ],
        }
    )
    save(tmp_path / "linen", tree)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=wrong)
    failed = [
        c for c in verify(tmp_path / "linen", tmp_path / "nnx", rules=rules) if c.passed is False
    ]
    assert [check.name for check in failed] == ["every bit, through the rule book", "exact inverse"]
    assert len(failed[0].details) == 2


def test_a_leaf_left_behind_is_found(source, tmp_path):
    convert(source, tmp_path / "nnx", "nnx", reset_optimizer=True)
    report = json.loads((tmp_path / "nnx" / "report.json").read_text())
    (tmp_path / "nnx" / "report.json").write_text(json.dumps({**report, "reset_optimizer": False}))
    failed = [check for check in verify(source, tmp_path / "nnx") if check.passed is False]
    assert "coverage, shapes, dtypes" in [check.name for check in failed]
    assert any("opt_state/0/mu" in detail for check in failed for detail in check.details)


def test_a_damaged_source_is_noticed_while_it_is_copied(tmp_path):
    damaged = save(tmp_path / "damaged", {"params": {"blk_0": {"kernel": jnp.arange(4096.0)}}})
    digests.write(damaged)
    _flip(_data(damaged)[0], random.Random(1))
    rules = RuleBook(r for r in RENAMES.rules if "blk" in str(r))
    with pytest.raises(DigestError, match="the source is damaged"):
        convert(damaged, tmp_path / "nnx", "nnx", rules=rules)
    assert sorted(os.listdir(tmp_path)) == ["damaged"]


def test_a_full_disk_is_refused_before_and_cleaned_up_after(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(TargetError, match=r"GB free, the conversion needs 0\.02 GB"):
            convert(source, tmp_path / "nnx", "nnx")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "copy_file_range", full)
        with pytest.raises(OSError, match="No space left"):
            convert(source, tmp_path / "nnx", "nnx")
    assert os.listdir(tmp_path) == []


def test_a_target_that_cannot_be_made_is_refused(source, tmp_path, capsys):
    for out, reason in (
        ("/proc/nnx", "/proc"),
        (str(tmp_path / "no" / "nnx"), "is no directory: make it first"),
        (str(source / "nnx"), "lies inside the source"),
    ):
        assert main(["run", str(source), out, "--to", "nnx"]) == 1
        assert reason in capsys.readouterr().err


def test_a_half_written_or_damaged_source_is_refused(source, tmp_path):
    def damaged(name, change):
        shutil.copytree(source, tmp_path / name)
        change(tmp_path / name)
        with pytest.raises(StoreError) as caught:
            convert(tmp_path / name, tmp_path / "nnx", "nnx")
        assert not (tmp_path / "nnx").exists()
        return str(caught.value)

    assert "no manifest.ocdbt" in damaged("a", lambda p: (p / "manifest.ocdbt").unlink())
    assert "cannot be read" in damaged("b", lambda p: (p / "_METADATA").write_text('{"tree'))
    assert "OCDBT" in damaged("c", lambda p: (p / "manifest.ocdbt").write_bytes(b"OCDB"))
    assert "OCDBT" in damaged("d", lambda p: shutil.rmtree(p / "d"))
    shutil.copytree(source, tmp_path / "root" / "5.orbax-checkpoint-tmp")
    for unfinished in (tmp_path / "root", tmp_path / "root" / "5.orbax-checkpoint-tmp"):
        with pytest.raises(StoreError, match="never finished"):
            convert(unfinished, tmp_path / "nnx", "nnx", rules=RENAMES)


def test_another_model_and_a_wrong_book_are_refused_with_every_reason(source, tmp_path):
    with pytest.raises(RuleError) as caught:
        convert(source, tmp_path / "nnx", "nnx", rules=STACKS)
    text = str(caught.value)
    assert "no rule matches the linen leaf `params/blk_0/kernel`" in text
    assert "(`params/blk/fc/{name}` <-> `blocks/{i}/{name}`) matches no linen leaf" in text
    (tmp_path / "none").mkdir()
    save(tmp_path / "none" / "linen", {"params": {"w": jnp.ones(2)}})
    with pytest.raises(RuleError, match="give one with --rules FILE"):
        plan_conversion(tmp_path / "none" / "linen", "nnx")
    assert sorted(os.listdir(tmp_path)) == ["none"]


def test_two_conversions_to_one_target_do_not_mix(source, tmp_path):
    import fcntl

    partial = tmp_path / ".nnx.partial"
    partial.mkdir()
    lock = os.open(partial, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        with pytest.raises(TargetError, match="another conversion is writing"):
            convert(source, tmp_path / "nnx", "nnx")
    finally:
        os.close(lock)
    convert(source, tmp_path / "nnx", "nnx")
    assert os.listdir(tmp_path) == ["nnx"]


@pytest.mark.long
def test_a_kill_leaves_the_target_absent_or_complete(source, tmp_path):
    before = snapshot(source)
    out = tmp_path / "nnx"
    command = [sys.executable, "-m", "linen_nnx", "run", str(source), str(out), "--to", "nnx"]
    start = time.monotonic()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    duration = time.monotonic() - start
    rng = random.Random(0)
    outcomes = set()
    for _ in range(50):
        shutil.rmtree(out, ignore_errors=True)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        time.sleep(rng.uniform(0.3, 1.05) * duration)
        process.send_signal(signal.SIGKILL)
        process.wait()
        outcomes.add(out.exists())
        if out.exists():
            assert digests.check(out)
        convert(source, out, "nnx")
        assert digests.check(out)
        assert os.listdir(tmp_path) == ["nnx"]
    assert passes(verify(source, out))
    assert snapshot(source) == before
    assert False in outcomes


def peak(*arguments):
    """The largest memory of a process of the converter, in MiB."""
    code = (
        "import sys; from linen_nnx.cli import program; assert program() == 0\n"
        "print(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')))"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return int(output.stdout.split("VmHWM:")[1].split()[0]) / 1024


def test_memory_stays_small_whatever_the_size(tmp_path):
    leaf = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    layers = {f"blk_{i}": {"kernel": leaf} for i in range(32)}
    save(tmp_path / "linen", {"params": layers})
    rule = {"linen": "params/blk_{i}/kernel", "nnx": "blocks/{i}/kernel"}
    for name, ops, limit in (
        ("rename", [], 60),
        ("transpose", [{"op": "transpose", "perm": [1, 0]}], 160),
    ):
        rules = [{**rule, **({"ops": ops} if ops else {})}]
        (tmp_path / name).write_text(json.dumps({"version": 1, "rules": rules}))
        arguments = [tmp_path / "linen", tmp_path / f"nnx {name}", "--to", "nnx"]
        assert 10 < peak("run", *arguments, "--rules", tmp_path / name) < limit


FILES = {  # as those libraries write them whose formats they are
    ".msgpack": lambda path, tree: path.write_bytes(msgpack_serialize(tree)),
    ".safetensors": lambda path, tree: save_file(flatten_dict(tree, sep="."), path),
    ".npz": lambda path, tree: np.savez(path, **flatten_dict(tree, sep="/")),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("suffix", FILES)
def test_the_memory_that_a_plan_foretells_for_a_file_is_what_it_takes(tmp_path, suffix):
    leaf = np.random.default_rng(0).standard_normal((1024, 1024), np.float32)
    tree = {"params": {f"blk_{i}": {"kernel": leaf} for i in range(32)}}
    FILES[suffix](tmp_path / f"a{suffix}", tree)
    rule = {"linen": "params/blk_{i}/kernel", "nnx": "blocks/{i}/kernel"}
    book = RuleBook.from_dict({"version": 1, "rules": [rule]})
    plan = plan_conversion(tmp_path / f"a{suffix}", "nnx", book)
    book.save(tmp_path / "rules.yaml")
    arguments = [tmp_path / f"a{suffix}", tmp_path / "nnx", "--to", "nnx"]
    found = peak("run", *arguments, "--rules", tmp_path / "rules.yaml")
    assert 0.8 * plan.peak_memory / 2**20 < found < 1.2 * plan.peak_memory / 2**20
    if suffix not in SUFFIXES:
        return

    written = convert(tmp_path / "nnx", tmp_path / f"back{suffix}", "linen")
    found = peak("run", tmp_path / "nnx", tmp_path / f"again{suffix}", "--to", "linen")
    foretold = written.reports[0]["peak_memory"] / 2**20
    assert 0.8 * foretold < found < 1.2 * foretold


# Rules that change more than names


def stacked_state(name="adamw"):
    tx = {
        "adamw": optax.adamw(1e-2),
        "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=4),
    }[name]
    return linen_state(tx, stacked=True)


def test_stacked_layers_carry_their_moments(tmp_path):
    state, _ = linen_train(stacked_state(), range(2))
    save(tmp_path / "linen", state)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=STACKS)
    optimizer = restore(tmp_path / "nnx")["optimizer"]["opt_state"]["0"]
    for layer in range(3):
        moment = optimizer["mu"]["blocks"][str(layer)]["kernel"]["value"]
        expected = np.asarray(state.opt_state[0].mu["blk"]["fc"]["kernel"][layer])
        assert np.asarray(moment).tobytes() == expected.tobytes()
    convert(tmp_path / "nnx", tmp_path / "back", "linen")
    assert bits(restore(tmp_path / "back", state)) == bits(state)


def test_factored_moments_of_transposed_parameters_are_refused_by_name(tmp_path):
    save(tmp_path / "linen", stacked_state("adafactor"))
    rules = STACKS.to_dict()["rules"]
    turned = {"op": "transpose", "perm": [1, 0]}
    kernels = {**rules[0], "linen": "params/blk/fc/kernel", "nnx": "blocks/{i}/kernel"}
    biases = {**rules[0], "linen": "params/blk/fc/bias", "nnx": "blocks/{i}/bias"}
    kernels["ops"] = [*rules[0]["ops"], turned]
    book = RuleBook.from_dict({"version": 1, "rules": [kernels, biases, *rules[1:]]})
    with pytest.raises(RuleError) as caught:
        plan_conversion(tmp_path / "linen", "nnx", rules=book)
    assert "v_row/blk/fc/kernel" in str(caught.value)
    assert "--reset-optimizer" in str(caught.value)
    plan_conversion(tmp_path / "linen", "nnx", rules=book, reset_optimizer=True)


def test_changed_values_refuse_the_optimizer_unless_it_is_reset(tmp_path):
    rules = [rule for rule in RENAMES.to_dict()["rules"] if rule["nnx"] != "norm/scale"]
    halved = {"linen": "params/bn/scale", "nnx": "norm/scale"}
    halved["ops"] = [{"op": "scale", "factor": 0.5}]
    scaled = RuleBook.from_dict({"version": 1, "rules": [*rules, halved]})
    state = linen_state(optax.adamw(1e-2))
    save(tmp_path / "linen", state)
    with pytest.raises(RuleError, match="changes values"):
        plan_conversion(tmp_path / "linen", "nnx", rules=scaled)
    convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=scaled, reset_optimizer=True)
    restored = restore(tmp_path / "nnx")
    assert "optimizer" not in restored
    assert (restored["model"]["norm"]["scale"]["value"] == state.params["bn"]["scale"] / 2).all()
    assert (restored["ema"]["norm"]["scale"]["value"] == state.params["bn"]["scale"] / 2).all()


def test_filled_and_dropped_leaves_are_listed(tmp_path):
    rules = RuleBook.from_dict(
        {
            "version": 1,
            "rules": [
                {"linen": "params/{name}/kernel", "nnx": "{name}/kernel"},
                {"linen": "params/{name}/bias", "ops": [{"op": "drop"}]},
                {
                    "nnx": "lora",
                    "ops": [{"op": "init", "fill": "normal", "shape": [4, 2], "dtype": "bfloat16"}],
                },
            ],
        }
    )
    save(tmp_path / "linen", {"params": {"fc": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}})
    result = convert(tmp_path / "linen", tmp_path / "nnx", "nnx", rules=rules)
    assert result.reports[0]["dropped"] == ["params/fc/bias"]
    assert result.reports[0]["filled"] == ["lora/value"]
    lora = restore(tmp_path / "nnx")["lora"]["value"]
    assert lora.dtype == jnp.bfloat16
    assert (lora != 0).any()
    assert passes(verify(tmp_path / "linen", tmp_path / "nnx"))


def test_a_tree_to_be_like_settles_and_checks_the_result(source, tmp_path):
    fresh = linen_state(optax.adamw(1e-2), width=20)
    save(tmp_path / "fresh", fresh)
    convert(source, tmp_path / "nnx", "nnx")
    (tmp_path / "nnx" / "report.json").unlink()
    convert(tmp_path / "nnx", tmp_path / "back", "linen", like=tmp_path / "fresh")
    assert bits(restore(tmp_path / "back", fresh)) == bits(restore(source, fresh))
    save(tmp_path / "other", linen_state(optax.sgd(1e-2), width=20))
    with pytest.raises(RuleError, match="the tree to be like has no `opt_state/0/mu") as caught:
        plan_conversion(tmp_path / "nnx", "linen", like=tmp_path / "other")
    assert "cannot be laid out like the given tree (--like)" in str(caught.value)
    half = fresh.replace(
        params={**fresh.params, "out": {"kernel": jnp.ones((20, 1), jnp.bfloat16)}}
    )
    save(tmp_path / "half", half)
    with pytest.raises(RuleError, match=r"wants bfloat16\[20,1\]"):
        plan_conversion(tmp_path / "nnx", "linen", like=tmp_path / "half")
