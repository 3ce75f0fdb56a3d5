"""Each command of README.md, CONTRIBUTING.md and docs/ is run, and prints what the page quotes.

What a page shows runs as it is written, in a copy of the project whose models are smaller. The few
commands that cannot, stand in a table here beside what is run instead; any other that fails, or
does not exist, fails its test.
"""

import dataclasses
import math
import os
import re
import tomllib
from contextlib import nullcontext
from importlib.util import find_spec
from pathlib import Path

import orbax.checkpoint as ocp
import pytest
import yaml
from conftest import needs_setuptools
from convert_helpers import bits
from pages import ROOT, SHELL, Block, Shell, blocks, follow, missing, project, spans

from configs.build import paths
from linen_nnx import RuleBook
from training import cli

README, CONTRIBUTING, DOCS = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs"
PAGES = [README, CONTRIBUTING, ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*/README.md"))

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
    "pip install .": f"cd ../clone && {PIP} --target ../site .",
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

# In the text: command -> what is run instead.
INLINE = {
    "python -m benchmarks.curve": "python -m benchmarks.curve --help",  # whole: a long test
    ".venv/bin/tensorboard --logdir runs": (
        "python train.py experiment=diabetes debug=one_step && test -x .venv/bin/tensorboard &&"
        " python -m tensorboard.main --logdir runs --inspect | grep final/eval_loss"
    ),
    "make train": "make -n train",  # in a block, too
    "make test": "make -n test",
    "make lint": "make -n lint | sed 's/pyrefly check/& --help/; s/ruff .*/& --help/' | sh -e",
    "make bench": "make -n bench && python -m benchmarks --help",
    **{
        f"make bench ARGS={name}": f"make bench ARGS=--help | grep -w '  {name}' &&"
        f" python -m benchmarks.{name} --help"
        for name in ("convert", "steps", "loop")
    },
    "make parity": 'make parity ARGS="--only dense"',
    ".ci/run": "bash -n .ci/run && test -x .ci/run",
    "cp -r": "cp -r docs copied",
    # What it would install is on no list of ours; its hooks are the commands of `make lint`.
    "pip install pre-commit && pre-commit install": "make -n lint | sed 's/ [.]$//' |"
    ' while read hook; do grep -F "entry: $hook" .pre-commit-config.yaml || exit 1; done',
    "python convert.py inspect CKPT": "python convert.py inspect --help | grep CKPT",
    **{
        f"convert.py {name}": f"python convert.py {name} --help"
        for name in ("suggest", "verify", "bisect")
    },
    # test_examples.py holds what it suggests together with the rule book of the example.
    "python convert.py suggest examples/bert/twin.py:twin": (
        "python convert.py suggest --help && test -f examples/bert/twin.py"
    ),
    "linen-nnx run": "python convert.py run --help",
    "verify --twin": "python convert.py verify --help | grep -e --twin",
    "--to nnx": "python convert.py run --help | grep -e '--to '",
    "--to linen": "python convert.py run --help | grep -e '--to '",
    "not proved": "grep 'not proved' linen_nnx/cli.py",  # no command, but what one prints
    "digests of the source": "grep -r 'digests of the source' linen_nnx/proof",
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
MINE = {
    "mine/linen_model.py": """
import flax.linen as nn

class MyLinen(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.relu(nn.Dense(self.width, name="hidden")(x)))
""",
    "mine/nnx_model.py": """
from flax import nnx

class MyNnx(nnx.Module):
    def __init__(self, width, rngs):
        self.first = nnx.Linear(16, width, rngs=rngs)
        self.last = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.first(x)))
""",
    "mine/train.py": """
from pathlib import Path
import jax, jax.numpy as jnp, optax, orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from mine.linen_model import MyLinen

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))

if __name__ == "__main__":
    model, x = MyLinen(width=64), jnp.ones((2, 16))
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), x)["params"], tx=TX
    )
    for _ in range(3):
        grads = jax.grad(lambda p: (model.apply({"params": p}, x) ** 2).sum())(state.params)
        state = state.apply_gradients(grads=grads)
    with ocp.CheckpointManager(Path("checkpoints").absolute()) as manager:
        manager.save(3, args=ocp.args.StandardSave(state))
""",
}


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
    for path in (folder / "tests").glob("test_*.py"):
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


def commands(page: Path) -> list[str]:
    return [x for block in blocks(page) if block.language in SHELL for x in block.commands]


def is_command(span: str) -> bool:
    """Whether a text in backticks is a program, or several words that are no piece of code."""
    first, *rest = span.split()
    named = rest and re.fullmatch(r"(--)?[a-z./][\w./-]*", first)
    return bool(named) or ((ROOT / span).is_file() and os.access(ROOT / span, os.X_OK))


def inline() -> list[str]:
    """Every command that stands in a line of text."""
    found = [span for page in (*PAGES, *EXAMPLES) for span in spans(page) if is_command(span)]
    return [*dict.fromkeys(found)]


@pytest.mark.slow
def test_the_two_commands_of_the_readme_and_those_of_training(shell: Shell) -> None:
    follow(sections(README, "Two commands"), shell, tolerance=math.inf)
    follow(sections(README, "Commands", "Changing stage"), shell)


@pytest.mark.long
def test_make_train_ends_as_the_readme_quotes(tmp_path: Path) -> None:
    shell = Shell(project(tmp_path))
    follow(sections(README, "Two commands"), shell, {"make test": "make -n test"})


@pytest.mark.slow
def test_the_commands_of_converting(shell: Shell) -> None:
    shell.run("python train.py experiment=digits stop_at=20 && python train.py stop_at=2")
    (shell.folder / "models.py").write_text(MODELS)
    (shell.folder / "tests" / "faults.py").rename(shell.folder / "faults.py")
    shell.python(CHECKPOINT)
    follow(sections(README, "Converting checkpoints"), shell, INSTEAD)
    assert (shell.folder / "errors.png").stat().st_size > 0


@pytest.mark.slow
def test_the_commands_of_scale(shell: Shell) -> None:
    instead = INSTEAD | dict.fromkeys(EXTRAS, "true")
    follow(sections(README, "Scale"), shell, instead)


@pytest.mark.slow
@pytest.mark.parametrize("command", EXTRAS, ids=[module for module, _ in EXTRAS.values()])
def test_the_commands_of_an_extra(shell: Shell, command: str) -> None:
    module, run = EXTRAS[command]
    if find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{module}") is None:
        pytest.skip(f"{module} is not installed")
    shell.run(run)


@pytest.mark.slow
def test_the_commands_of_the_migration_page(shell: Shell) -> None:
    follow(blocks(DOCS / "migrate.md"), shell)


@pytest.mark.slow
@needs_setuptools
def test_the_library_alone_takes_a_strangers_checkpoint_to_nnx_and_back(shell: Shell) -> None:
    mine, site = shell.folder.parent / "mine", shell.folder.parent / "site"
    for name, content in MINE.items():
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text(content)
    stranger = Shell(mine, site / "bin")
    stranger.env["PYTHONPATH"] = str(site)
    stranger.run("python -m mine.train")
    before = "from mine.nnx_model import MyNnx\nfrom mine.train import TX as tx\n"
    page = [
        Block(b.section, b.language, b.text.replace("/absolute/path", str(mine)), b.file)
        for b in blocks(DOCS / "library.md")
    ]

    follow(page, stranger, INSTEAD, before=before)

    trees = []
    for name in ("checkpoints", "back"):
        with ocp.CheckpointManager(mine / name) as manager:
            trees.append(bits(manager.restore(3, args=ocp.args.StandardRestore())))
    assert trees[0] == trees[1]


def test_the_example_of_the_rules_page() -> None:
    follow(blocks(DOCS / "rules.md"), Shell(ROOT))


@pytest.mark.slow
def test_commands_in_the_text_do_what_they_say(shell: Shell) -> None:
    shown = {command for page in (*PAGES, *EXAMPLES) for command in commands(page)}
    for command in inline():
        if command in INLINE or (command not in shown and command not in installs()):
            shell.run(INLINE.get(command, command))


@pytest.mark.long
def test_the_curve_of_the_readme_is_drawn_as_its_caption_says(shell: Shell) -> None:
    printed = shell.run("python -m benchmarks.curve")
    quoted = re.search(r"(\d+ of \d+) rows of `metrics.jsonl` are equal", README.read_text())
    assert quoted is not None and printed.startswith(quoted[1])


def test_no_block_is_left_out_and_no_table_names_what_no_page_shows() -> None:
    followed = {"Two commands", "Commands", "Changing stage", "Converting checkpoints", "Scale"}
    assert {block.section for block in blocks(README)} == followed | {"Layout"}
    others = {page.name for page in PAGES if blocks(page)} - {"README.md"}
    assert others == {"family.md", "library.md", "migrate.md", "rules.md"}  # family: test_docs.py
    shown = {command for page in PAGES for command in commands(page)}
    assert {*INSTEAD, *EXTRAS} <= shown
    assert {*INLINE} <= {*inline()}


def installs() -> list[str]:
    return [x for x in inline() if x.startswith("pip install") and x not in INLINE]


def test_extras_that_are_to_be_installed_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"\.\[([\w,]+)\]", " ".join(installs()))
    assert len(named) == 2
    extras = {extra for text in named for extra in text.split(",")}
    assert extras <= {*project["optional-dependencies"]}


@pytest.mark.slow
@needs_setuptools
def test_pip_would_install_what_the_text_says(shell: Shell) -> None:
    for command in installs():
        shell.run(command.replace("pip install", f"{PIP} --dry-run"))


def test_yaml_on_the_pages_is_a_rule_book_or_starts_a_run() -> None:
    kinds = []
    for page in PAGES:
        for block in blocks(page):
            if block.language == "yaml" and block.file is None:
                documents = list(yaml.safe_load_all(block.text))
                kinds.append(len(documents))
                if len(documents) == 1:
                    assert RuleBook.from_dict(documents[0]).rules
                else:
                    assert_starts_a_run(*documents)
    assert kinds == [2, 1, 1, 1]


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
        given = cli.compose(*own).distributed
        assert (given.num_processes, given.process_id) == (count, index)
        assert given.coordinator.split(":")[0] == f"{name}-0.{pods['subdomain']}"


# Paths in rule books and checkpoints, and what a run writes.
ELSEWHERE = {
    "hn/bias", "collection/a/b/kernel", "a/0/kernel", ".cache/jax", "runs/<experiment>-<stage>",
    "checkpoints/<step>/", "best/<step>/", "nonfinite/",
}  # fmt: skip


@pytest.mark.parametrize("page", [*PAGES, *EXAMPLES], ids=lambda page: page.parent.name + page.stem)
def test_files_options_and_links_that_a_page_names_exist(page: Path) -> None:
    made = {block.file for block in blocks(page)}
    sources = "".join(
        path.read_text() for path in (ROOT / "linen_nnx/cli.py", *ROOT.glob("examples/*/*.py"))
    )
    lines = [block.text for block in blocks(page) if block.language == "text"]
    listed = [line.split()[0] for text in lines for line in text.splitlines()]
    for span in spans(page) + listed:
        if re.fullmatch(r"[\w.<>-]*/[\w./<>-]*", span) and span not in ELSEWHERE | made:
            assert list(ROOT.glob(span.replace("NAME", "*").rstrip("/"))), span
        if re.fullmatch(r"--[a-z-]+", span):
            assert f'"{span}"' in sources or span == "--multirun", span
    for target in re.findall(r"\]\((?!https:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_keys_that_the_text_names_exist() -> None:
    configs = [cli.compose(f"experiment={name}") for name in ("lm", "digits", "diabetes")]
    keys = {key for config in configs for key in paths(dataclasses.asdict(config))} | {"experiment"}
    short = {key.rpartition(".")[2] for key in keys}
    groups = {key.split(".")[0] for key in keys if "." in key}
    python = {"promote_dtype", "force", "overwrite", "rngs"}  # arguments of functions
    for page in PAGES:
        for span in spans(page):
            if not re.search(r"[({]", span):
                for key in re.findall(r"(?<![\w.'-])([a-z_]+(?:\.[a-z_]+)*)=", span):
                    assert key in keys | short | python, f"{page.name}: {key}"
                if span.split(".")[0] in groups and re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", span):
                    assert span in keys, f"{page.name}: {span}"


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
