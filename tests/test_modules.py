"""Imports point one way, as the module map in the documentation says."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAP = (ROOT / "docs" / "modules.md").read_text()
ROWS = re.findall(r"^\| `([\w.]+)` \|\s*(.*?)\s*\|\s*(.*?)\s*\|$", MAP, re.MULTILINE)
PACKAGES = {"linen_nnx", "configs", "model", "training"}


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
    found = sorted(path.rglob("*.py"))
    if package == "training":  # the runtime has a row of its own
        found = [file for file in found if "runtime" not in file.relative_to(path).parts]
    return found


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
    for path in files(package):
        for name in imports(path):
            head, _, rest = name.partition(".")
            if head == "linen_nnx" and rest in HOMES:
                name = f"linen_nnx.{HOMES[rest]}"
            if package == "training" and path.name not in ("proof.py", "twins.py"):
                assert not name.startswith(("linen_nnx.infer", "linen_nnx.proof")), path
            assert any(f"{name}.".startswith(f"{one}.") for one in may), f"{path} imports {name}"


def test_the_map_names_every_package() -> None:
    assert {name.split(".")[0] for name, _, _ in ROWS} >= PACKAGES - {"linen_nnx"} | {
        "train",
        "convert",
    }
