"""What is made of the metrics of several runs: pictures, tables."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from training import plot, table
from training.runtime.errors import Refused


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs, the second of which has changed stage and learnt faster."""
    for number, stages in enumerate(({"0": "linen"}, {"0": "linen", "20": "nnx"}), 1):
        run = tmp_path / f"run{number}"
        run.mkdir()
        config = {"stage": "nnx", "seed": 0, "optimizer": {"lr": number / 10, "warmup": number}}
        (run / "config.yaml").write_text(yaml.safe_dump({**config, "stages": stages}))
        lines = []
        for step in range(10, 50, 10):
            for split, loss in (("train", 4.0), ("eval", 5.0)):
                values = {"step": step, "split": split, "loss": loss / (step * number)}
                lines.append(json.dumps(values | {"accuracy": step / 50}))
        (run / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return tmp_path


def test_a_run_that_has_moved_is_one_line_with_a_mark(runs: Path, tmp_path: Path) -> None:
    found = plot.curves([runs], "loss")
    assert [curve.stages for curve in found] == [[(0, "linen")], [(0, "linen"), (20, "nnx")]]
    assert [step for step, _ in found[1].train] == [10, 20, 30, 40]

    drawn = plot.text(found, "loss", 80, log=True)
    assert max(map(len, drawn.split("\n")[:-2])) == 80
    assert drawn.split("\n")[-1].endswith("run2: linen from step 0, nnx from step 20")
    plot.draw(found, "loss", tmp_path / "curves.png", log=False)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")

    with pytest.raises(Refused, match="has no metric los; it has accuracy, loss"):
        plot.curves([runs], "los")


def test_a_table_fits_a_terminal_and_is_whole_elsewhere(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = table.results([runs])
    best = {"run": str(runs / "run2"), "optimizer.lr": 0.2, "optimizer.warmup": 2, "step": 40}
    assert rows[0] == best | {"lowest loss": 5 / 80, "loss": 5 / 80, "accuracy": 0.8}

    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    for width in (80, 120):
        for block in table._blocks(cells, width):
            assert len(block.split("\n")) == 3
            assert max(map(len, block.split("\n"))) <= max(width, len(str(runs)) + 30)
    assert len(list(table._blocks(cells, None))) == 1

    table.show([runs])
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_other_programs_read_every_digit(runs: Path) -> None:
    def printed(form: str) -> str:
        command = [sys.executable, "-m", "training.table", str(runs), form]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    rows = table.results([runs])
    assert json.loads(printed("--json")) == rows
    read = list(csv.DictReader(printed("--csv").splitlines()))
    assert read == [{name: str(value) for name, value in row.items()} for row in rows]
