"""The ladder's page does what it says."""

import pytest
from pages import ROOT, blocks


def test_the_page_runs_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    page = blocks(ROOT / "docs" / "ladder.md")
    page = [block for block in page if block.language == "python"]
    scope: dict[str, object] = {}

    for block in page:
        exec(block.text, scope)

    assert len(page) == 3
    out = capsys.readouterr().out
    assert "Pair(linen=Draw(path='dropout/Dropout_0'" in out
