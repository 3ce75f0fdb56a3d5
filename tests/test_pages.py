"""What the pages name exists: files, links, options, keys, extras; and how they are read."""

import dataclasses
import math
import re
import tomllib
from contextlib import nullcontext
from pathlib import Path

import linen_nnx
import pytest
import yaml
from linen_nnx import RuleBook
from pages import EXAMPLES, PAGES, ROOT, Block, Shell, blocks, follow, inline, missing, spans

from configs.build import paths
from training import compose, optimizer

# Paths in rule books and checkpoints, and what a run writes.
ELSEWHERE = {
    "hn/bias", "collection/a/b/kernel", "a/0/kernel", ".cache/jax", "runs/<experiment>-<stage>",
    "checkpoints/<step>/", "best/<step>/", "nonfinite/", "old/checkpoints", "inner/{leaf}",
    "out/{leaf}", "checkpoints/", "best/",
}  # fmt: skip


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: page.parent.name + page.stem)
def test_files_options_and_links_that_a_page_names_exist(page: Path) -> None:
    made = {block.file for block in blocks(page)}
    library = Path(linen_nnx.__file__).parent
    sources = "".join(path.read_text() for path in library.glob("cli/*.py"))
    lines = [block.text for block in blocks(page) if block.language == "text"]
    listed = [line.split()[0] for text in lines for line in text.splitlines()]
    for span in spans(page) + listed:
        if re.fullmatch(r"[\w.<>-]*/[\w./<>-]*", span) and span not in ELSEWHERE | made:
            assert exists(span), span
        if re.fullmatch(r"--[a-z-]+", span):
            assert f'"{span}"' in sources or span in ("--multirun", "--config-dir"), span
    for target in re.findall(r"\]\((?!https:)([^)#]+)", page.read_text()):
        assert exists(str((page.parent / target).resolve().relative_to(ROOT))), target


def exists(path: str) -> bool:
    """Whether there is such a file; a fork may have removed the library's own folder."""
    if path.startswith("packages/") and not (ROOT / "packages").is_dir():
        return True
    return bool(list(ROOT.glob(path.replace("NAME", "*").rstrip("/"))))


def test_keys_that_the_text_names_exist() -> None:
    configs = [compose(f"experiment={name}") for name in ("lm", "digits", "diabetes")]
    keys = {key for config in configs for key in paths(dataclasses.asdict(config))} | {"experiment"}
    short = {key.rpartition(".")[2] for key in keys}
    groups = {key.split(".")[0] for key in keys if "." in key}
    python = {
        "attention_fn",
        "promote_dtype",
        "force",
        "overwrite",
        "rng",
        "rngs",
    }  # arguments of functions
    for page in PAGES:
        for span in spans(page):
            if not re.search(r"[({]", span):
                for key in re.findall(r"(?<![\w.'-])([a-z_]+(?:\.[a-z_]+)*)=", span):
                    assert key in keys | short | python, f"{page.name}: {key}"
                if span.split(".")[0] in groups and re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", span):
                    assert span in keys, f"{page.name}: {span}"


def test_extras_that_are_to_be_installed_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"[^z]\.\[([\w,]+)\]", " ".join(inline()))
    extras = {extra for text in named for extra in text.split(",")}
    assert extras and extras <= {*project["optional-dependencies"]}


def test_yaml_on_the_pages_is_a_rule_book_an_optimizer_or_starts_a_run() -> None:
    found = 0
    for page in PAGES:
        for block in blocks(page):
            if block.language == "yaml" and block.file is None:
                documents = list(yaml.safe_load_all(block.text))
                found += 1
                if len(documents) > 1:
                    assert_starts_a_run(*documents)
                elif "chain" in documents[0]:
                    optimizer.check(documents[0], ["encoder", "head"])
                else:
                    assert RuleBook.from_dict(documents[0]).rules
    assert found


def assert_starts_a_run(service: dict, job: dict) -> None:
    """Each pod of the Kubernetes job finds the first one, and knows its own number."""
    pods, name = job["spec"]["template"]["spec"], job["metadata"]["name"]
    (container,) = pods["containers"]
    program, script, *overrides = container["command"]
    count = job["spec"]["completions"]
    assert (program, script, job["spec"]["parallelism"]) == ("python", "train.py", count)
    assert service["spec"]["selector"] == {"job-name": name}
    assert pods["subdomain"] == service["metadata"]["name"]
    for index in range(count):
        own = [text.replace("$(JOB_COMPLETION_INDEX)", str(index)) for text in overrides]
        given = compose(*own).distributed
        assert (given.num_processes, given.process_id) == (count, index)
        assert given.coordinator.split(":")[0] == f"{name}-0.{pods['subdomain']}"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("```sh\necho loss 1.04\n```\nprints\n\n```\nloss 1.0\n```", None),
        ("```sh\necho loss 1.2\n```\n\n```\nloss 1.0\n```", "not printed: .*loss 1.0"),
        ("```sh\necho done\nnonsuch --help\n```", "nonsuch --help\n127"),
        ("```sh\nfalse   # no success\n```", "^false\n1"),
        ("```python\nimport sys\nsys.nonsuch\n```", "AttributeError"),
        ("```ini\na = 1\n```", "unknown: ini"),
    ],
    ids=["right", "a quote", "a program", "an exit code", "python", "a language"],
)
def test_what_is_wrong_on_a_page_is_noticed(tmp_path: Path, page: str, message: str) -> None:
    (tmp_path / "page.md").write_text(page)
    with pytest.raises(AssertionError, match=message) if message else nullcontext():
        follow(blocks(tmp_path / "page.md"), Shell(tmp_path))


def test_commands_are_read_as_a_shell_reads_them(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(
        "## One\n```sh\n#!/bin/bash\n#SBATCH --nodes=2\na  b    # c\nd 'e#f' \\\n  g\n```\n"
    )
    (block,) = blocks(tmp_path / "page.md")
    assert block == Block("One", "sh", block.text, None)
    assert block.commands == ["a b", "d 'e#f' g"]


def test_a_quote_that_was_not_printed_is_noticed() -> None:
    printed = "loss 0.0851\nright 12.5 %\nstep 3 of 4\nok          digests\nat 4.3e-07 (7 ulp)\n"
    assert not missing(["loss 0.085", "... 12.4 %", "...", "ok ... digests"], printed)
    assert missing(["loss 0.185", "step 4 of 4", "ok ... bits", "5.1e-07 (2 ulp)"], printed) == [
        "loss 0.185", "step 4 of 4", "ok ... bits",
    ]  # fmt: skip
    assert missing(["step 3", "loss 0.085"], printed) == ["loss 0.085"]
    assert not missing(["loss 0.999"], printed, tolerance=math.inf)
