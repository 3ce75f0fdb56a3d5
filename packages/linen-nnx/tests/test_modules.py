"""Imports point one way, as the module map in the documentation says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAP = (ROOT / "docs" / "modules.md").read_text()
ROWS = re.findall(r"^\| `([\w.]+)` \|\s*(.*?)\s*\|\s*(.*?)\s*\|$", MAP, re.MULTILINE)
PACKAGES = {"linen_nnx"}


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def files(package: str) -> list[Path]:
    path = ROOT / (package if package.endswith(".py") else package.replace(".", "/"))
    if not path.is_dir():
        return [path.with_suffix(".py")]
    return sorted(path.rglob("*.py"))


# What the package `linen_nnx` exports, by the package that it comes from.
HOMES = {
    "Refusal": "errors",
    "RuleError": "book", "RuleBook": "book", "convert": "disk", "Runs": "disk",
    "suggest": "ladder",
    "Ladder": "ladder", "Part": "ladder", "Stage": "ladder",
    "VariablesError": "ladder", "View": "ladder",
    "DrawError": "infer", "Twin": "infer", "TwinError": "infer",
    "bisect": "proof", "verify": "proof",
}  # fmt: skip


@pytest.mark.parametrize(("package", "parts", "allowed"), ROWS)
def test_a_package_imports_only_what_the_map_allows(package: str, parts: str, allowed: str) -> None:
    may = {*re.findall(r"`([\w.]+)`", allowed), package, "linen_nnx.errors"}
    may.add("linen_nnx.__version__")
    if allowed == "the five above":
        may |= {f"linen_nnx.{name}" for name in ("book", "disk", "infer", "ladder", "proof")}
    for path in files(package):
        for name in imports(path):
            head, _, rest = name.partition(".")
            if head == "linen_nnx" and rest in HOMES:
                name = f"linen_nnx.{HOMES[rest]}"
            assert any(f"{name}.".startswith(f"{one}.") for one in may), f"{path} imports {name}"


@pytest.mark.parametrize("package", ["book", "disk", "infer", "ladder", "proof", "cli"])
def test_the_map_names_every_module_of_the_translator(package: str) -> None:
    (parts,) = [parts for name, parts, _ in ROWS if name == f"linen_nnx.{package}"]
    named = set(re.findall(r"`(\w+)`", parts))
    assert named == {path.stem for path in files(f"linen_nnx.{package}")} - {"__init__"}


def test_the_map_names_every_package() -> None:
    folders = {path.parent.name for path in (ROOT / "linen_nnx").glob("*/__init__.py")}
    assert {name for name, _, _ in ROWS} >= {f"linen_nnx.{folder}" for folder in folders}


def test_the_library_knows_no_word_of_the_template() -> None:
    """Which parts a model has, and what lies in a run directory, it is told."""
    words = r"\b(encoder|config\.yaml|metrics\.jsonl|template|hydra|training\.\w+|tensorboard)\b"
    for path in files("linen_nnx"):
        text = path.read_text().replace("json.encoder", "").replace("flax.training.", "")
        assert not re.findall(words, text, re.IGNORECASE), path
