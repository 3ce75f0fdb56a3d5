"""A conversion removes and replaces nothing that is not its own, whatever lies in its way."""

import errno
import json
import os
import shutil
import subprocess
import threading

import numpy as np
import pytest
from convert_helpers import make_socket, restore, save, save_small

from linen_nnx.cli import main
from linen_nnx.disk import digests, placing, transaction
from linen_nnx.disk.convert import convert
from linen_nnx.disk.transaction import TargetError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("source") / "linen")


def kernel(path):
    return np.asarray(restore(path)["b"]["kernel"]["value"])


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# What is in the way


@pytest.fixture
def precious(tmp_path):
    """A folder of somebody's, outside of everything."""
    folder = tmp_path / "precious"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "thesis.txt").write_text("ten years")
    return folder


@pytest.fixture
def target(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "nnx"


def test_a_link_in_the_place_of_the_partial_directory_is_not_followed(
    source, precious, target, capsys
):
    (target.parent / ".nnx.partial").symlink_to(precious)
    before = contents(precious)
    assert main(["run", str(source), str(target), "--to", "nnx"]) == 1
    assert "is in the way" in capsys.readouterr().err
    assert contents(precious) == before
    assert os.listdir(target.parent) == [".nnx.partial"]
    (target.parent / ".nnx.partial").unlink()  # which is what the message says
    assert main(["run", str(source), str(target), "--to", "nnx"]) == 0


def test_a_directory_of_somebody_else_is_left_alone(source, precious, target):
    precious.rename(target.parent / ".nnx.partial")
    before = contents(target.parent)
    with pytest.raises(TargetError, match="it holds files, and no made-by-linen-nnx"):
        convert(source, target, "nnx")
    assert contents(target.parent) == before
    convert(source, target.with_name("other"), "nnx")  # which is what the message says


@pytest.mark.parametrize("kind", ["file", "pipe", "dangling link"])
def test_whatever_else_is_in_the_way_stays(source, target, kind):
    partial = target.parent / ".nnx.partial"
    make = {
        "file": lambda: partial.write_text("mine"),
        "pipe": lambda: os.mkfifo(partial),
        "dangling link": lambda: partial.symlink_to("nowhere"),
    }
    make[kind]()
    with pytest.raises(TargetError, match="is in the way"):
        convert(source, target, "nnx")
    assert os.listdir(target.parent) == [".nnx.partial"]
    assert not (target.parent / "nowhere").exists()


def test_a_left_over_is_removed_and_links_in_it_are_not_followed(source, precious, target):
    partial = target.parent / ".nnx.partial"
    (partial / "result").mkdir(parents=True)
    (partial / transaction._MARKER).write_bytes(transaction._MARK)
    (partial / "result" / "d").symlink_to(precious)
    (partial / "link").symlink_to(precious / "deep" / "thesis.txt")
    before = contents(precious)
    convert(source, target, "nnx")
    assert os.listdir(target.parent) == ["nnx"]
    assert contents(precious) == before


def test_a_marker_that_is_a_link_marks_nothing(source, precious, target):
    partial = target.parent / ".nnx.partial"
    partial.mkdir()
    (target.parent / "mark").write_bytes(transaction._MARK)
    (partial / transaction._MARKER).symlink_to(target.parent / "mark")
    (partial / "thesis.txt").write_text("ten years")
    with pytest.raises(TargetError, match="is in the way"):
        convert(source, target, "nnx")
    assert (partial / "thesis.txt").read_text() == "ten years"


def test_a_left_over_beside_a_complete_result_is_removed(source, target):
    convert(source, target, "nnx")
    partial = target.parent / ".nnx.partial"
    partial.mkdir()
    (partial / transaction._MARKER).write_bytes(transaction._MARK)
    assert convert(source, target, "nnx").status == "equal"
    assert os.listdir(target.parent) == ["nnx"]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("kind", ["file", "empty directory", "dangling link"])
def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path, monkeypatch, native, kind):
    result, out = tmp_path / "result", tmp_path / "out"
    result.mkdir()
    if not native:
        monkeypatch.setattr(transaction.ctypes, "CDLL", lambda *_, **__: object())
    make = {
        "file": lambda: out.write_text("mine"),
        "empty directory": out.mkdir,
        "dangling link": lambda: out.symlink_to("nowhere"),
    }
    make[kind]()
    with pytest.raises(TargetError, match="was made by another process meanwhile"):
        transaction.publish(result, out)
    assert result.is_dir()
    shutil.rmtree(out) if kind == "empty directory" else out.unlink()
    transaction.publish(result, out)
    assert out.is_dir()


def test_of_many_conversions_at_once_to_one_target_one_is_complete(source, target):
    outcomes = []

    def run():
        try:
            outcomes.append(convert(source, target, "nnx").status)
        except TargetError as error:
            outcomes.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("done") == 1
    for outcome in outcomes:
        assert outcome in ("done", "equal") or "another" in outcome, outcome
    assert digests.check(target)
    assert os.listdir(target.parent) == ["nnx"]


# File systems


@pytest.mark.parametrize(
    "number", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, None]
)
def test_files_are_copied_where_the_kernel_cannot_copy_ranges(source, target, monkeypatch, number):
    def refuse(*_):
        if number is None:
            return 0  # as some file systems say
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "copy_file_range", refuse)
    convert(source, target, "nnx")
    assert digests.check(target)
    assert kernel(target).tobytes() == np.arange(4096.0, dtype=np.float32).tobytes()


