"""However and whenever a run is told to stop, it ends with one line and its own exit code."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import QUIET, SMALL

from training.runtime import signals

ROOT = Path(__file__).parent.parent
NUMBERS = (signal.SIGINT, signal.SIGTERM)

STARTING = "from training.runtime import signals\nsignals.end_on_signals()"
TRAINING = f"{STARTING}\ncounted = signals.counted()\ncounted.__enter__()"
WAITS = "print('ready', flush=True)\nwhile True: pass"


def started(script: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", f"{script}\n{WAITS}"],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_before_training_ends_the_process_with_one_line(number: signal.Signals) -> None:
    process = started(STARTING)
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == signals.exit_code(number)
    assert errors == f"{number.name}: ended at once.{signals.GOES_ON}\n"


@pytest.mark.parametrize("number", NUMBERS)
def test_a_second_signal_ends_a_training_process_with_one_more_line(number: signal.Signals) -> None:
    process = started(TRAINING)
    assert process.stderr is not None
    process.send_signal(number)
    assert process.stderr.readline() == f"{number.name}: saving after this step.\n"
    assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == signals.exit_code(number)
    assert errors.count("\n") == 1


def test_handlers_are_put_back_after_training() -> None:
    before = [signal.getsignal(number) for number in NUMBERS]
    with signals.counted() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
    assert [signal.getsignal(number) for number in NUMBERS] == before


def importing(run_dir: Path, output: Path) -> bool:
    return True


def compiling(run_dir: Path, output: Path) -> bool:
    return "from scratch" in output.read_text()


def stepping(run_dir: Path, output: Path) -> bool:
    return len(list((run_dir / "checkpoints").glob("[0-9]*"))) > 1


@pytest.mark.sampled(1)
@pytest.mark.parametrize("moment", [importing, compiling, stepping])
def test_a_double_interrupt_ends_a_run_without_a_traceback(
    tmp_path: Path, moment: Callable[[Path, Path], bool]
) -> None:
    """While stepping, this run evaluates and saves after each step."""
    output, run_dir = tmp_path / "output", tmp_path / "run"
    settings = [*SMALL["diabetes"], *QUIET, f"run_dir={run_dir}", "steps=4000",
                "checkpoint.every=1", "eval.every=1"]  # fmt: skip
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *settings],
            cwd=ROOT, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        time.sleep(0.3)
        while not moment(run_dir, output):
            time.sleep(0.01)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        code = process.wait(timeout=300)

    assert code == 130
    text = output.read_text()
    assert "Traceback" not in text and "rror" not in text
    assert text.count("goes on from") == 1
