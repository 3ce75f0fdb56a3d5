"""How much code a fork owns, and how many files a change touches.

    python -m benchmarks.sizes

Lines of code are lines that hold code: no blank lines, comments or docstrings, of which there may
be as many as help. Each change is made in a copy of the template, which then trains two steps with
it at stages `linen` and `nnx`.
"""

import ast
import io
import shutil
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEMPLATE = ("configs", "model", "training", "train.py")  # what a training needs
SHORT = ("experiment=diabetes", "steps=2", "log.tensorboard=false", "log.progress=false")
NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}

MLP = "model/mlp/__init__.py"
LOSS = 'return {"loss": jnp.square(predicted - batch["targets"]).mean(axis=-1)}'

# What is changed -> (files: what is appended to them, or replaced in them; settings of the run).
CHANGES: dict[str, tuple[dict[str, str | tuple[str, str]], list[str]]] = {
    "a metric": (
        {
            MLP: (
                LOSS,
                "error = jnp.abs(predicted - batch['targets']).mean(axis=-1)\n"
                '    return {"loss": jnp.square(predicted - batch["targets"]).mean(axis=-1), '
                '"absolute": error}',
            )
        },
        [],
    ),
    "a loss with two inputs": (
        {
            MLP: (
                LOSS,
                "other = model(*inputs(batch)[::-1], train=model.train)\n"
                "    agree = jnp.square(predicted - other).mean(axis=-1)\n"
                '    return {"loss": agree + jnp.square(predicted - batch["targets"]).mean(-1)}',
            )
        },
        [],
    ),
    "a data set": (
        {
            "training/datasets/noise.py": (
                "import numpy as np\n\n"
                "from training import datasets\n"
                "from training.datasets import Dataset, Rows, digest\n\n"
                "Options = datasets.Options\n\n\n"
                "def load(options: Options) -> Dataset:\n"
                "    random = np.random.default_rng(options.seed)\n"
                "    inputs = random.normal(size=(64, 10)).astype(np.float32)\n"
                '    rows = Rows({"inputs": inputs, "targets": inputs[:, :1]})\n'
                '    return Dataset(options, rows, rows, "noise", digest(inputs))\n'
            ),
            "configs/data/noise.yaml": "name: noise\nbatch: 16\nseed: 0\n",
        },
        ["data=noise"],
    ),
    "an optimizer of Optax": (
        {"configs/optimizer/radam.yaml": "chain: [scale_by_radam]\nlr: 1e-3\n"},
        ["optimizer=radam"],
    ),
    "a model family": (
        {
            "model/line/__init__.py": (
                "from dataclasses import dataclass\n"
                "from typing import Literal\n\n"
                "import jax.numpy as jnp\n\n"
                "from linen_nnx import Part\n\n\n"
                "@dataclass(frozen=True)\n"
                "class Options:\n"
                '    family: Literal["line"]\n\n\n'
                "def parts(cfg):\n"
                "    from model.line import linen, nnx\n\n"
                "    return Part(linen.Line, lambda rngs: nnx.Line(rngs=rngs))\n\n\n"
                "def inputs(batch):\n"
                '    return (batch["inputs"],)\n\n\n'
                "def loss(model, batch, rngs):\n"
                '    error = model(batch["inputs"]) - batch["targets"]\n'
                '    return {"loss": jnp.square(error).mean(axis=-1)}\n'
            ),
            "model/line/linen.py": (
                "import flax.linen as nn\n\n\n"
                "class Line(nn.Module):\n"
                "    @nn.compact\n"
                "    def __call__(self, x):\n"
                "        return nn.Dense(1)(x)\n"
            ),
            "model/line/nnx.py": (
                "from flax import nnx\n\n\n"
                "class Line(nnx.Module):\n"
                "    def __init__(self, *, rngs):\n"
                "        self.line = nnx.Linear(10, 1, rngs=rngs)\n\n"
                "    def __call__(self, x):\n"
                "        return self.line(x)\n"
            ),
            "model/line/rules.yaml": (
                'version: 1\nrules:\n  - {linen: "params/Dense_0/{leaf}", nnx: "line/{leaf}"}\n'
            ),
            "configs/model/line.yaml": "family: line\n",
        },
        ["model=line"],
    ),
}


def main() -> None:
    """Prints the tables."""
    print("lines of code, of all lines\n")
    for name, files in groups().items():
        code, lines = sum(map(code_lines, files)), sum(map(all_lines, files))
        print(f"  {name:44} {code:6,}  {lines:6,}")
    print("\nfiles that a change touches, tried at stages linen and nnx\n")
    for name, (files, settings) in CHANGES.items():
        attempt(name, files, settings)
        python = sum(path.endswith(".py") for path in files)
        print(f"  {name:44} {python:2} of Python  {len(files) - python:2} of YAML", flush=True)


def groups() -> dict[str, list[Path]]:
    """The Python files of the project, by whose they are."""
    runtime = sorted((ROOT / "training/runtime").glob("*.py"))
    owned = [ROOT / "train.py", ROOT / "convert.py"]
    for folder in ("configs", "model", "training"):
        owned += sorted((ROOT / folder).rglob("*.py"))
    return {
        "yours: configs, model, training, entries": [p for p in owned if p not in runtime],
        "not yours to change: training/runtime": runtime,
        "library: packages/linen-nnx": sorted((ROOT / "packages").glob("*/linen_nnx/**/*.py")),
    }


def all_lines(path: Path) -> int:
    """All lines of a file."""
    return len(path.read_text().splitlines())


def code_lines(path: Path) -> int:
    """The lines of a file that hold code."""
    text = path.read_text()
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in NO_CODE:
            found.update(range(token.start[0], token.end[0] + 1))
    return len(found - set(docstring_lines(text)))


def docstring_lines(text: str) -> Iterator[int]:
    """The lines of all texts that stand for themselves."""
    for node in ast.walk(ast.parse(text)):
        value = node.value if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            assert value.end_lineno is not None
            yield from range(value.lineno, value.end_lineno + 1)


def attempt(name: str, files: dict[str, str | tuple[str, str]], settings: list[str]) -> None:
    """Makes a change in a copy of the template and trains with it.

    Raises:
        SystemExit: if that does not go through; with what was printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for part in TEMPLATE:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, copy / part)
            else:
                shutil.copy(ROOT / part, copy / part)
        for path, change in files.items():
            write(copy / path, change)
        for stage in ("linen", "nnx"):
            command = [sys.executable, "train.py", *SHORT, *settings, f"stage={stage}"]
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name}: {' '.join(command)}\n{done.stdout}{done.stderr}")


def write(path: Path, change: str | tuple[str, str]) -> None:
    """Writes a new file, or replaces a text in an old one."""
    path.parent.mkdir(exist_ok=True)
    if isinstance(change, str):
        assert not path.exists(), path
        path.write_text(change)
        return
    before, after = change
    text = path.read_text()
    assert text.count(before) == 1, (path, before)
    path.write_text(text.replace(before, after))


if __name__ == "__main__":
    main()
