"""The template where a fork has removed `packages/`: the library comes as a wheel."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, Shell, project

LIBRARY = ROOT / "packages" / "linen-nnx"
PIP = "python -m pip install -q --disable-pip-version-check --no-deps"


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A reader's shell in a copy of the template without the library's folder."""
    folder = project(tmp_path / "fork")
    shutil.rmtree(folder / "packages")
    shell = Shell(folder)
    site = tmp_path / "site"
    shell.run(f"{PIP} --no-index --no-build-isolation --target {site} {copy(tmp_path)}")
    shell.env["PYTHONPATH"] = str(site)
    return shell


def copy(folder: Path) -> Path:
    """A copy of the library, since building a wheel leaves files beside the source."""
    ignored = shutil.ignore_patterns("*.egg-info", "__pycache__", ".cache", "build")
    return Path(shutil.copytree(LIBRARY, folder / "linen-nnx", ignore=ignored))


@pytest.mark.long
@pytest.mark.skipif(not LIBRARY.is_dir(), reason="this is such a fork")
def test_the_template_trains_converts_and_passes_its_tests_without_the_library_beside_it(
    shell: Shell,
) -> None:
    where = shell.python("import linen_nnx; print(linen_nnx.__file__)").strip()
    assert where.startswith(shell.env["PYTHONPATH"])

    shell.run("python train.py experiment=diabetes steps=20")
    shell.run("python convert.py run runs/diabetes-nnx_in_linen runs/moved --to nnx")
    shell.run("python convert.py verify runs/diabetes-nnx_in_linen runs/moved")
    shell.run(
        "python train.py experiment=diabetes steps=20 stage=nnx run_dir=runs/moved resume=must"
    )
    shell.run("make -n test | grep -c pytest | grep -qx 1")

    command = [sys.executable, "-m", "pytest", "-q", "-m", "not long and not slow", "-n", "2"]
    tests = subprocess.run(
        command, cwd=shell.folder, env=shell.env, capture_output=True, text=True, check=False
    )
    assert tests.returncode == 0, tests.stdout[-5000:]
