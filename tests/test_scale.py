"""Runs on several devices and in several processes: the same curve, parts in their place."""

import dataclasses
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from conftest import QUIET, SMALL, STAGES, Train

from configs import schema
from configs.build import ConfigError
from training import compose
from training.assemble import Setup, prepare
from training.runtime import processes, signals
from training.runtime.errors import Refused
from training.table import results

ROOT = Path(__file__).parent.parent
ROWS = 16
# A mesh adds the rows of a batch in another order, and nothing else. Two orders of adding n float32
# numbers of one sign differ by less than 2 n u of the sum, u = 2^-24. That bounds the loss, a mean
# over rows; gradients differ as little, and move the parameters apart by that share of a step.
NOISE = 2 * ROWS * 2**-24  # 1.9e-6, relative, at each step

# Longer than a warm-up, so that the curves have room to part.
OPTIONS = (
    f"data.batch={ROWS}", "steps=40", "eval.every=10", "optimizer.warmup=2", "optimizer.lr=1e-3",
)  # fmt: skip


def curve(run_dir: Path) -> bytes:
    return (run_dir / "metrics.jsonl").read_bytes()


def assert_near(run_dir: Path, other: Path) -> None:
    """Every row of both runs has the same loss, but for the noise of adding in another order."""
    rows, others = ([json.loads(x) for x in curve(path).splitlines()] for path in (run_dir, other))
    assert [(r["step"], r["split"]) for r in rows] == [(r["step"], r["split"]) for r in others]
    losses, expected = (np.array([row["loss"] for row in lines]) for lines in (rows, others))
    apart = np.abs(losses - expected) / expected
    assert apart.max() <= NOISE, dict(enumerate(apart))


def setup(experiment: str, *overrides: str) -> Setup:
    return prepare(compose(*SMALL[experiment], *QUIET, *overrides))


def host(state: dict[str, Any]) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state)]


@pytest.mark.long
@pytest.mark.parametrize(
    ("experiment", "grid", "options"),
    [
        pytest.param("lm", "mesh.data=8", (), marks=pytest.mark.long),
        pytest.param("lm", "mesh.fsdp=8", (), marks=pytest.mark.long),
        pytest.param("lm", "mesh.data=2 mesh.fsdp=4",
         ("model.scan=true", "optimizer.ema=0.9", "optimizer.accumulate=2"),
         marks=pytest.mark.long),
        ("digits", "mesh.data=2 mesh.fsdp=4", ()),
        ("diabetes", "mesh.fsdp=8", ("optimizer=lion", "optimizer.lr=2e-4")),
    ],
    ids=["lm-data", "lm-fsdp", "lm-scan-both", "digits-both", "diabetes-fsdp"],
)  # fmt: skip
def test_a_mesh_draws_the_curve_of_one_device_and_four_stages_one_curve(
    train: Train, experiment: str, grid: str, options: tuple[str, ...]
) -> None:
    one = train(experiment, *OPTIONS, *options)
    runs = [train(experiment, *OPTIONS, *options, *grid.split(), f"stage={s}") for s in STAGES]

    assert_near(runs[0], one)
    for run in runs[1:]:
        assert curve(run).splitlines() == curve(runs[0]).splitlines()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("experiment", ["lm", "digits"])
