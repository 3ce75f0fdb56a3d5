"""A run that changes stage on its way draws the curve of one that does not, bit for bit."""

from pathlib import Path

import pytest
import yaml
from conftest import STAGES, Train
from linen_nnx import convert

from training.runtime.runs import RUNS

HALF = 20
OPTIONS = (f"steps={2 * HALF}", f"eval.every={HALF // 2}", "optimizer.warmup=5",
           "optimizer.ema=0.9", "optimizer.accumulate=2", "model.dropout=0.1")  # fmt: skip


def rows(run_dir: Path) -> list[bytes]:
    return (run_dir / "metrics.jsonl").read_bytes().splitlines()


@pytest.mark.sampled(1)
@pytest.mark.parametrize("before", STAGES)
@pytest.mark.parametrize(
    "experiment",
    ["diabetes", *(pytest.param(name, marks=pytest.mark.long) for name in ("digits", "lm"))],
)
def test_a_change_of_stage_in_mid_run_does_not_move_the_curve(
    train: Train, experiment: str, before: str
) -> None:
    whole = train(experiment, *OPTIONS, f"stage={before}")
    first = train(experiment, *OPTIONS, f"stage={before}", f"stop_at={HALF}")
    assert len(rows(whole)) == 2 * HALF + 4
    for after in STAGES:
        if after != before:
            second = train(experiment, *OPTIONS, f"stage={after}", f"init_from={first}")
            assert rows(second) == rows(whole), f"{before} -> {after}"


@pytest.mark.sampled(1)
@pytest.mark.parametrize("experiment", ["digits", "lm", "diabetes"])
def test_one_run_climbs_all_four_rungs(train: Train, tmp_path: Path, experiment: str) -> None:
    """The first two changes through `init_from`, the last by converting the run directory."""
    whole = train(experiment, *OPTIONS, "stage=linen")
    run_dir = None
    for stage, end in zip(STAGES[:3], (HALF // 2, HALF, HALF + HALF // 2), strict=True):
        start = [] if run_dir is None else [f"init_from={run_dir}"]
        run_dir = train(experiment, *OPTIONS, f"stage={stage}", f"stop_at={end}", *start)
    assert run_dir is not None
    last = tmp_path / "last"
    convert(run_dir, last, "nnx", runs=RUNS)
    train(experiment, *OPTIONS, "stage=nnx", f"init_from={run_dir}", f"run_dir={last}")

    assert rows(last) == rows(whole)
    stages = yaml.safe_load((last / "config.yaml").read_text())["stages"]
    changes = [str(quarter * HALF // 2) for quarter in range(4)]
    assert stages == dict(zip(changes, STAGES, strict=True))
