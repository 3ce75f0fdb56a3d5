"""A disk that is full, whatever is written just then, ends the run with one message."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import QUIET, SMALL, Train
from linen_nnx import RuleBook
from linen_nnx.disk import digests

from training.runtime import checkpoints
from training.runtime.disk import system_error
from training.runtime.errors import Refused
from training.runtime.metrics import Metrics

ROOT = Path(__file__).parent.parent
SETTINGS = ("steps=12", "checkpoint.every=2", "checkpoint.keep=9")


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there")


@contextmanager
def longest_file(size: int) -> Iterator[None]:
    """Within the block the system refuses to make a file longer than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


PARTS = {
    "config.yaml": (Path, "write_text"),
    "rules.yaml": (RuleBook, "save"),
    "metrics.jsonl": (Metrics, "sync"),
    "digests": (digests, "write"),
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("part", PARTS)
def test_a_full_disk_is_one_message_whatever_is_written(
    train: Train, tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = tmp_path / "run"
    monkeypatch.setattr(*PARTS[part], full)
    with pytest.raises(Refused) as error:
        train("diabetes", *SETTINGS, f"run_dir={run_dir}")
    words = f"{run_dir} cannot be written: No space left on device (there). No checkpoint was saved"
    assert str(error.value).startswith(words)
    assert checkpoints.steps_of(run_dir / "checkpoints") == []

    monkeypatch.undo()
    assert "the same command goes on from the beginning" in str(error.value)
    train("diabetes", *SETTINGS, f"run_dir={run_dir}")


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_the_last_good_one_named(
    train: Train, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    train("diabetes", *SETTINGS, f"run_dir={run_dir}", "stop_at=4")
    capfd.readouterr()
    with longest_file(3000), pytest.raises(Refused) as error:
        train("diabetes", *SETTINGS, f"run_dir={run_dir}")

    last = run_dir / "checkpoints" / "4"
    assert str(error.value).startswith(f"{run_dir} cannot be written: File too large")
    assert f"The last good checkpoint is {last}. Put that right; then the same" in str(error.value)
    assert "Traceback" not in "".join(capfd.readouterr())

    train("diabetes", *SETTINGS, f"run_dir={run_dir}")
    whole = train("diabetes", *SETTINGS)
    assert (run_dir / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_on_the_command_line_it_is_one_message_and_exit_code_1(tmp_path: Path) -> None:
    settings = [*SMALL["diabetes"], *QUIET, *SETTINGS, f"run_dir={tmp_path / 'run'}"]
    command = [sys.executable, str(ROOT / "train.py"), *settings]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -f 6; exec "$@"', "sh", *command],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
        # Not the cache of the other tests, which would find what is written here in halves.
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "cannot be written: File too large" in done.stderr


def test_a_system_error_is_known_from_what_tensorstore_raises() -> None:
    text = "RESOURCE_EXHAUSTED: Failed to write: No space left on device [os_error_code='28']"
    assert system_error(ValueError(text)) == errno.ENOSPC
    assert system_error(ValueError("a bug")) is None
    assert system_error(OSError(errno.EIO, "Input/output error")) == errno.EIO


def test_an_error_that_is_raised_once_more_by_what_came_of_it_has_an_end() -> None:
    first, second = ValueError("of Orbax"), RuntimeError("in our words")
    second.__cause__, first.__context__ = first, second
    assert system_error(second) is None
