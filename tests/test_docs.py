"""What the documentation says of families and of leaving Linen is done here, as it is written."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import QUIET, STAGES
from pages import ROOT, Shell, blocks, follow, project

from linen_nnx import RuleBook, Twin, suggest


def train(shell: Shell, run: str, *overrides: str) -> bytes:
    """Trains in the copy; returns metrics.jsonl."""
    shell.run(" ".join(["python train.py", *overrides, *QUIET, f"run_dir={run}"]))
    return (shell.folder / run / "metrics.jsonl").read_bytes()


@pytest.mark.slow
def test_a_family_added_as_the_page_shows_trains_alike_at_all_stages(tmp_path: Path) -> None:
    shell, page = Shell(project(tmp_path)), blocks(ROOT / "docs" / "family.md")
    assert len([block for block in page if block.file]) == 5 + 1

    follow(page, shell)

    for stage in ("linen", "linen_in_nnx"):  # the page shows the other two
        shell.run(f"python train.py experiment=gated stage={stage}")
    runs = [tmp_path / "runs" / f"gated-{stage}" for stage in STAGES]
    curves = {(run / "metrics.jsonl").read_bytes() for run in runs}
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
    shell = Shell(project(tmp_path))
    whole = train(shell, "whole", "experiment=diabetes", "steps=20", "stage=linen")
    first = train(shell, "old", "experiment=diabetes", "steps=20", "stage=linen", "stop_at=10")
    shell.run("python convert.py run old new --to nnx")

    shutil.rmtree(tmp_path / "model" / "linen")
    shutil.rmtree(tmp_path / "configs" / "rules")

    on = ("experiment=diabetes", "steps=20", "stage=nnx", "init=native")
    assert train(shell, "new", *on) == whole
    assert whole.startswith(first)
    train(shell, "fresh", *on)
