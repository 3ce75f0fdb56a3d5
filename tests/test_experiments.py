"""The experiments as they are in configs/: they learn what their files promise."""

import json
from pathlib import Path
from typing import Any

import pytest

from training import compose, datasets, loop


def train(tmp_path: Path, *overrides: str) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Trains an experiment unchanged; returns its evaluation rows and the baselines of its data."""
    cfg = compose(*overrides, f"run_dir={tmp_path / 'run'}")
    loop.train(cfg)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["split"] == "eval"]
    return rows, datasets.load(datasets.create(cfg.data)).baselines


@pytest.mark.long
def test_lm_beats_the_bigram_model_in_two_thirds_of_its_steps(tmp_path: Path) -> None:
    rows, baselines = train(tmp_path, "experiment=lm", "steps=400")
    assert rows[-1]["loss"] < baselines["bigram"] < baselines["uniform"]


@pytest.mark.long
def test_digits_reaches_97_percent(tmp_path: Path) -> None:
    rows, baselines = train(tmp_path, "experiment=digits")
    assert rows[-1]["accuracy"] >= 0.97 > baselines["majority"]


@pytest.mark.slow
def test_diabetes_beats_the_mean_by_two_fifths(tmp_path: Path) -> None:
    rows, baselines = train(tmp_path, "experiment=diabetes")
    assert rows[-1]["loss"] < 0.6 * baselines["mean"]