@pytest.fixture
def other_disk(tmp_path):
    """A small file system of its own; removed afterwards."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root may mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("words", [[], ["--link"]])
def test_another_file_system_gets_copies(source, other_disk, capsys, words):
    out = other_disk / "nnx"
    assert main(["run", str(source), str(out), "--to", "nnx", *words]) == 0
    said = "hard links are not possible here: Invalid cross-device link" in capsys.readouterr().out
    assert said == bool(words)
    assert digests.check(out)
    assert kernel(out)[4095] == 4095


def test_a_full_disk_is_one_message_and_leaves_nothing(source, other_disk, capsys, monkeypatch):
    (other_disk / "ballast").write_bytes(bytes(7 << 20))
    with open(other_disk / "ballast", "ab") as ballast:

        def fill(*_):
            ballast.write(bytes(32 << 20))

        monkeypatch.setattr(placing.Placer, "place", fill)
        with pytest.raises(OSError, match="No space") as full:
            convert(source, other_disk / "nnx", "nnx")
        assert full.value.filename == str(other_disk / "nnx")
        assert "nothing of the result is left" in str(full.value)
    assert os.listdir(other_disk) == ["ballast"]
    assert main(["run", str(source), str(other_disk / "nnx"), "--to", "nnx"]) == 1
    assert "GB free, the conversion needs" in capsys.readouterr().err


def test_a_disk_that_fills_while_leaves_are_rewritten_is_one_message(
    tmp_path, other_disk, monkeypatch, capsys
):
    noise = np.random.default_rng(0).standard_normal((1024, 2048), np.float32)
    save(tmp_path / "linen", {"params": {"a": {"kernel": noise}}})
    turn = {"linen": "params/a/kernel", "nnx": "b", "ops": [{"op": "transpose", "perm": [1, 0]}]}
    (tmp_path / "rules").write_text(json.dumps({"version": 1, "rules": [turn]}))
    (other_disk / "ballast").write_bytes(bytes(20 << 20))
    roomy = shutil.disk_usage(other_disk)._replace(free=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: roomy)
    words = ["--to", "nnx", "--rules", str(tmp_path / "rules")]
    assert main(["run", str(tmp_path / "linen"), str(other_disk / "nnx"), *words]) == 1
    error = capsys.readouterr().err
    assert f"{other_disk / 'nnx'}: No space left on device; nothing of the result is left" in error
    assert os.listdir(other_disk) == ["ballast"]


def test_a_failing_disk_is_one_message_that_names_both_files(source, target, monkeypatch, capsys):
    def fail(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "copy_file_range", fail)
    assert main(["run", str(source), str(target), "--to", "nnx"]) == 1
    error = capsys.readouterr().err
    assert str(source) in error
    assert "Input/output error" in error
    assert error.count("\n") == 1
    assert os.listdir(target.parent) == []


@pytest.mark.parametrize("link", [True, False])
def test_a_cache_of_links_is_converted_into_files(source, tmp_path, link):
    """As caches of models lie on disk: `snapshots/` links to `blobs/`."""
    cached = tmp_path / "snapshots" / "linen"
    for number, file in enumerate(sorted(p for p in source.rglob("*") if p.is_file())):
        blob = tmp_path / "blobs" / str(number)
        blob.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, blob)
        place = cached / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(blob)
    out = tmp_path / "nnx"
    convert(cached, out, "nnx", link=link, digest=True)
    assert not [file for file in out.rglob("*") if file.is_symlink()]
    files = [file for file in out.rglob("*") if file.is_file()]
    assert any(file.stat().st_nlink > 1 for file in files) == link
    shutil.rmtree(tmp_path / "blobs")
    assert digests.check(out)
    assert kernel(out)[4095] == 4095


def test_an_item_that_is_carried_along_may_lie_behind_a_link(source, tmp_path):
    step = tmp_path / "root" / "3"
    shutil.copytree(source, step / "default")
    shutil.copyfile(source / "rules.yaml", step / "rules.yaml")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "loss.json").write_text("1.5")
    (step / "metrics").symlink_to(tmp_path / "elsewhere")
    convert(tmp_path / "root", tmp_path / "nnx", "nnx")
    assert (tmp_path / "nnx" / "3" / "metrics" / "loss.json").read_text() == "1.5"
    assert not (tmp_path / "nnx" / "3" / "metrics").is_symlink()


@pytest.mark.parametrize("make", [os.mkfifo, make_socket, lambda p: p.symlink_to("/dev/zero")])
def test_what_is_carried_along_and_is_no_file_is_refused(source, tmp_path, make):
    step = tmp_path / "root" / "3"
    shutil.copytree(source, step / "default")
    shutil.copyfile(source / "rules.yaml", step / "rules.yaml")
    (step / "metrics").mkdir()
    make(step / "metrics" / "strange")
    with pytest.raises(ValueError, match="strange is neither a file nor a folder"):
        convert(tmp_path / "root", tmp_path / "nnx", "nnx")
    assert os.listdir(tmp_path) == ["root"]


def test_a_side_file_that_fits_on_no_disk_is_refused_and_not_copied(source, tmp_path):
    step = tmp_path / "root" / "3"
    shutil.copytree(source, step / "default")
    shutil.copyfile(source / "rules.yaml", step / "rules.yaml")
    (step / "notes.txt").touch()
    os.truncate(step / "notes.txt", 1 << 43)  # without a block on disk
    with pytest.raises(TargetError, match="GB free, the conversion needs"):
        convert(tmp_path / "root", tmp_path / "nnx", "nnx")
    assert os.listdir(tmp_path) == ["root"]
