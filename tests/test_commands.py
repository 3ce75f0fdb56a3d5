"""Each command of README.md, CONTRIBUTING.md and docs/ is run, and prints what the page quotes.

What a page shows runs as it is written, in a copy of the project whose models are smaller. The few
commands that cannot, stand in a table here beside what is run instead; any other that fails, or
does not exist, fails its test.
"""

import math
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import needs_setuptools
from pages import EXAMPLES, PAGES, ROOT, SHELL, Block, Shell, blocks, follow, inline, project

README, DOCS = ROOT / "README.md", ROOT / "docs"
SHOWN = ("Two commands", "What `make train` shows")

# Sizes alone: steps, depth and settings stay as they are.
SMALL = {
    "config.yaml": {"batches": 5, "samples": 20},
    "model/transformer.yaml": {"width": 16},
    "model/convnet.yaml": {"width": 8},
    "data/text.yaml": {"batch": 8},
    "data/digits.yaml": {"batch": 16},
}

DEVICES = "XLA_FLAGS=--xla_force_host_platform_device_count={}"
PIP = "python -m pip install -q --no-index --no-deps --no-build-isolation"
SHORT = "seed=0 steps=4 eval.every=2"
SWEEP = "python train.py --multirun experiment=sweep"
JOBLIB = f"{SWEEP} hydra/launcher=joblib hydra.launcher.n_jobs=2"
SLURM = f"{SWEEP} hydra/launcher=submitit_slurm hydra.launcher.partition=NAME"
OPTUNA = (
    "python train.py --multirun experiment=diabetes hydra/sweeper=optuna hydra.sweeper.n_trials=20"
    " hydra.sweeper.n_jobs=1 'optimizer.lr=tag(log, interval(1e-4, 1e-1))'"
    " 'run_dir=runs/optuna/lr${optimizer.lr}'"
)

# In blocks: command -> what is run instead. A run that is cut short is gone on with by the next.
INSTEAD = {
    # Its exit code is 1 where the twins diverge: here one setting of the nnx twin is wrong.
    "python convert.py bisect models.py:twin --png errors.png": (
        "sed -i 's/net()/net(at=7, epsilon=1e-5)/' models.py; "
        "python convert.py bisect models.py:twin --png errors.png; test $? = 1"
    ),
    **{
        command: f"{DEVICES.format(count)} {command} stop_at={stop}"
        for command, count, stop in (
            ("python train.py mesh.data=-1", 8, 2),
            ("python train.py mesh.data=-1 mesh.fsdp=4", 8, 4),
            ("srun python train.py mesh.data=-1 mesh.fsdp=4", 4, 6),  # two processes: see SRUN
        )
    },
    SWEEP: f"{SWEEP} {SHORT}",
}

# Commands that need an extra, the module that it brings, and what is run instead.
EXTRAS = {
    JOBLIB: ("hydra_joblib_launcher", f"{JOBLIB} {SHORT}"),
    # submitit's other launcher starts the same jobs without a cluster.
    SLURM: (
        "hydra_submitit_launcher",
        f"{SLURM.replace('--multirun ', '')} --cfg hydra | grep 'partition: NAME' && "
        f"{SWEEP} hydra/launcher=submitit_local {SHORT}",
    ),
    OPTUNA: ("hydra_optuna_sweeper", f"{OPTUNA.replace('=20', '=2')} steps=4"),
}

# Installations: pip checks without a network what it would do in an environment of its own.
DRY = f"{PIP} --dry-run -c constraints-py312.txt -e packages/linen-nnx -e"
INSTALLING = {
    "make setup EXTRA=cuda12": "make -n setup EXTRA=cuda12 | grep -F 'e \".[cuda12]\"'",
    "python3.12 -m venv env": "true",
    "uv venv --python 3.12 env": "true",
    **{
        f"{program} -c constraints-py312.txt -e packages/linen-nnx -e {what}": f"{DRY} {what}"
        for program in ("env/bin/python -m pip install", "uv pip install --python env/bin/python")
        for what in (".", '".[cuda12]"')
    },
}

