"""What the documentation shows is done here, as it is written."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import QUIET, STAGES

from linen_nnx import RuleBook, Twin, suggest

ROOT = Path(__file__).parent.parent
PARTS = ("configs", "linen_nnx", "model", "training", "train.py", "convert.py")


def project(folder: Path) -> Path:
    """A copy of what the project runs on."""
    skip = shutil.ignore_patterns("__pycache__")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=skip)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def python(folder: Path, *arguments: str) -> str:
    """Runs a script of the copy; returns its output."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def train(folder: Path, run: str, *overrides: str) -> bytes:
    """Trains in the copy; returns metrics.jsonl."""
    python(folder, "train.py", *overrides, *QUIET, f"run_dir={run}")
    return (folder / run / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_family_added_as_the_page_shows_trains_alike_at_all_stages(tmp_path: Path) -> None:
    folder = project(tmp_path)
    text = (ROOT / "docs" / "family.md").read_text()
    files = re.findall(r"`([\w/.]+)`:\n\n```\w+\n(.*?)```", text, re.DOTALL)
    assert len(files) == 5 + 1
    for name, content in files:
        assert not (folder / name).exists()
        (folder / name).write_text(content)

    curves = {train(folder, s, "experiment=gated", "steps=30", f"stage={s}") for s in STAGES}

    assert len(curves) == 1
    rows = map(json.loads, curves.pop().splitlines())
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_twin_of_the_migration_page_yields_the_rule_book_of_its_family() -> None:
    twin = Twin.load(str(ROOT / "docs" / "twin_example.py") + ":TWIN")
    book = RuleBook.load(ROOT / "configs" / "rules" / "mlp.yaml")

    assert [str(rule) for rule in suggest(twin).rules] == [str(rule) for rule in book.rules]


@pytest.mark.slow
def test_after_the_last_rung_linen_can_be_removed(tmp_path: Path) -> None:
    folder = project(tmp_path)
    whole = train(folder, "whole", "experiment=diabetes", "steps=20", "stage=linen")
    first = train(folder, "old", "experiment=diabetes", "steps=20", "stage=linen", "stop_at=10")
    python(folder, "convert.py", "run", "old", "new", "--to", "nnx")

    shutil.rmtree(folder / "model" / "linen")
    shutil.rmtree(folder / "configs" / "rules")

    on = ("experiment=diabetes", "steps=20", "stage=nnx", "init=native")
    assert train(folder, "new", *on) == whole
    assert whole.startswith(first)
    train(folder, "fresh", *on)