def test_each_device_holds_an_eighth(experiment: str, stage: str) -> None:
    options = (f"stage={stage}", "mesh.fsdp=8", "optimizer.ema=0.9", "model.depth=1")
    made = setup(experiment, *options)
    batch = made.program.place(made.example)

    state, _ = made.program.train_step(made.program.init(), batch)

    parts = {"params": state["params"], "ema": state["ema"], "opt": state["opt_state"]}
    whole, held = 0, 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
        divisible = any(size % 8 == 0 for size in leaf.shape)
        sizes = {shard.data.nbytes for shard in leaf.addressable_shards}
        assert sizes == {leaf.nbytes // 8 if divisible else leaf.nbytes}, path
        assert len({shard.device for shard in leaf.addressable_shards}) == 8
        whole, held = whole + leaf.nbytes, held + max(sizes)
    assert whole / 8 <= held < whole / 7.5


@pytest.mark.parametrize("experiment", ["lm", "digits", "diabetes"])
def test_a_mesh_starts_from_the_same_bits(experiment: str) -> None:
    """Parts of eight numbers: in narrower ones XLA rounds otherwise, from jax 0.12 on."""
    whole, cut = setup(experiment), setup(experiment, "mesh.fsdp=4")
    assert host(cut.program.init()) == host(whole.program.init())


def test_a_stack_of_layers_lies_as_its_layers_do() -> None:
    """Were it cut between layers instead, its gradient's norm would round differently."""
    made = setup("lm", "stage=linen", "model.scan=true", "model.depth=8", "mesh.fsdp=8")
    params = made.program.abstract["params"]["encoder"]["ScanBlock"]
    for leaf in jax.tree.leaves(params):
        assert leaf.shape[0] == 8
        assert leaf.sharding.shard_shape(leaf.shape)[0] == 8
        assert leaf.sharding.shard_shape(leaf.shape) != leaf.shape


def test_what_cannot_be_divided_is_said(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train("diabetes", "steps=1", "mesh.fsdp=4")
    words = " ".join(capsys.readouterr().out.split())  # lines end at 80 columns
    assert "mesh: 4 devices, data 1 x fsdp 4, of 8; each holds 3 of the state's 9 kB" in words
    assert "cannot be divided: head/Dense_0/bias [1], head/Dense_0/kernel [74, 1]" in words


def test_one_device_of_several_is_said(train: Train, capsys: pytest.CaptureFixture[str]) -> None:
    train("diabetes", "steps=1")
    assert "mesh: 1 device of 8; mesh.data=-1 uses all" in capsys.readouterr().out


def test_the_rest_of_the_devices() -> None:
    for asked, shape in {
        "mesh.data=-1": {"data": 8, "fsdp": 1},
        "mesh.fsdp=-1 mesh.data=2": {"data": 2, "fsdp": 4},
    }.items():
        layout: Any = setup("diabetes", *asked.split()).layout
        assert dict(layout.mesh.shape) == shape


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ("mesh.data=3", "mesh.data=3 mesh.fsdp=1: 3 does not divide the 8 devices"),
        ("mesh.data=4 mesh.fsdp=4", "16 does not divide the 8 devices"),
        ("mesh.data=-1 mesh.fsdp=3", "3 does not divide the 8 devices"),
        ("mesh.data=8 data.batch=12", "data.batch is 12, which 8 devices .* a multiple of 8"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(
    train: Train, tmp_path: Path, asked: str, reason: str
) -> None:
    with pytest.raises(Refused, match=reason):
        train("diabetes", f"run_dir={tmp_path / 'run'}", *asked.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.long
@pytest.mark.parametrize("after", ["mesh.data=2 mesh.fsdp=2", "", "mesh.data=4", "mesh.fsdp=8"])
def test_a_run_saved_on_eight_devices_goes_on_with_others(train: Train, after: str) -> None:
    options = (*OPTIONS, "optimizer.ema=0.9")
    before = ["mesh.data=2", "mesh.fsdp=4"]
    whole = train("digits", *options, *before)
    parts = train("digits", *options, *before, "stop_at=20")
    assert curve(parts) == b"".join(curve(whole).splitlines(keepends=True)[:22])

    train("digits", *options, *after.split(), f"run_dir={parts}")

    assert_near(parts, whole)


@pytest.mark.long
def test_a_run_goes_on_with_the_same_mesh_bit_for_bit(train: Train) -> None:
    whole = train("lm", *OPTIONS, "mesh.fsdp=8")
    parts = train("lm", *OPTIONS, "mesh.fsdp=8", "stop_at=15")
    train("lm", *OPTIONS, "mesh.fsdp=8", f"run_dir={parts}")
    assert curve(parts) == curve(whole)


@pytest.mark.long
def test_a_run_on_eight_devices_goes_on_at_another_stage(train: Train, tmp_path: Path) -> None:
    from linen_nnx.cli import main

    whole = train("digits", *OPTIONS, "mesh.fsdp=8")
    first = train("digits", *OPTIONS, "mesh.fsdp=8", "stop_at=20", "stage=linen")

    second = train("digits", *OPTIONS, "mesh.fsdp=8", "stage=nnx", f"init_from={first}")
    words = ["run", str(first), str(tmp_path / "moved"), "--to", "nnx"]
    assert main(words, runs="training.runtime.runs:RUNS") == 0
    train("digits", *OPTIONS, "stage=nnx", f"run_dir={tmp_path / 'moved'}")

    assert curve(second) == curve(whole)
    assert_near(tmp_path / "moved", whole)


class Pair:
    """One run of two processes with two devices each, on this machine."""

    def __init__(self, run_dir: Path, experiment: str, *overrides: str, each: Any = ((), ())):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
        settings = [*SMALL[experiment], *QUIET, f"run_dir={run_dir}", *overrides]
        settings += [f"distributed.coordinator={address}", "distributed.num_processes=2"]
        self.processes = [
            subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *settings,
                 f"distributed.process_id={index}", *each[index]],
                cwd=ROOT, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )
            for index in range(2)
        ]  # fmt: skip

    def end(self) -> list[tuple[int, str, str]]:
        """Exit code, stdout and stderr of each; raises if they hang."""
        try:
            texts = [process.communicate(timeout=300) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()
        return [(p.returncode, *text) for p, text in zip(self.processes, texts, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "grid"),
    [
        pytest.param("digits", "mesh.data=-1 mesh.fsdp=2", marks=pytest.mark.long),
        ("diabetes", "mesh.data=-1 mesh.fsdp=2"),
        pytest.param("lm", "mesh.fsdp=4", marks=pytest.mark.long),
    ],
)
def test_two_processes_draw_the_curve_of_one(
    train: Train, tmp_path: Path, experiment: str, grid: str
) -> None:
    shown = ("log.samples=4", "log.tensorboard=true", "log.histograms_every=20")
    options = (*OPTIONS, *grid.split(), "eval.every=20", "checkpoint.every=15", *shown)
    alone = train(experiment, *OPTIONS, "eval.every=20", "mesh.data=4")

    ends = Pair(tmp_path / "pair", experiment, *options).end()

    assert [code for code, _, _ in ends] == [0, 0], ends
    assert_near(tmp_path / "pair", alone)
    assert "in 2 processes" in ends[0][1]
    assert ends[1][1].count("\n") == ends[1][1].count("[Gloo]")  # one writer
    assert len(list((tmp_path / "pair").glob("events.*"))) == 1
    assert "process_id: 0" in (tmp_path / "pair" / "config.yaml").read_text()


@pytest.mark.long
def test_a_run_saved_on_eight_devices_goes_on_in_two_processes_and_back(
    train: Train, tmp_path: Path
) -> None:
    whole = train("digits", *OPTIONS, "mesh.fsdp=8")
    parts = train("digits", *OPTIONS, "mesh.fsdp=8", "stop_at=15")

    ends = Pair(parts, "digits", *OPTIONS, "mesh.data=2", "mesh.fsdp=2", "stop_at=25").end()

    assert [code for code, _, _ in ends] == [0, 0], ends
    (saved,) = (path for path in (parts / "checkpoints").iterdir() if path.name == "25")
    assert {"process_0", "process_1"} <= {
        path.name.removeprefix("ocdbt.") for path in (saved / "state").iterdir()
    }
    assert (saved / "digests.json").exists()
    train("digits", *OPTIONS, f"run_dir={parts}")
    assert_near(parts, whole)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(("number", "to"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_to_one_process_stops_both_after_the_same_step(
    train: Train, tmp_path: Path, number: int, to: int
) -> None:
    options = (f"data.batch={ROWS}", "steps=100000", "checkpoint.every=1000000")
    run_dir = tmp_path / "pair"
    pair = Pair(run_dir, "diabetes", *options, "mesh.data=4", "eval.every=1000000")
    file = run_dir / "metrics.jsonl"
    while pair.processes[0].poll() is None and not (file.exists() and file.stat().st_size):
        time.sleep(0.1)

    pair.processes[to].send_signal(number)
    ends = pair.end()

    assert [code for code, _, _ in ends] == [signals.exit_code(signal.SIGTERM)] * 2, ends
    assert "The same command goes on from there" in " ".join(ends[0][1].split())
    (saved,) = (run_dir / "checkpoints").iterdir()
    assert curve(run_dir).count(b"\n") == int(saved.name)


@pytest.mark.long
def test_what_one_process_finds_wrong_ends_both_with_its_message(tmp_path: Path) -> None:
    held = tmp_path / "held"
    held.mkdir()
    holder = os.open(held, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    cases: dict[str, Any] = {
        "held": ("Another process is training in", ((), ())),
        "other": ("Process 1 of 2 was started with another configuration", ((), ("seed=1",))),
        "some": ("uses 1 of the 4 devices of 2 processes", (("mesh.data=1",),) * 2),
    }
    for name, (reason, each) in cases.items():
        ends = Pair(tmp_path / name, "diabetes", "steps=1", "mesh.data=4", each=each).end()
        for code, _, errors in ends:
            assert code == 1
            assert reason in errors
        assert "Process 0 of 2: Another process" in ends[1][2] or name != "held"
    assert not (tmp_path / "other").exists()
    os.close(holder)


@pytest.mark.long
def test_a_process_that_dies_takes_the_other_with_it(train: Train, tmp_path: Path) -> None:
    """Not left waiting for ever in a step that never ends."""
    options = ("data.batch=16", "steps=100000", "checkpoint.every=50", "mesh.data=4")
    run_dir = tmp_path / "pair"
    pair = Pair(run_dir, "diabetes", *options)
    while pair.processes[0].poll() is None and not (run_dir / "checkpoints" / "50").exists():
        time.sleep(0.1)

    pair.processes[1].kill()
    ends = pair.end()

    assert all(code != 0 for code, _, _ in ends)
    train("diabetes", *options, "stop_at=200", f"run_dir={run_dir}")
    steps = [json.loads(row)["step"] for row in curve(run_dir).splitlines()]
    assert steps[0] == 1 and steps == sorted(steps)


@pytest.mark.long
def test_nothing_grows_over_five_thousand_steps(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "growth.py"), str(tmp_path / "run"), "5000"]
    command += ["checkpoint.every=1000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = json.loads(output.stdout.splitlines()[-1])
    begin, end = rows[19], rows[-1]
    assert (begin["step"], end["step"]) == (2000, 5000)

    assert {row["compilations"] for row in rows} == {end["compilations"]}  # from the first one on
    # A save that is still being written has files open.
    assert min(row["files"] for row in rows[25:]) == min(row["files"] for row in rows[:25])
    # Half a kilobyte a step would show. (TensorStore 0.1.86 itself loses some 50 kB at each save.)
    assert end["kilobytes"] - begin["kilobytes"] < 1500, rows


@pytest.mark.parametrize(
    ("environment", "joins"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "4"}, False),  # a batch script: only srun starts four
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-2]"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_STEP_NODELIST": "node1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"JAX_COORDINATOR_ADDRESS": "host:1234"}, True),
    ],
)
def test_processes_that_a_launcher_has_started_meet(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], joins: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    joined: list[Any] = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: joined.append(args))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    processes.join(dataclasses.asdict(compose("experiment=diabetes")))

    assert joined == [(environment.get("JAX_COORDINATOR_ADDRESS"), None, None)] * joins


def test_processes_are_counted_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "COORDINATOR_ADDRESS": "a:1",
        "NUM_PROCESSES": "4",
        "PROCESS_ID": "3",
    }.items():
        monkeypatch.setenv(f"JAX_{name}", value)
    assert compose("experiment=diabetes").distributed == schema.Distributed("a:1", 4, 3)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ("mesh.data=0", "mesh.data: got 0; expected a whole number, at least 1, or -1"),
        ("mesh.data=-1 mesh.fsdp=-1", "mesh.fsdp: got -1, with data -1: only one"),
        ("mesh.fsdp=-2", "mesh.fsdp: got -2"),
        ("distributed.num_processes=2 distributed.process_id=0", "coordinator: got null"),
        ("distributed.coordinator=a", "coordinator: got 'a'; expected host:port"),
        ("distributed.coordinator=a:1 distributed.process_id=1", "num_processes: got null"),
        (
            "distributed.coordinator=a:1 distributed.num_processes=2 distributed.process_id=2",
            "process_id: got 2; expected 0 to 1",
        ),
    ],
)
def test_a_mesh_or_processes_that_cannot_be_are_refused(overrides: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        compose("experiment=diabetes", *overrides.split())


@pytest.mark.long
def test_a_sweep_gives_each_run_its_folder_and_the_table_has_a_line_for_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = ("--multirun", "experiment=sweep", "steps=2", "model.width=4", "seed=0")
    subprocess.run([sys.executable, ROOT / "train.py", *sweep], cwd=tmp_path, check=True)

    (folder,) = (path for path in (tmp_path / "runs").iterdir() if path.is_dir())
    names = {f"nnx_in_linen-lr{lr}-seed0" for lr in ("0.0003", "0.001", "0.003")}
    assert {path.name for path in folder.iterdir()} == names
    rows = results([folder])
    assert list(rows[0])[:3] == ["run", "optimizer.lr", "step"]  # what does not vary is not shown
    losses = [row["lowest loss"] for row in rows]
    assert losses == sorted(losses)
    assert {row["run"] for row in rows} == {str(folder / name) for name in names}


@pytest.mark.long
def test_a_second_start_finds_the_programs_compiled(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    kept: list[set[str]] = []
    for name in ("first", "second"):
        command = [sys.executable, str(ROOT / "train.py"), *SMALL["lm"], "steps=1"]
        command += [f"run_dir={tmp_path / name}", f"compile_cache={cache}"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        kept.append({path.name for path in cache.iterdir() if path.name.endswith("-cache")})
    assert kept[0]
    assert kept[0] == kept[1]
    assert curve(tmp_path / "first") == curve(tmp_path / "second")
