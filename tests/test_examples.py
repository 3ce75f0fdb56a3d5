"""The examples work from their own README lines: each command as written, each quote as printed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from linen_nnx import RuleBook, Twin, suggest

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
_NUMBER = re.compile(r"\d+\.\d+")


def blocks(readme: Path) -> Iterator[tuple[list[str], list[str]]]:
    """Each ```bash block's commands, and the lines that the block behind it quotes."""
    pattern = r"```bash\n(.*?)```\n(?:```\n(.*?)```)?"
    for match in re.finditer(pattern, readme.read_text(), re.DOTALL):
        yield match[1].splitlines(), (match[2] or "").splitlines()


def missing(quoted: list[str], printed: str) -> list[str]:
    """The quoted lines that were not printed, in that order.

    `...` stands for anything; a decimal fraction for any within a tenth, as machines round.
    """
    rest, absent = iter(printed.splitlines()), []
    for quote in quoted:
        if quote != "..." and not any(_says(line, quote) for line in rest):
            absent.append(quote)
            rest = iter(printed.splitlines())
    return absent


def _says(line: str, quote: str) -> bool:
    parts = [re.escape(part.strip()) for part in _NUMBER.sub("\0", quote).split("...")]
    found = re.search(r".*".join(parts).replace("\0", rf"(?<!\d)({_NUMBER.pattern})"), line)
    expected = [float(number) for number in _NUMBER.findall(quote)]
    return found is not None and all(
        abs(float(number) - value) <= 0.1 * value
        for number, value in zip(found.groups(), expected, strict=True)
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder where the README's commands find the project, and leave their files."""
    for name in ("convert.py", "linen_nnx", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def call(project: Path, command: str) -> str:
    """What a command prints in a reader's shell; it has to end well."""
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    del env["XLA_FLAGS"]  # the simulated devices of the tests share out the threads otherwise
    done = subprocess.run(command, shell=True, cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", pytest.param("seq2seq", marks=pytest.mark.long), "bert"])
def test_an_example_works_from_its_own_readme_lines(project, name):
    for commands, quoted in blocks(EXAMPLES / name / "README.md"):
        printed = "".join(call(project, command) for command in commands)
        assert not missing(quoted, printed), printed


def test_a_quote_that_was_not_printed_is_noticed():
    printed = "loss 0.0851\nright 12.5 %\nstep 3 of 4\nok          digests\n"
    assert not missing(["loss 0.085", "... 12.4 %", "...", "ok ... digests"], printed)
    assert missing(["loss 0.185", "step 4 of 4", "ok ... bits"], printed) == [
        "loss 0.185", "step 4 of 4", "ok ... bits",
    ]  # fmt: skip
    assert missing(["step 3", "loss 0.085"], printed) == ["loss 0.085"]


def test_every_example_is_run_and_linked():
    folders = {path.parent.name for path in EXAMPLES.glob("*/README.md")}
    assert folders == {"vit", "seq2seq", "bert"}
    assert all(f"examples/{name}/README.md" in (ROOT / "README.md").read_text() for name in folders)


@pytest.mark.slow
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
def test_stranded_weights_of_the_size_of_bert_base_reach_nnx(project):
    file, out = "runs/bert/flax_model.msgpack", "runs/bert/nnx"
    assert "440.4 MB" in call(project, f"python examples/bert/stranded.py {file} --base")
    rules = "--rules examples/bert/rules.yaml"
    call(project, f"python convert.py run {file} {out} --to nnx {rules}")
    call(project, f"python convert.py verify {file} {out}")
    printed = call(project, f"python examples/bert/load.py {file} {out} --base")
    assert printed.count("every bit equal") == 2
    assert "DIFFERENT" not in printed