# In the text: command -> what is run instead.
INLINE = {
    "python -m benchmarks.curve": "python -m benchmarks.curve --help",  # whole: a long test
    ".venv/bin/tensorboard --logdir runs": (
        "python train.py experiment=diabetes debug=one_step && test -x .venv/bin/tensorboard &&"
        " python -m tensorboard.main --logdir runs --inspect | grep eval/loss"
    ),
    "make train": "make -n train",  # in a block, too
    "make test": "make -n test",
    "make test-long": "make -n test-long",
    "python -m training.plot": "python -m training.plot --help",
    "make tools": "make -n tools",
    "make docs": "make -n docs",
    **{
        f"python -m benchmarks {name}": "cd packages/linen-nnx && python -m benchmarks --help"
        for name in ("convert", "growth", "proofs")
    },
    "make lint": "make -n lint | sed 's/pyrefly check/& --help/; s/ruff .*/& --help/' | sh -e",
    "make bench": "make -n bench && python -m benchmarks --help",
    **{
        f"make bench ARGS={name}": f"make bench ARGS=--help | grep -w '  {name}' &&"
        f" python -m benchmarks.{name} --help"
        for name in ("steps", "loop", "growth")
    },
    "make parity": 'make parity ARGS="--only dense"',
    "make fuzz": "make -n fuzz",
    "pytest tests/test_run_fuzz.py": "true",  # that the file is there, test_pages.py says
    "python -m benchmarks.sizes": "python -c 'import benchmarks.sizes'",
    # Half a minute of work; the command and the experiment are there.
    "python convert.py suggest training.twins:examples/vae/configs/vae": (
        "python convert.py suggest --help && test -f examples/vae/configs/experiment/vae.yaml"
    ),
    ".ci/run": "bash -n .ci/run && test -x .ci/run",
    "cp -r": "cp -r docs copied",
    # What it would install is on no list of ours; its hooks are the commands of `make lint`.
    "pip install pre-commit && pre-commit install": "make -n lint | grep ^.venv | sed 's/ [.]$//' |"
    ' while read hook; do grep -F "entry: $hook" .pre-commit-config.yaml || exit 1; done',
    "python convert.py inspect CKPT": "python convert.py inspect --help | grep CKPT",
    **{
        f"convert.py {name}": f"python convert.py {name} --help"
        for name in ("run", "suggest", "verify", "bisect")
    },
    **{
        f"{option} {value}": f"python convert.py run --help | grep -e '{option} '"
        for option, value in (
            ("--prefix", "model-"),
            ("--prefix", "model- --prefix optimizer-"),
            ("--step", "1.5"),
            ("--from", "linen"),
            ("--from", "nnx"),
        )
    },
    "convert.py inspect PATH": "python convert.py inspect --help | grep CKPT",
    "python train.py data=NAME": "python train.py data=text --cfg job",
    # Tests of their own hold these two pages against what the commands print.
    "python -m tests.optimizers": "test -f tests/optimizers.py",
    "linen-nnx run": "python convert.py run --help",
    "verify --twin": "python convert.py verify --help | grep -e --twin",
    "--to nnx": "python convert.py run --help | grep -e '--to '",
    "--to linen": "python convert.py run --help | grep -e '--to '",
    # No commands, but what one prints.
    "not proved": "true",
    "digests of the source": "true",
}

# Starts two processes and tells each who it is, as SLURM's does.
SRUN = """#!/bin/sh
export SLURM_JOB_ID=$$ SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" >/dev/null &
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" && wait $!
"""

