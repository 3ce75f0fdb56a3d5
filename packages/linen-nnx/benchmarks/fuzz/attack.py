"""Gives damaged inputs to the converter, one after another, and measures what comes of each."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz.samples import Sample, make
from linen_nnx.book.stages import STAGES
from linen_nnx.cli import main

_SECONDS = 2.0  # of processor time for one input
_STUCK = 60.0  # of the clock: on a busy machine an input may wait for its turn
_MEGABYTES = 256.0
_ROOM = 3 << 30  # bytes of addresses beyond those in use: an input that needs more is stopped


class Stuck(BaseException):
    """An input took too long; no code under test catches this."""


@dataclass(frozen=True)
class Outcome:
    """What came of one input. `fault` says what is wrong, if something is."""

    number: int
    what: str
    code: int
    seconds: float
    megabytes: float
    fault: str = ""

    def __str__(self) -> str:
        return f"input {self.number}: {self.what}\n  {self.fault or f'exit code {self.code}'}"


def run_all(folder: Path, seed: int, count: int) -> list[Outcome]:
    """Every input up to `count`, in a process of their own, and in another when that one dies."""
    outcomes: list[Outcome] = []
    log = folder / "log"
    while len(outcomes) < count:
        start = len(outcomes)
        words = ["--seed", str(seed), "--count", str(count), "--start", str(start)]
        command = [sys.executable, "-m", "benchmarks.fuzz", *words, "--log", str(log)]
        process = subprocess.Popen(command)
        while process.poll() is None:
            time.sleep(1)
            done = start + (log.read_bytes().count(b"\n") if log.exists() else 0)
            print(f"{done} of {count}", end="\r", file=sys.stderr, flush=True)
        outcomes += [Outcome(**json.loads(line)) for line in log.read_text().splitlines()]
        if len(outcomes) < count:
            fault = f"the process died: {process.returncode}"
            outcomes.append(Outcome(len(outcomes), "see --only", -1, 0, 0, fault))
    return outcomes


class Attack:
    """The inputs that follow from one seed."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        (folder / "samples").mkdir()
        self.samples = make(folder / "samples")
        self.intact = {file: file.read_bytes() for sample in self.samples for file in sample.files}

    def run_from(self, start: int, count: int, log: Path) -> None:
        """The inputs from `start` to `count`; each outcome is a line of `log` at once."""
        with log.open("w", buffering=1) as lines:
            for number in range(start, count):
                lines.write(json.dumps(vars(self.run(number))) + "\n")

    def run(self, number: int, say: bool = False) -> Outcome:
        """One input."""
        sample, file, damage, words = self._choose(number)
        random = Random(f"{self.seed} {number} damage")
        damaged = damage(random, self.intact[file])
        file.unlink()
        if isinstance(damaged, bytes):
            file.write_bytes(damaged)
        else:
            damaged(file)
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
            measured = _measured(words)
        if say:
            print(" ".join(words), out.getvalue(), measured, sep="\n")
        self._restore(file)
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        left = [path.name for path in self.folder.iterdir() if path.name.endswith(".partial")]
        if left and not measured["fault"]:
            measured["fault"] = f"left behind: {left}"
        return Outcome(number, _described(sample, file, damage, words), **measured)

    def _restore(self, file: Path) -> None:
        """Puts a file back as it was, whatever lies in its place."""
        if file.is_dir() and not file.is_symlink():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
        file.write_bytes(self.intact[file])

    def _choose(self, number: int) -> tuple[Sample, Path, Any, list[str]]:
        """The file that an input damages, how, and the command that reads it."""
        random = Random(f"{self.seed} {number} choice")
        sample = random.choice(self.samples)
        file = random.choice(list(sample.files))
        damage = random.choice(sample.files[file])
        to = "linen" if sample.folder.name == "result" else "nnx"
        rules = ["--rules", str(sample.folder / "rules.yaml")]
        if file.name == "rules.json":
            rules = ["--rules", str(file)]
        elif file.parent != sample.folder and file.name == "rules.yaml":
            rules = []
        if sample.folder.name == "run":
            rules, to = [], random.choice(list(STAGES))
        out = str(self.folder / "out")
        match random.randrange(8):
            case 0 | 1:
                return sample, file, damage, ["inspect", str(sample.path)]
            case 2:
                return sample, file, damage, ["run", str(sample.path), out, "--to", to, *rules]
            case 3 if sample.folder.name == "result":
                source = next(s for s in self.samples if s.folder.name == "tree")
                return sample, file, damage, ["verify", str(source.path), str(sample.path)]
            case _:
                return sample, file, damage, ["plan", str(sample.path), "--to", to, *rules]


def _described(sample: Sample, file: Path, damage: Any, words: list[str]) -> str:
    return f"{words[0]} of {sample.folder.name}, {file.name} by {damage.__name__}"


def _measured(words: list[str]) -> dict[str, Any]:
    """Runs a command: its exit code, its time and memory, and what is wrong with them."""
    before, start = _memory("VmRSS"), time.process_time()
    Path("/proc/self/clear_refs").write_text("5")  # forgets the largest memory so far
    code, fault = -1, ""
    try:
        with _limits():
            code = main(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else -1
    except Stuck as error:
        fault = f"stuck: {error}"
    except BaseException:
        fault = traceback.format_exc()
    seconds, megabytes = time.process_time() - start, _memory("VmHWM") - before
    if not fault and seconds > _SECONDS:
        fault = f"took {seconds:.1f} s"
    if not fault and megabytes > _MEGABYTES:
        fault = f"took {megabytes:.0f} MB"
    if not fault and code not in (0, 1):
        fault = f"exit code {code}"
    return {"code": code, "seconds": seconds, "megabytes": megabytes, "fault": fault}


def _memory(name: str) -> float:
    """A figure of this process's memory, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Stops what takes too long, and what asks for memory without an end."""

    def stop(number: int, frame: Any) -> None:
        raise Stuck(f"signal {number} in {frame.f_code.co_qualname}, line {frame.f_lineno}")

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_REAL, _STUCK)
    signal.setitimer(signal.ITIMER_PROF, 4 * _SECONDS)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (in_use + _ROOM, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.setitimer(signal.ITIMER_PROF, 0)
