"""What runs elsewhere: the jobs of `.github/workflows`, the image, and the pages of the site.

None of them can be run by a test; what they name must exist.
"""

import re
import runpy
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import linen_nnx
import pytest
import yaml
from pages import EXAMPLES, PAGES, ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
INSTALL = (ROOT / "docs" / "install.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def jobs(workflow: Path) -> dict[str, Any]:
    return yaml.safe_load(workflow.read_text())["jobs"]


def commands(workflow: Path) -> list[str]:
    """Every `run:` of a workflow."""
    steps = [step for job in jobs(workflow).values() for step in job["steps"]]
    return [step["run"] for step in steps if "run" in step]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_ends_in_time_and_may_only_read(workflow: Path) -> None:
    assert yaml.safe_load(workflow.read_text())["permissions"] == {"contents": "read"}
    for job in jobs(workflow).values():
        assert job["timeout-minutes"] <= 90
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert re.fullmatch(r"[\w./-]+@[\w./-]+", step.get("uses", "an/action@v1"))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_runs_what_there_is(workflow: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in commands(workflow):
        subprocess.run(["bash", "-n", "-c", command], check=True)
        program, *rest = shlex.split(command)
        if program == "make":
            assert set(rest) <= set(targets), command
        for word in [program, *rest]:
            made = word.startswith(".venv/") or "/dist/" in word
            if "/" in word and not made and "$" not in word:
                assert (ROOT / word).exists() or not (ROOT / "packages").exists(), word


def test_the_checks_run_on_every_python_that_the_project_allows() -> None:
    tests = jobs(ROOT / ".github/workflows/checks.yml")["tests"]
    assert tests["steps"][-1] == {"run": ".ci/run"}
    tested = tests["strategy"]["matrix"]["python"]
    assert [tested[0], tested[-1]] == ["3.11", "3.13"]
    assert PROJECT["requires-python"] == ">=3.11,<3.14"


def test_the_image_is_made_of_what_there_is_and_run_as_the_page_says() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM python:3\.(\d+)-slim$", dockerfile, re.MULTILINE)
    constraints = "constraints-py311.txt" if base == "11" else "constraints-py312.txt"
    assert set(re.findall(r"constraints-\S+", dockerfile)) == {constraints}
    for copied in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE):
        names = {*copied.split()} - {"packages"}  # which a fork may have removed
        assert all((ROOT / name).exists() for name in names)

    built = [text for text in commands(ROOT / ".github/workflows/checks.yml") if "docker" in text]
    assert built and all(f"\n{command}\n" in INSTALL for command in built)


def test_the_image_leaves_out_what_git_ignores() -> None:
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()}
    left_out = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignored | {".git"} <= {name.removeprefix("**/") for name in left_out}


def test_every_page_is_in_the_navigation_of_the_site_once() -> None:
    navigation = runpy.run_path(str(ROOT / "docs" / "conf.py"))["NAVIGATION"]
    listed = [page for section in navigation.values() for page in section]
    library = ROOT / "packages" / "linen-nnx"
    pages = {*PAGES, *EXAMPLES, *ROOT.glob("examples/*.md"), *ROOT.glob("docs/*.rst")}
    for pattern in ("*.md", "docs/*.md", "docs/*.rst", "examples/*/*.md"):
        pages |= set(library.glob(pattern))
    names = {str(page.relative_to(ROOT).with_suffix("")) for page in pages} - {"README"}

    assert len(listed) == len(set(listed))
    assert {page for page in listed if library.exists() or not page.startswith("packages")} == names


def test_the_reference_describes_everything_that_the_library_exports() -> None:
    page = ROOT / "packages/linen-nnx/docs/api.rst"
    if not page.exists():
        pytest.skip("this fork has removed the library's own folder")
    described = re.findall(r"^\.\. auto\w+:: linen_nnx\.(\w+)$", page.read_text(), re.MULTILINE)
    assert sorted(described) == sorted(linen_nnx.__all__)