# What the pages leave to their reader.
MODELS = """from faults import net
twin = net()
"""
CHECKPOINT = """
from pathlib import Path
import jax, orbax.checkpoint as ocp
from models import twin

variables = twin.linen().init(jax.random.key(1), *twin.inputs())
with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path("linen").absolute(), variables)
"""
STRANGER = """
import sys
from pathlib import Path
import numpy as np, optax
sys.path.insert(0, "tests")
from strangers import script

rng = np.random.default_rng(0)
state = script.start(optax.chain(optax.clip(1.0), optax.adamw(1e-2)), features=10)
draw = lambda: {"inputs": rng.normal(size=(16, 10)), "targets": rng.normal(size=(16, 1))}
batches = [draw() for _ in range(40)]
script.save(Path("old/checkpoints").absolute(), script.train(state, batches)[0])
"""


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A shell in a copy of the project: small models, a single test file, a stand-in for srun."""
    folder = project(tmp_path / "clone")
    for name, values in SMALL.items():
        path = folder / "configs" / name
        text = path.read_text()
        for key, value in values.items():
            text, count = re.subn(rf"(?m)^( *{key}): \d+", rf"\1: {value}", text)
            assert count == 1
        path.write_text(text)
    for tests in (folder / "tests", folder / "packages" / "linen-nnx" / "tests"):
        for path in tests.glob("test_*.py"):
            if path.name != "test_modules.py":
                path.unlink()
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "srun").write_text(SRUN)
    (programs / "srun").chmod(0o755)
    return Shell(folder, programs)


def sections(page: Path, *names: str) -> list[Block]:
    found = [block for block in blocks(page) if block.section in names]
    assert {block.section for block in found} == set(names)
    return found


def in_blocks() -> set[str]:
    """Every command that stands in a block, on any page."""
    found = [block for page in (*PAGES, *EXAMPLES) for block in blocks(page)]
    return {command for block in found if block.language in SHELL for command in block.commands}


@pytest.mark.long
def test_the_two_commands_of_the_readme_and_those_of_training(shell: Shell) -> None:
    follow(sections(README, *SHOWN), shell, tolerance=math.inf)
    follow(sections(DOCS / "running.md", "Commands", "Changing stage"), shell)


@pytest.mark.long
def test_make_train_ends_as_the_readme_quotes(tmp_path: Path) -> None:
    shell = Shell(project(tmp_path))
    follow(sections(README, *SHOWN), shell, {"make test": "make -n test"})


@pytest.mark.long
@needs_setuptools
def test_the_commands_of_installing(shell: Shell) -> None:
    follow(blocks(DOCS / "install.md"), shell, INSTALLING)


@pytest.mark.long
def test_the_commands_of_converting(shell: Shell) -> None:
    shell.run("python train.py experiment=digits stop_at=20 && python train.py stop_at=2")
    (shell.folder / "models.py").write_text(MODELS)
    shutil.copy(ROOT / "packages/linen-nnx/tests/faults.py", shell.folder)
    shell.python(CHECKPOINT)
    follow(blocks(DOCS / "converting.md"), shell, INSTEAD)
    assert (shell.folder / "errors.png").stat().st_size > 0


@pytest.mark.long
def test_the_commands_of_scale(shell: Shell) -> None:
    instead = INSTEAD | dict.fromkeys(EXTRAS, "true")
    follow(sections(DOCS / "running.md", "Scale"), shell, instead)


@pytest.mark.long
@pytest.mark.parametrize("command", EXTRAS, ids=[module for module, _ in EXTRAS.values()])
def test_the_commands_of_an_extra(shell: Shell, command: str) -> None:
    module, run = EXTRAS[command]
    if find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{module}") is None:
        pytest.skip(f"{module} is not installed")
    shell.run(run)


@pytest.mark.long
def test_the_commands_of_the_migration_page(shell: Shell) -> None:
    shell.run("mkdir -p model/net && cp tests/strangers/net/linen.py model/net/")
    shell.python(STRANGER)
    follow(blocks(DOCS / "migrate.md"), shell)


@pytest.mark.long
def test_commands_in_the_text_do_what_they_say(shell: Shell) -> None:
    known = in_blocks() - set(INLINE)
    for command in inline():
        if command not in known and not is_installation(command):
            shell.run(INLINE.get(command, command))


def is_installation(command: str) -> bool:
    return command.startswith("pip install") and command not in INLINE


@pytest.mark.long
def test_the_curve_of_the_readme_is_drawn_as_its_caption_says(shell: Shell) -> None:
    printed = shell.run("python -m benchmarks.curve")
    quoted = re.search(r"(\d+ of \d+) rows of `metrics.jsonl` are equal", README.read_text())
    assert quoted is not None and printed.startswith(quoted[1])


@pytest.mark.slow
@needs_setuptools
def test_pip_would_install_what_the_text_says(shell: Shell) -> None:
    for command in filter(is_installation, inline()):
        shell.run(command.replace("pip install", f"{PIP} --dry-run"))
