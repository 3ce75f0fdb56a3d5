"""`make` and the package: the environment is made, mended and brought up to date."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from training.runtime.environment import program

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = {"3.11": "constraints-py311.txt", "3.12": "constraints-py312.txt"}

# Stands in for an interpreter: notes what it is asked, and "makes" an environment with itself.
PYTHON = """#!/bin/sh
echo "$*" | head -1 | cut -c1-400 >> "{log}"
case "$*" in
  "-m venv"*) mkdir -p .venv/bin && cp "{self}" .venv/bin/python ;;
  "-m pip"*) test ! -f "{log}.fail" ;;
  -c*print*) echo "{self}" ;;
esac
"""


class Clone:
    """The files that `make setup` needs, in a folder of their own, with a stand-in for Python."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.python = folder, folder / "log", folder / "python"
        self.ready = folder / ".venv" / ".ready"
        for name in ("Makefile", "pyproject.toml", *VERSIONS.values()):
            shutil.copy(ROOT / name, folder)
        self.python.write_text(PYTHON.format(log=self.log, self=self.python))
        self.python.chmod(0o755)

    def make(self, *args: str) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
        command = ["make", *(args or ("setup", f"PYTHON={self.python}"))]
        if not any(arg.startswith("UV=") for arg in args):
            command.append("UV=")  # pip, though the machine may have uv
        return subprocess.run(command, cwd=self.folder, env=clean, capture_output=True, text=True)

    def did(self, action: str) -> bool:
        return any(line.startswith(action) for line in self.log.read_text().splitlines())


@pytest.fixture
def clone(tmp_path: Path) -> Clone:
    return Clone(tmp_path)


def test_the_environment_is_made_once(clone):
    assert clone.make().returncode == 0
    assert clone.did("-m venv")
    assert clone.did("-m pip install")
    assert clone.make().returncode == 0
    assert clone.log.read_text() == ""


def test_a_half_made_environment_is_made_anew(clone):
    left_over = clone.folder / ".venv" / "left_over"
    left_over.parent.mkdir()
    left_over.touch()
    clone.make()
    assert clone.did("-m venv")
    assert clone.ready.exists()
    assert not left_over.exists()


def test_a_failed_installation_leaves_no_stamp(clone):
    (clone.folder / "log.fail").touch()
    assert clone.make().returncode != 0
    assert not clone.ready.exists()
    (clone.folder / "log.fail").unlink()
    assert clone.make().returncode == 0
    assert clone.ready.exists()


def test_changed_constraints_are_installed_in_place(clone):
    clone.make()
    os.utime(clone.ready, (1, 1))
    assert clone.make().returncode == 0
    assert clone.did("-m pip install")
    assert not clone.did("-m venv")


def test_an_environment_whose_interpreter_is_gone_is_made_anew(clone):
    clone.make()
    os.utime(clone.ready, (1, 1))
    (clone.folder / ".venv" / "bin" / "python").unlink()
    assert clone.make().returncode == 0
    assert clone.did("-m venv")


def test_interpreters_that_do_not_start_or_fit_are_passed_over(clone):
    old = clone.folder / "old"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    assert clone.make("setup", f"PYTHON=no-such-python {old} {clone.python}").returncode == 0
    assert clone.did("-m venv")


def test_without_a_usable_interpreter_the_remedy_is_told(clone):
    outcome = clone.make("setup", "PYTHON=no-such-python")
    assert outcome.returncode != 0
    assert "No usable Python among: no-such-python" in outcome.stderr
    assert "Python 3.11, 3.12 or 3.13" in outcome.stderr
    assert not clone.ready.parent.exists()


def test_help_lists_every_target(clone):
    listed = clone.make("help").stdout
    for target in ["setup", "train", "test", "lint", "bench", "parity", "docs", "clean", "help"]:
        assert f"  make {target} " in listed
    assert clone.make("-s").stdout == listed


def test_training_needs_fewer_packages_than_testing(clone):
    clone.make("setup", f"PYTHON={clone.python}")
    assert "dev" not in clone.log.read_text()
    clone.make("tools", f"PYTHON={clone.python}")
    assert "dev" in clone.log.read_text()
    assert not clone.did("-m venv")


def test_uv_installs_into_the_same_environment(clone):
    assert clone.make("setup", f"PYTHON={clone.python}", "UV=./uv").returncode != 0  # none there
    (clone.folder / "uv").write_text(f"#!/bin/sh\necho uv $* >> {clone.log}\n")
    (clone.folder / "uv").chmod(0o755)
    assert clone.make("setup", f"PYTHON={clone.python}", "UV=./uv").returncode == 0
    assert clone.did("uv pip install -q --python .venv/bin/python -c constraints-py3")
    assert not clone.did("-m pip install")


