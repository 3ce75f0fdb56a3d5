"""Ctrl-C and SIGTERM end a command with one line, and leave nothing behind, however often."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from convert_helpers import save_small

from linen_nnx import cli
from linen_nnx.cli import stopping
from linen_nnx.disk import convert, finding, planning, targets

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


@pytest.mark.parametrize(
    ("number", "times"),
    [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGINT, 5), (signal.SIGTERM, 2)],
)
def test_a_signal_while_files_are_copied_leaves_nothing(source, tmp_path, number, times):
    words = ["run", str(source), str(tmp_path / "nnx"), "--to", "nnx"]
    command = [sys.executable, "-c", SLOW, *words]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr.readline() == "copying\n"
        for _ in range(times):
            process.send_signal(number)
            time.sleep(0.05)
        lines = [line for line in process.stderr.read().splitlines() if line != "copying"]
        assert process.wait() == 128 + number
    assert lines == [f"{stopping.WORDS[number]}: nothing was left behind"]
    assert os.listdir(tmp_path) == []


# Signals that come where an exception does not get far: as an object is deleted, as a module that
# is being imported makes an error of its own of whatever it meets, and while a thread compiles.
HIDDEN = """
import os, signal, sys, threading, time
from linen_nnx.disk import finding
class Deleted:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
def deleted(*_, **__):
    Deleted()
    time.sleep(60)
def importing(*_, **__):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt as error:
        raise ImportError("initialization failed") from error
def compiling(*_, **__):
    from linen_nnx.infer.keys import aside
    threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
    aside(lambda: time.sleep(3600))
finding.find = globals()[sys.argv.pop()]
from linen_nnx.cli import program
raise SystemExit(program())
"""


@pytest.mark.parametrize("moment", ["deleted", "importing", "compiling"])
def test_a_signal_that_is_hidden_from_the_command_still_ends_it(moment):
    command = [sys.executable, "-c", HIDDEN, "inspect", "x", moment]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (130, "interrupted: nothing was left behind\n")


@pytest.mark.parametrize(
    ("words", "place", "name"),
    [
        (["inspect", "SOURCE"], finding, "find"),
        (["plan", "SOURCE", "--to", "nnx"], planning, "plan_conversion"),
        (["run", "SOURCE", "OUT", "--to", "nnx"], convert, "write_store"),
        (["run", "SOURCE", "OUT", "--to", "nnx"], targets, "publish"),
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
