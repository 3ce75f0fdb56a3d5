"""The examples work from their own README lines: each command as written, each quote as printed."""

import difflib
import re
import runpy
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from conftest import STAGES
from flax.traverse_util import flatten_dict
from pages import ROOT, Shell, blocks, follow

from linen_nnx import RuleBook, Twin, suggest

EXAMPLES = ROOT / "examples"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A folder where the README's commands find the project, and leave their files."""
    (tmp_path / "examples").symlink_to(EXAMPLES)
    return Shell(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.long) for name in ("train_state", "vit", "seq2seq")]
    + ["bert"],
)
def test_an_example_works_from_its_own_readme_lines(shell, name):
    follow(blocks(EXAMPLES / name / "README.md"), shell)


def test_every_example_is_run_and_linked():
    folders = {path.parent.name for path in EXAMPLES.glob("*/README.md")}
    assert folders == {"train_state", "vit", "seq2seq", "bert"}
    assert all(f"examples/{name}/README.md" in (ROOT / "README.md").read_text() for name in folders)


def test_the_difference_that_the_page_shows_is_the_whole_one():
    old, new = (
        (EXAMPLES / "train_state" / name).read_text().splitlines()
        for name in ("train_linen.py", "train_ladder.py")
    )
    differences = [
        line for line in difflib.unified_diff(old, new, n=0) if line[:2] not in ("@@", "--", "++")
    ]
    (shown,) = [x for x in blocks(EXAMPLES / "train_state/README.md") if x.language == "text"]
    is_code = [line for line in differences if line[1:] and not re.match(r'.("""|python )', line)]
    assert is_code == shown.text.splitlines()


@pytest.mark.long
def test_the_rules_for_bert_are_those_that_the_code_suggests():
    twin = Twin.load(f"{EXAMPLES}/bert/twin.py:twin")
    shapes = jax.eval_shape(twin.linen().init, jax.random.key(0), *twin.inputs())
    numbers = iter(range(10**6))
    leaves = {
        path: np.full(leaf.shape, next(numbers), np.int32)
        for path, leaf in flatten_dict(shapes, sep="/").items()
    }
    ours, theirs = (
        book.to_nnx(leaves) for book in (RuleBook.load(EXAMPLES / "bert/rules.yaml"), suggest(twin))
    )
    assert len(ours) == 206
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}


@pytest.mark.long
def test_stranded_weights_of_the_size_of_bert_base_reach_nnx(shell):
    file, out = "runs/bert/flax_model.msgpack", "runs/bert/nnx"
    assert "440.4 MB" in shell.run(f"python examples/bert/stranded.py {file} --base")
    rules = "--rules examples/bert/rules.yaml"
    shell.run(f"linen-nnx run {file} {out} --to nnx {rules}")
    shell.run(f"linen-nnx verify {file} {out}")
    printed = shell.run(f"python examples/bert/load.py {file} {out} --base")
    assert printed.count("every bit equal") == 2
    assert "DIFFERENT" not in printed


@pytest.mark.slow
def test_an_unmodified_linen_script_prints_the_same_losses_at_all_four_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "train_state"))
    monkeypatch.chdir(ROOT)

    def lines(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        main = runpy.run_path(str(EXAMPLES / "train_state" / script))["main"]
        main.__globals__["STEPS"] = 20
        main()
        return capsys.readouterr().out

    printed = {lines("train_ladder.py", stage) for stage in STAGES}
    assert printed == {lines("train_linen.py")}
    assert printed.pop().count("loss") == 2
