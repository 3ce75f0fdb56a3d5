"""The package that is published: the library alone, typed, with one version."""

import subprocess
import sys
import zipfile
from email import message_from_bytes
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Older ones, which an environment of one's own may have, do not read all of pyproject.toml.
pytestmark = pytest.mark.skipif(
    int(version("setuptools").split(".")[0]) < 77, reason="needs setuptools 77"
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built in a copy of it."""
    folder = tmp_path_factory.mktemp("wheel")
    ignored = [
        "--exclude=.cache",
        "--exclude=__pycache__",
        "--exclude=*.egg-info",
        "--exclude=build",
    ]
    copy = f"tar -C {ROOT} {' '.join(ignored)} -c linen_nnx pyproject.toml README.md LICENSE"
    subprocess.run(f"{copy} | tar -C {folder} -x", shell=True, check=True)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", "out"]
    subprocess.run([*pip, "."], cwd=folder, check=True, capture_output=True)
    return next((folder / "out").glob("*.whl"))


def test_the_package_holds_the_library_alone(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (scripts,) = (name for name in names if name.endswith("entry_points.txt"))
        commands = archive.read(scripts).decode().split("\n")

    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == {"linen_nnx"}
    assert {"linen_nnx/py.typed", "linen_nnx/book/rules.py"} <= names
    assert commands[1] == "linen-nnx = linen_nnx.cli:program"


def test_the_package_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        said = message_from_bytes(archive.read(name))

    assert said["Name"] == "linen-nnx"
    assert "Typing :: Typed" in said.get_all("Classifier", [])
    assert said.get_payload().startswith("# ")


def test_the_package_works_where_nothing_else_of_this_tree_is(wheel: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(tmp_path / "site"), str(wheel)], check=True)
    code = "import linen_nnx.cli; print(linen_nnx.__file__); linen_nnx.cli.main(['--help'])"

    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip

    assert str(tmp_path) in done.stdout.splitlines()[0], done.stderr
    assert "inspect" in done.stdout
