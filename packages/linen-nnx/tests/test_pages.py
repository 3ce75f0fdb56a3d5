"""What the library's pages name exists: files, links, options, extras."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from pages import EXAMPLES, PAGES, ROOT, blocks, spans

from linen_nnx import RuleBook

# Paths in rule books and checkpoints, and what the reader's own project holds.
ELSEWHERE = {
    "hn/bias", "collection/a/b/kernel", "a/0/kernel", "old/checkpoints", "inner/{leaf}",
    "out/{leaf}", "migration/twin.py",
}  # fmt: skip


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: page.parent.name + page.stem)
def test_files_options_and_links_that_a_page_names_exist(page: Path) -> None:
    made = {block.file for block in blocks(page)}
    sources = "".join(path.read_text() for path in ROOT.glob("linen_nnx/cli/*.py"))
    sources += "".join(path.read_text() for path in ROOT.glob("examples/*/*.py"))
    for span in spans(page):
        if re.fullmatch(r"[\w.<>-]*/[\w./<>-]*", span) and span not in ELSEWHERE | made:
            assert list(ROOT.glob(span.rstrip("/"))), span
        if re.fullmatch(r"--[a-z-]+", span):
            assert f'"{span}"' in sources, span
    for target in re.findall(r"\]\((?!https:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_extras_that_are_to_be_installed_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    text = "".join(page.read_text() for page in PAGES)
    named = re.findall(r"(?:linen-nnx|[.])\[([\w,]+)\]", text)
    extras = {extra for found in named for extra in found.split(",")}
    assert extras and extras <= {*project["optional-dependencies"]}


def test_yaml_on_the_pages_is_a_rule_book() -> None:
    books = [
        RuleBook.from_dict(yaml.safe_load(block.text))
        for page in PAGES
        for block in blocks(page)
        if block.language == "yaml" and block.file is None
    ]
    assert books and all(book.rules for book in books)
