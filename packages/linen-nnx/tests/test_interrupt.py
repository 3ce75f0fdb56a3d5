"""Ctrl-C ends a command with one line, and leaves nothing behind, however often it is pressed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from convert_helpers import save_small

from linen_nnx import cli
from linen_nnx.disk import convert, planning, sources

ROOT = Path(__file__).parent.parent
# The converter in a process of its own, whose copies take for ever and say when they begin.
SLOW = """
import os, time
def copy(old, new, most):
    os.write(2, b"copying\\n")
    time.sleep(0.2)
    return os.sendfile(new, old, None, 1)
os.copy_file_range = copy
from linen_nnx.cli import program
raise SystemExit(program())
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("source") / "linen")


@pytest.mark.parametrize("times", [1, 2, 5])
def test_pressing_it_while_files_are_copied_leaves_nothing(source, tmp_path, times):
    words = ["run", str(source), str(tmp_path / "nnx"), "--to", "nnx"]
    command = [sys.executable, "-c", SLOW, *words]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == "copying\n"
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(0.05)
        lines = [line for line in process.stderr.read().splitlines() if line != "copying"]
        assert process.wait() == 130
    assert lines == ["interrupted: nothing was left behind"]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "place", "name"),
    [
        (["inspect", "SOURCE"], sources, "find"),
        (["plan", "SOURCE", "--to", "nnx"], planning, "plan_conversion"),
        (["run", "SOURCE", "OUT", "--to", "nnx"], convert, "write_store"),
        (["run", "SOURCE", "OUT", "--to", "nnx"], convert, "publish"),
    ],
)
def test_every_command_ends_with_one_line(
    source, tmp_path, monkeypatch, capsys, words, place, name
):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, name, interrupt)
    paths = {"SOURCE": str(source), "OUT": str(tmp_path / "nnx")}
    assert cli.main([paths.get(word, word) for word in words]) == 130
    assert capsys.readouterr().err == "interrupted: nothing was left behind\n"
    assert os.listdir(tmp_path) == []
