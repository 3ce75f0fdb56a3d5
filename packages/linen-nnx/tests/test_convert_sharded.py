"""Checkpoints of sharded arrays convert, and restore on other numbers of devices."""

import subprocess
import sys
from pathlib import Path

import pytest
from convert_helpers import RENAMES

from linen_nnx import RuleBook
from linen_nnx.disk.convert import convert
from linen_nnx.disk.item import read_item
from linen_nnx.disk.stream import ItemReader
from linen_nnx.proof.verify import verify

SCRIPT = Path(__file__).with_name("sharded.py")


def script(*arguments):
    subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], check=True)


def content(path):
    item = read_item(path)
    arrays = ItemReader([item]).read(item.leaves)
    return {leaf.path: a.tobytes() for leaf, a in zip(item.leaves, arrays, strict=True)}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("sharded") / "linen"
    script("save", 4, path)
    return path


def test_two_by_two_shards_restore_on_one_two_and_four_devices(source, tmp_path):
    rules = RuleBook(r for r in RENAMES.rules if "blk" in str(r))
    convert(source, tmp_path / "nnx", "nnx", rules=rules)
    for devices in (1, 2, 4):
        script("check", devices, tmp_path / "nnx")


STACK = {"op": "stack", "capture": "i", "axis": 1}
CHANGES = {
    "stack": ("blocks", [STACK]),
    "transpose": ("blocks/{i}", [{"op": "transpose", "perm": [1, 0]}]),
    "reshape": ("blocks/{i}", [{"op": "reshape", "linen": [8, 8], "nnx": [64]}]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_shards_survive_what_changes_their_shape(source, tmp_path, name):
    nnx, ops = CHANGES[name]
    rule = {"linen": "params/blk_{i}/kernel", "nnx": f"{nnx}/kernel", "ops": ops}
    rules = RuleBook.from_dict({"version": 1, "rules": [rule]})
    convert(source, tmp_path / "nnx", "nnx", rules=rules)
    convert(tmp_path / "nnx", tmp_path / "back", "linen")
    for before, after in ((source, tmp_path / "nnx"), (tmp_path / "nnx", tmp_path / "back")):
        assert all(check.passed is not False for check in verify(before, after))
    assert content(tmp_path / "back") == content(source)


def test_parts_cut_and_joined_at_chunk_borders_decode_nothing(source, tmp_path):
    split = {
        "linen": "params/blk_{i}/kernel",
        "nnx": ["blocks/{i}/left", "blocks/{i}/right"],
        "ops": [{"op": "concat", "axis": 1}],
    }
    rules = RuleBook.from_dict({"version": 1, "rules": [split]})
    result = convert(source, tmp_path / "nnx", "nnx", rules=rules)
    assert result.reports[0]["leaves"] == {"chunks": 26}
    result = convert(tmp_path / "nnx", tmp_path / "back", "linen")
    assert result.reports[0]["leaves"] == {"chunks": 13}
    assert all(check.passed is not False for check in verify(tmp_path / "nnx", tmp_path / "back"))
