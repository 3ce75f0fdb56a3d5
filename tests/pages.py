"""Pages of documentation: what they show, and a copy of the project in which to do it.

A page is followed from top to bottom. Each command of a block marked `sh` or `bash` runs in a shell
and has to end well; a block without a mark quotes what the block before it prints; a block
marked `python` is executed; a block under a line that ends with a file's name is that file.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*/README.md"))
SHELL = ("sh", "bash")
STAMPS = (".ready", ".tools")
_TABLE = re.compile(r"<!-- table -->.*?<!-- end of table -->", re.DOTALL)
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_FILE = re.compile(r"`([\w/.]+)`:\n\n\Z")
_VARIES = re.compile(r"(\s*\.{3}\s*|\d+\.\d+(?:e-\d+ \(\d+ ulp\))?|\s+)")


@dataclass(frozen=True)
class Block:
    """What stands between two fences; `section` is the heading above it."""

    section: str
    language: str
    text: str
    file: str | None

    @property
    def commands(self) -> list[str]:
        """The commands of a shell's block as one line each, without comments."""
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        lines = [re.sub(r"(^|\s+)#( |!|SBATCH).*", "", line) for line in lines]
        return [re.sub(r"  +", " ", line) for line in lines if line]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text, found = page.read_text(), []
    for match in _BLOCK.finditer(text):
        before = text[: match.start()]
        sections = re.findall(r"^## (.*)$", before, re.MULTILINE)
        file = _FILE.search(before)
        found.append(
            Block(sections[-1] if sections else "", match[1], match[2], file[1] if file else None)
        )
    return found


def spans(page: Path) -> list[str]:
    """What stands in single backticks outside of blocks and of generated tables, each once.

    The table of formats names what lies in other people's folders.
    """
    text = _TABLE.sub("", _BLOCK.sub("", page.read_text()))
    return [*dict.fromkeys(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text))]


def inline() -> list[str]:
    """Every command that stands in a line of text, on any page, each once."""
    found = [span for page in (*PAGES, *EXAMPLES) for span in spans(page) if _is_command(span)]
    return [*dict.fromkeys(found)]


def _is_command(span: str) -> bool:
    """Whether a text in backticks is a program, or several words that are no piece of code."""
    first, *rest = span.split()
    named = rest and re.fullmatch(r"(--)?[a-z./][\w./-]*", first)
    return bool(named) or ((ROOT / span).is_file() and os.access(ROOT / span, os.X_OK))


def project(folder: Path) -> Path:
    """A copy of the project, with links to the environment that runs the tests as its `.venv`."""
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
    skip = shutil.ignore_patterns(".git", *ignored)
    shutil.copytree(ROOT, folder, ignore=skip, dirs_exist_ok=True)
    (folder / ".venv").mkdir()
    for path in Path(sys.prefix).iterdir():
        if path.name not in STAMPS:
            (folder / ".venv" / path.name).symlink_to(path)
    # What `make` goes by: without them it would install this copy into the linked environment.
    for stamp in STAMPS:
        (folder / ".venv" / stamp).touch()
    return folder


class Shell:
    """A reader's shell in a folder, with the environment active; each command starts there."""

    def __init__(self, folder: Path, *path: Path) -> None:
        """`path`: folders of programs that come before all others."""
        # Simulated devices would share out the threads; a strict test, or one under `make`, is no
        # reader's shell.
        foreign = ("XLA_FLAGS", "JAX_NUMPY", "MAKE", "MFLAGS", "PYTEST_")
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
        folders = [*path, Path(sys.executable).parent, os.environ["PATH"]]
        self.env["PATH"] = os.pathsep.join(map(str, folders))
        self.folder = folder

    def run(self, command: str) -> str:
        """What a command prints; it has to end well."""
        return self._printed(["bash", "-o", "pipefail", "-c", command], command)

    def python(self, code: str) -> str:
        """What a piece of Python prints; it has to end well."""
        return self._printed(["python", "-c", code], code)

    def _printed(self, command: list[str], shown: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{shown}\n{done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout


def follow(
    page: Iterable[Block],
    shell: Shell,
    instead: Mapping[str, str] | None = None,
    *,
    before: str = "",
    tolerance: float = 0.1,
) -> None:
    """Does what a page shows.

    Args:
        page: its blocks, or some of them.
        shell: where.
        instead: what is run in place of commands that cannot run as they are.
        before: Python that comes before each of the page's.
        tolerance: see `missing`.

    Raises:
        AssertionError: when a command fails, or prints something else than the page quotes.
    """
    page, instead, printed = list(page), instead or {}, ""
    for block in page:
        if block.file is not None:
            path = shell.folder / block.file
            assert not path.exists(), f"{block.file} is already there"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
    for block in page:
        if block.language in SHELL:
            printed = "".join(shell.run(instead.get(x, x)) for x in block.commands)
        elif block.language == "":
            absent = missing(block.text.splitlines(), printed, tolerance)
            assert not absent, f"not printed: {absent}\nprinted:\n{printed}"
        elif block.language == "python" and block.file is None:
            printed = shell.python(before + block.text)
        else:
            assert block.file or block.language in ("yaml", "text"), f"unknown: {block.language}"


def missing(quoted: list[str], printed: str, tolerance: float = 0.1) -> list[str]:
    """The quoted lines that were not printed, in that order.

    `...` stands for anything, a decimal fraction for any that differs by no more than `tolerance`
    of it, as machines round, an error in units of the last place for any.
    """
    rest, absent = iter(printed.splitlines()), []
    for quote in quoted:
        if quote.strip(" .") and not any(_says(line, quote, tolerance) for line in rest):
            absent.append(quote)
            rest = iter(printed.splitlines())
    return absent


def _says(line: str, quote: str, tolerance: float) -> bool:
    pattern, expected = "", []
    for part in _VARIES.split(quote.strip()):
        if part.strip() == "...":
            pattern += ".*"
        elif part.endswith("ulp)"):
            pattern += r"\d\.\de-\d\d \(\d+ ulp\)"
        elif re.fullmatch(r"\d+\.\d+", part):
            pattern += r"(?<!\d)(\d+\.\d+)"
            expected.append(float(part))
        else:
            pattern += re.sub(r"(\\ )+|\s+", r"\\s+", re.escape(part))
    found = re.search(pattern, line)
    return found is not None and all(
        abs(float(number) - value) <= tolerance * value
        for number, value in zip(found.groups(), expected, strict=True)
    )
