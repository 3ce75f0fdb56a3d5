"""The ladder's page and the examples of its docstrings do what they say."""

import doctest
from importlib import import_module

import pytest
from pages import ROOT, blocks

MODULES = sorted(path.stem for path in (ROOT / "linen_nnx" / "ladder").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", [*(f"ladder.{name}" for name in MODULES), "book.draws"])
def test_the_examples_of_a_module_are_true(name: str) -> None:
    module = import_module(f"linen_nnx.{name}")

    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)

    assert result.failed == 0
    if name in ("ladder.ladder", "ladder.stage", "ladder.view", "book.draws"):
        assert result.attempted >= 2


def test_the_page_runs_as_it_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    page = blocks(ROOT / "docs" / "ladder.md")
    page = [block for block in page if block.language == "python"]
    scope: dict[str, object] = {}

    for block in page:
        exec(block.text, scope)

    assert len(page) == 3
    out = capsys.readouterr().out
    assert "Pair(linen=Draw(path='dropout/Dropout_0'" in out