def test_a_run_names_programs_as_a_shell_finds_them(monkeypatch):
    own = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(own))
    assert program("python") == "python" and program("tensorboard") == "tensorboard"
    monkeypatch.setenv("PATH", "/usr/bin")  # no environment is activated
    for folder in (own.parents[1], Path("/")):
        monkeypatch.chdir(folder)
        assert Path(program("python")).samefile(sys.executable)
        assert Path(program("tensorboard")).samefile(own / "tensorboard")


@pytest.mark.parametrize("extra", ["cuda12", "cuda13", "tpu"])
def test_an_accelerator_is_added_once_and_pinned_to_the_version_of_jax(clone, extra):
    asked = ("setup", f"PYTHON={clone.python}", f"EXTRA={extra}")
    clone.make(*asked)
    assert f"-e .[{extra}]" in clone.log.read_text()
    clone.make(*asked)
    assert clone.log.read_text() == ""

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"][extra] == [f"jax[{extra}]"]
    for pinned in map(pins, VERSIONS.values()):
        plugin = pinned.get(f"jax-{extra}-plugin", pinned["libtpu"])
        assert extra == "tpu" or plugin.specifier == pinned["jax"].specifier


def test_an_accelerator_that_there_is_not_is_refused(clone):
    outcome = clone.make("setup", f"PYTHON={clone.python}", "EXTRA=cuda11")
    assert outcome.returncode != 0
    assert "cuda11" in outcome.stderr


@pytest.mark.parametrize("file", VERSIONS.values())
def test_what_is_pinned_is_pinned_exactly(file):
    assert all(str(one.specifier).startswith("==") and not one.url for one in pins(file).values())


@pytest.mark.parametrize("file", VERSIONS.values())
def test_whatever_an_extra_asks_for_is_pinned(file):
    pinned = pins(file)
    for path in [ROOT / "pyproject.toml", *ROOT.glob("packages/*/pyproject.toml")]:
        for wanted in tomllib.loads(path.read_text())["project"]["optional-dependencies"].values():
            for one in map(Requirement, wanted):
                own = one.name in ("linen-nnx", "migration-template")
                assert own or canonicalize_name(one.name) in pinned


def test_whatever_is_installed_is_pinned():
    """For the interpreter that runs the tests; the other has a file of its own."""
    pinned = pins(VERSIONS["3.11" if sys.version_info < (3, 12) else "3.12"])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    waiting = [*map(Requirement, project["dependencies"] + extras["dev"])]
    seen = set()
    while waiting:
        one = waiting.pop()
        if str(one) not in seen:
            seen.add(str(one))
            if one.name == project["name"]:
                waiting += [Requirement(text) for extra in one.extras for text in extras[extra]]
                continue
            if one.name != "linen-nnx":
                assert canonicalize_name(one.name) in pinned
            for extra in one.extras or {""}:
                needs = map(Requirement, requires(one.name) or [])
                waiting += [x for x in needs if not x.marker or x.marker.evaluate({"extra": extra})]
    assert len(seen) > len(project["dependencies"])


def test_the_page_on_installing_names_the_versions_that_are_pinned():
    page = (ROOT / "docs" / "install.md").read_text()
    rows = re.findall(
        r"^\| (3\.[\d., ]+) \| ([\d.]+) \| ([\d.]+) \| `(.*)` \|$", page, re.MULTILINE
    )
    assert [file for *_, file in rows] == [*VERSIONS.values()]
    for _, jax, flax, file in rows:
        assert str(pins(file)["jax"].specifier) == f"=={jax}"
        assert str(pins(file)["flax"].specifier) == f"=={flax}"


def test_the_page_on_installing_names_every_accelerator():
    page = (ROOT / "docs" / "install.md").read_text()
    (line,) = re.findall("^ACCELERATORS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == line.split()


def test_the_addresses_that_are_left_to_fill_in_read_as_they_should():
    for path in [ROOT / "pyproject.toml", *ROOT.glob("packages/*/pyproject.toml")]:
        block = re.search(r"^# \[project\.urls\]\n(?:# .*\n)+", path.read_text(), re.MULTILINE)
        urls = tomllib.loads(re.sub("(?m)^# ", "", block[0]))["project"]["urls"]
        assert set(urls) == {"Source", "Documentation", "Issues", "Changelog"}


def pins(file):
    lines = (ROOT / file).read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {canonicalize_name(one.name): one for one in requirements}
