"""What the documentation says of families and of leaving Linen is done here, as it is written."""

import json
from pathlib import Path

import pytest
from conftest import STAGES
from linen_nnx import RuleBook, Twin, TwinError, suggest
from pages import ROOT, Shell, blocks, follow, project


@pytest.mark.long
def test_a_family_added_as_the_page_shows_trains_alike_at_all_stages(tmp_path: Path) -> None:
    shell, page = Shell(project(tmp_path)), blocks(ROOT / "docs" / "family.md")
    assert len([block for block in page if block.file]) == 5

    follow(page, shell)

    for stage in ("linen", "linen_in_nnx"):  # the page shows the other two
        shell.run(f"python train.py experiment=gated stage={stage}")
    runs = [tmp_path / "runs" / f"gated-{stage}" for stage in STAGES]
    curves = {(run / "metrics.jsonl").read_bytes() for run in runs}
    assert len(curves) == 1
    rows = map(json.loads, curves.pop().splitlines())
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_the_twin_of_an_experiment_yields_the_rule_book_of_its_family() -> None:
    twin = Twin.load("training.twins:diabetes")
    book = RuleBook.load(ROOT / "model" / "mlp" / "rules.yaml")

    assert [str(rule) for rule in suggest(twin).rules] == [str(rule) for rule in book.rules]


def test_an_experiment_that_there_is_not_has_no_twin() -> None:
    with pytest.raises(TwinError, match=r"training\.twins has no `diabetess`"):
        Twin.load("training.twins:diabetess")
