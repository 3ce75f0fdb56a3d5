"""`suggest` and `--twin` on the command line: what is printed, written and refused."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
from convert_helpers import save
from verify_helpers import book, rename, trained, twin

from linen_nnx import RuleBook
from linen_nnx.cli import main
from linen_nnx.infer.trace import trace_linen

TWIN = "verify_helpers:twin"
GRU = f"{Path(__file__).parent / 'verify_helpers.py'}:gru"


@pytest.fixture(scope="module")
def linen(tmp_path_factory):
    return save(tmp_path_factory.mktemp("cli") / "linen", trained())


def call(capsys, *arguments):
    """The exit code, and what was printed to either stream."""
    code = main([*map(str, arguments)])
    return code, "".join(capsys.readouterr())


def test_suggest_shows_each_rule_with_its_evidence_and_writes_a_book_that_loads(tmp_path, capsys):
    rules, true = tmp_path / "rules.yaml", tmp_path / "true.yaml"
    book().save(true)
    code, text = call(capsys, "suggest", TWIN, "-o", rules)

    assert code == 0
    assert "params/blk_{i}/{leaf}" in text and "->  blocks/{i}/{leaf}" in text
    assert "fingerprints equal" in text and "0 leaves unassigned" in text
    shapes = trace_linen(twin).leaves
    moves = [RuleBook.load(path).plan(shapes, "nnx").moves for path in (rules, true)]
    assert {(m.sources, m.targets) for m in moves[0]} == {(m.sources, m.targets) for m in moves[1]}


def test_suggest_overwrites_no_file(tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("mine")

    assert call(capsys, "suggest", TWIN, "-o", tmp_path / "mine.yaml")[0] == 1
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_suggest_with_open_leaves_lists_them_with_reason_writes_the_rest_and_exits_with_one(
    tmp_path, capsys
):
    code, text = call(capsys, "suggest", GRU, "-o", tmp_path / "some.yaml")

    assert code == 1
    assert "UNASSIGNED linen params/GRUCell_0/hn/bias\n    nnx.GRUCell has no home" in text
    assert "#5594" in text and "1 leaves unassigned" in text
    assert set(RuleBook.load(tmp_path / "some.yaml").unassigned) == {"params/GRUCell_0/hn/bias"}


@pytest.mark.long
def test_a_twin_brings_its_rule_book_to_plan_run_and_verify(linen, tmp_path, capsys):
    to = ["--to", "nnx", "--twin", TWIN]
    assert call(capsys, "plan", linen, *to)[0] == 0
    assert call(capsys, "run", linen, tmp_path / "nnx", *to)[0] == 0
    code, text = call(capsys, "verify", linen, tmp_path / "nnx", "--twin", TWIN)

    assert code == 0
    assert "ok          forward pass, randomised weights\n              exact" in text
    assert "ok          one optimizer step from the carried state" in text
    assert text.splitlines()[-1].startswith("passed: ")


def test_verify_prints_each_check_as_soon_as_it_is_known(linen, tmp_path, capsys, monkeypatch):
    call(capsys, "run", linen, tmp_path / "nnx", "--to", "nnx", "--twin", TWIN)
    printed, before = [], {}

    def progress(text):
        printed.append(capsys.readouterr().out)
        before.setdefault(text, "".join(printed))

    monkeypatch.setattr("linen_nnx.cli.verify.progress", lambda: nullcontext(progress))
    assert main(["verify", str(linen), str(tmp_path / "nnx"), "--twin", TWIN]) == 0
    progress("end")

    assert "digests" in before["coverage, shapes, dtypes"]
    assert before["the way back"].endswith("ok          every bit, through the rule book\n")
    assert before["running both models"].endswith("ok          exact inverse\n")
    assert "gradients" in before["end"]


def test_without_a_twin_verify_says_what_it_has_not_proved(linen, tmp_path, capsys):
    rules = tmp_path / "rules.yaml"
    book().save(rules)
    assert call(capsys, "run", linen, tmp_path / "nnx", "--to", "nnx", "--rules", rules)[0] == 0
    code, text = call(capsys, "verify", linen, tmp_path / "nnx")

    assert code == 0
    assert "The models were not run" in text and "forward" not in text


def test_a_wrong_book_beside_the_output_fails_with_a_twin_alone(linen, tmp_path, capsys):
    rules = tmp_path / "wrong.yaml"
    swapped = rename("params/ln/scale", "last/bias"), rename("params/ln/bias", "last/scale")
    book(last=[*swapped]).save(rules)
    run = ["run", linen, tmp_path / "nnx", "--to", "nnx", "--rules", rules]
    assert call(capsys, *run)[0] == 0
    assert call(capsys, "verify", linen, tmp_path / "nnx")[0] == 0
    code, text = call(capsys, "verify", linen, tmp_path / "nnx", "--twin", TWIN)

    assert code == 1
    assert "FAILED      forward pass" in text
    assert text.splitlines()[-1].startswith("FAILED: ")
    assert "`last/bias` comes from `params/ln/scale`, and must come from `params/ln/bias`" in text


def test_open_leaves_are_refused_with_the_list(linen, capsys):
    code, text = call(capsys, "plan", linen, "--to", "nnx", "--twin", GRU)

    assert code == 1
    assert "the linen leaf `params/GRUCell_0/hn/bias` is unassigned" in text


def test_a_twin_that_is_not_there_is_refused_and_one_misspelt_is_usage(linen, capsys):
    code, text = call(capsys, "suggest", "verify_helpers:twn")
    assert code == 1 and "did you mean `twin`?" in text
    for wrong in (["suggest", "verify_helpers"], ["plan", linen, "--to", "nnx", "--twin", "x.py"]):
        with pytest.raises(SystemExit) as caught:
            main([*map(str, wrong)])
        assert caught.value.code == 2
    assert "expected path/to/file.py:NAME or package.module:NAME" in capsys.readouterr().err


def test_json_holds_the_book_and_every_check(linen, tmp_path, capsys):
    code, text = call(capsys, "suggest", TWIN, "--json")
    content = json.loads(text)
    assert code == 0 and content["complete"]
    assert RuleBook.from_dict({k: content[k] for k in ("version", "rules")}).rules
    call(capsys, "run", linen, tmp_path / "nnx", "--to", "nnx", "--twin", TWIN)
    content = json.loads(
        call(capsys, "verify", linen, tmp_path / "nnx", "--twin", TWIN, "--json")[1]
    )
    assert content["passed"]
    assert {check["close"] for check in content["checks"]} == {False}
