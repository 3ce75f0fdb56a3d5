"""Configurations: what composes, what is refused, and in which words."""

import copy
import dataclasses
import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from configs.build import ConfigError, Range, build, paths
from configs.schema import Config
from training.config import CHECKS
from training.runtime import cli
from training.runtime.cli import CONFIGS

ROOT = Path(__file__).resolve().parent.parent
compose = partial(cli.compose, schema=Config)
EXPERIMENTS = ["lm", "digits", "diabetes"]

# An entry script like train.py. Whatever happens, it tells on stderr if jax was imported.
PROGRAM = """
import atexit, sys
from configs.build import ConfigError
from configs.schema import Config
from training.runtime.cli import run
from training.datasets import create
from training.runtime.errors import Refused

atexit.register(lambda: "jax" in sys.modules and print("JAX WAS IMPORTED", file=sys.stderr))

def main(config):
    if config.seed == 1:
        raise Refused("run_dir holds another experiment")
    if config.seed == 2:
        raise KeyError("a bug")
    if config.seed == 3:
        raise ConfigError({"data.path": "got 'x'; no such file"})
    if config.seed == 4:
        raise KeyboardInterrupt
    print("ran", config.name, config.stage, config.steps)

def check_model(mapping):
    if mapping["model"].get("depth", 1) > 9:
        raise ConfigError({"model.depth": "got more than 9"})

run(main, Config, {"model": check_model, "data": lambda mapping: create(mapping["data"])})
"""


class Outcome:
    """What the entry script did with these arguments in an empty folder."""

    def __init__(self, folder: Path, *args: str, **environment: str) -> None:
        script = folder.parent / f"{folder.name}-script" / "train.py"
        script.parent.mkdir()
        script.write_text(PROGRAM)
        done = subprocess.run(
            [sys.executable, script, *args],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            capture_output=True,
            text=True,
        )
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr
        self.written = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]

    def is_one_message(self, code: int) -> bool:
        quiet = self.out == "" and "Traceback" not in self.err and "JAX" not in self.err
        return self.code == code and quiet and self.written == []


def plain(*overrides: str) -> dict[str, Any]:
    return dataclasses.asdict(compose(*overrides))


def leaves(mapping: dict[str, Any]) -> list[str]:
    every = paths(mapping)
    return [path for path in every if not any(other.startswith(f"{path}.") for other in every)]


def parent(mapping: dict[str, Any], path: str) -> tuple[dict[str, Any], str]:
    *groups, key = path.split(".")
    for group in groups:
        mapping = mapping[group]
    return mapping, key


DEFAULT = plain()
# What a part or a model may leave out, and what a chain holds, has tests of its own.
OPEN = ("model.", "data.", "optimizer.chain", "optimizer.parts.", "ported")
CHECKED = [path for path in leaves(DEFAULT) if not path.startswith(OPEN)]


# What composes


def test_every_experiment_takes_every_stage_optimizer_and_debug_mode():
    optimizers = [path.stem for path in (CONFIGS / "optimizer").glob("*.yaml")]
    modes = [path.stem for path in (CONFIGS / "debug").glob("*.yaml")]
    for name, optimizer in itertools.product(EXPERIMENTS, optimizers):
        config = compose(f"experiment={name}", f"optimizer={optimizer}", "stage=nnx")
        assert (config.name, config.optimizer.name) == (name, optimizer)
        assert config.run_dir == f"runs/{name}-nnx"
    for name, mode in itertools.product(EXPERIMENTS, modes):
        config = compose(f"experiment={name}", f"debug={mode}")
        assert config.debug.mode == mode
        assert (config.run_dir == f"runs/{name}-nnx_in_linen") == (mode == "none")


def test_experiments_choose_their_groups():
    chosen = {
        name: (config.model["family"], config.data["name"])
        for name in EXPERIMENTS
        for config in [compose(f"experiment={name}")]
    }
    assert chosen == {
        "lm": ("transformer", "text"),
        "digits": ("convnet", "digits"),
        "diabetes": ("mlp", "diabetes"),
    }


def test_the_command_line_has_the_last_word():
    config = compose("experiment=digits", "debug=one_step", "steps=7", "stop_at=3", "run_dir=here")
    assert (config.steps, config.stop_at, config.run_dir) == (7, 3, "here")


def test_positions_follow_the_length_of_the_data():
    assert compose("data.length=64").model["length"] == 64


def test_a_config_survives_its_yaml_file():
    for name in EXPERIMENTS:
        mapping = plain(f"experiment={name}", "optimizer.lr=1e-7", "optimizer.ema=0.999")
        assert build(Config, yaml.safe_load(yaml.safe_dump(mapping))) == build(Config, mapping)


def test_a_config_is_frozen_and_plain():
    config = compose()
    assert type(config.model) is dict
    assert type(config.optimizer.lr) is float
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.optimizer.lr = 1.0


# What `build` refuses


@pytest.mark.parametrize("path", CHECKED)
def test_each_key_refuses_a_wrong_type_and_its_absence(path):
    mapping = plain()
    group, key = parent(mapping, path)
    group[key] = [1]
    with pytest.raises(ConfigError) as error:
        build(Config, mapping)
    assert list(error.value.problems) == [path]
    assert "got [1]; expected " in error.value.problems[path]
    del group[key]
    with pytest.raises(ConfigError) as error:
        build(Config, mapping)
    assert list(error.value.problems) == [path]
    assert error.value.problems[path].startswith("missing; expected ")


@given(st.sets(st.sampled_from(CHECKED), min_size=1))
def test_every_mismatch_is_in_one_error(wrong):
    mapping = copy.deepcopy(DEFAULT)
    for path in wrong:
        group, key = parent(mapping, path)
        group[key] = {"no": "such"}
    with pytest.raises(ConfigError) as error:
        build(Config, mapping)
    assert set(error.value.problems) == wrong
    assert all(f"  {path}: got a group of keys (no)" in str(error.value) for path in wrong)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("steps", 1e3, "got 1000.0; expected a whole number, at least 1: write 1000"),
        ("steps", True, "got true; expected a whole number, at least 1"),
        ("steps", 0, "got 0; expected a whole number, at least 1"),
        ("steps", None, "got null; expected a whole number, at least 1"),
        ("seed", -1, "got -1; expected a whole number, at least 0"),
        ("stop_at", "", "got ''; expected a whole number, at least 1, or null"),
        ("run_dir", 12, "got 12; expected text: quote it, 'run_dir=\"12\"'"),
        ("run_dir", "", "got ''; expected text"),
        ("stage", "nxx", "got 'nxx'; expected one of linen, nnx_in_linen, linen_in_nnx, nnx; "),
        ("optimizer.lr", "abc", "got 'abc'; expected a number, above 0"),
        ("optimizer.lr", float("inf"), "got inf; expected a number, above 0"),
        ("optimizer.lr", float("nan"), "got nan; expected a number, above 0"),
        ("optimizer.lr", 0, "got 0; expected a number, above 0"),
        ("optimizer.ema", 1.0, "got 1.0; expected a number, above 0 and below 1, or null"),
        ("optimizer.end_lr_factor", 1.5, "got 1.5; expected a number, at least 0 and at most 1"),
        ("optimizer.parts.head.freeze", 1, "got 1; expected true or false"),
        ("optimizer.parts.head", 1, "got 1; expected a group of keys"),
        ("model", None, "got null; expected a group of keys"),
        ("stop_at", 561, "got 561; expected at most steps, 560"),
        ("run_dir", "gs://a/b", "got 'gs://a/b'; expected a folder on a disk, as a run locks it"),
        ("optimizer.chain", "adamw", "got 'adamw'; expected a list, or null"),
    ],
)
def test_a_wrong_value_is_told_with_what_is_expected(path, value, words):
    mapping = plain()
    group, key = parent(mapping, path)
    group[key] = value
    with pytest.raises(ConfigError) as error:
        build(Config, mapping)
    assert list(error.value.problems) == [path]
    assert error.value.problems[path].startswith(words)


def test_settings_that_a_choice_does_not_have_are_refused():
    for overrides, key in [
        (["~model.family"], "model.family"),
    ]:
        with pytest.raises(ConfigError) as error:
            compose(*overrides)
        assert list(error.value.problems) == [key]


def test_whole_numbers_become_floats_exactly():
    weight_decay = compose("optimizer.weight_decay=1").optimizer.weight_decay
    assert type(weight_decay) is float
    assert weight_decay == 1.0


@dataclasses.dataclass(frozen=True)
class Family:
    family: Literal["mine"]
    depth: Annotated[int, Range(low=1, high=8)]
    width: int = 16

    def __post_init__(self) -> None:
        if self.width % self.depth:
            raise ConfigError({"width": f"got {self.width}; expected a multiple of depth"})


def test_a_family_builds_its_own_options_with_paths_under_model():
    assert build(Family, {"family": "mine", "depth": 2}, at="model") == Family("mine", 2)
    for mapping, problems in [
        (
            {"family": "mine", "depth": 9},
            {"model.depth": "got 9; expected a whole number, at least 1 and at most 8"},
        ),
        (
            {"family": "mine", "dpth": 2},
            {
                "model.dpth": "unknown key; did you mean 'model.depth'?",
                "model.depth": "missing; expected a whole number, at least 1 and at most 8",
            },
        ),
        ({"family": "mine", "depth": 5}, {"model.width": "got 16; expected a multiple of depth"}),
    ]:
        with pytest.raises(ConfigError) as error:
            build(Family, mapping, at="model")
        assert error.value.problems == problems


# What the command line answers


@pytest.mark.sampled(7)
@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["stpes=3"], ["stpes: unknown key; did you mean 'steps'?"]),
        (["lr=3"], ["lr: unknown key; did you mean 'optimizer.lr'?"]),
        (["modl.depth=3"], ["modl.depth: unknown key; did you mean 'model.depth'?"]),
        (["expriment=lm"], ["expriment: unknown key; did you mean 'experiment'?"]),
        (["~stpes"], ["stpes: unknown key; did you mean 'steps'?"]),
        (["+stpes=3"], ["stpes: unknown key; did you mean 'steps'?"]),
        (["+data.foo=3"], ["data.foo: unknown key; known: data.batch, data.length, data.name"]),
        (["data.length=null"], ["data.length: got null; expected a whole number, at least 1"]),
        (["data.batch=0"], ["data.batch: got 0; expected a whole number, at least 1"]),
        (["experiment=digits", "+data.path=x"], ["data.path: unknown key"]),
        (["data.name=txt"], ["data.name: got 'txt'; did you mean 'text'?"]),
        (["~steps"], ["steps: missing; expected a whole number, at least 1"]),
        (["experiment=dgits"], ["experiment: got 'dgits'; did you mean 'digits'?"]),
        (["optimizer.learning_rate=1"], ["did you mean 'optimizer.lr'?"]),
        (["trainer.max_epochs=1"], ["trainer.max_epochs: unknown key; did you mean 'steps'?"]),
        (["logger=csv"], ["did you mean 'log.tensorboard' or 'log.csv' or"]),
        (["experiment=x"], ["experiment: got 'x'; known: diabetes, digits, lm, sweep"]),
        (["experiment=null"], ["experiment: got null; known: diabetes, digits, lm, sweep"]),
        (["~experiment"], ["name: got null; expected text"]),
        (["+experiment=lm"], ["configs: experiment appears more than once"]),
        (["debug=one_stp"], ["debug: got 'one_stp'; did you mean 'one_step'?"]),
        (
            ["steps=3=4"],
            ["'steps=3=4': cannot be read (mismatched input '='", "expected key=value"],
        ),
        (["steps"], ["'steps': cannot be read"]),
        (["steps=1,2"], ["configs: Ambiguous value for argument 'steps=1,2'"]),
        (["name=${nowhere}"], ["name: Interpolation key 'nowhere' not found"]),
        (["stage=???"], ["stage: Missing mandatory value: stage"]),
        (["steps=1e3"], ["steps: got 1000.0; expected a whole number, at least 1: write 1000"]),
        (["model.depth=10"], ["model.depth: got more than 9"]),
        (["--config-name=x"], ["configs: Cannot find primary config 'x'."]),
        (["--stpes"], ["unrecognized arguments: --stpes"]),
        (
            ["stpes=3", "+foo.bar=1", "optimizer.lr=abc", "steps=true", "model.depth=10"],
            [
                "The configuration has 5 problems:",
                "stpes: unknown key",
                "foo: unknown key",
                "optimizer.lr: got 'abc'",
                "steps: got true",
                "model.depth: got more than 9",
            ],
        ),
        (["--cfg", "job", "stpes=3"], ["stpes: unknown key; did you mean 'steps'?"]),
        (["seed=3"], ["data.path: got 'x'; no such file"]),
    ],
)
def test_a_usage_error_is_one_message_and_nothing_is_written(tmp_path, args, words):
    outcome = Outcome(tmp_path, *args)
    assert outcome.is_one_message(code=2), outcome.err
    assert all(word in outcome.err for word in words), outcome.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stpes: 3", "stpes: unknown key; did you mean 'steps'?"),
        ("optimizer: {lr: fast}", "optimizer.lr: got 'fast'; expected a number, above 0"),
        ("defaults: [override /model: ml]", "not find 'model/ml'; did you mean 'mlp'?"),
        ("steps: [", "mine.yaml"),
    ],
)
def test_a_mistake_in_an_experiment_file_is_told_as_well(tmp_path, tmp_path_factory, text, words):
    folder = tmp_path_factory.mktemp("configs")
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    outcome = Outcome(tmp_path, "experiment=mine", "--config-dir", str(folder))
    assert outcome.is_one_message(code=2), outcome.err
    assert words in outcome.err


def test_a_refusal_is_its_message_alone(tmp_path):
    outcome = Outcome(tmp_path, "seed=1")
    assert outcome.is_one_message(code=1)
    assert outcome.err == "run_dir holds another experiment\n"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (("experiment=diabetes", "model.features=5", "model.outputs=2"),
         {"model.features": "got 5; the data has inputs of shape (10,)",
          "model.outputs": "got 2; the data has targets of shape (1,)"}),
        (("experiment=digits", "model.classes=5"),
         {"model.classes": "got 5; the data has 10 classes"}),
        (("experiment=diabetes", "model=convnet"),
         {"model.channels": "got 1; the data has inputs of shape (10,)",
          "model.classes": "got 10; the data has no classes"}),
        (("experiment=lm", "model.vocab=128", "model.length=32"),
         {"model.vocab": "got 128; the data has 256 symbols",
          "model.length": "got 32; the data has inputs of shape (64,)"}),
        (("experiment=lm", "model=mlp"),
         {"model.features": "got 10; the data has inputs of shape (64,)",
          "model.outputs": "got 1; the data has targets of shape (64,)"}),
    ],
)  # fmt: skip
def test_a_model_that_the_data_does_not_fit_is_refused(overrides, named, tmp_path):
    from training.loop import train

    with pytest.raises(ConfigError) as error:
        train(compose(*overrides, f"run_dir={tmp_path / 'run'}"))
    assert error.value.problems == named
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", ["model.family=3", "~model.family"])
def test_a_model_without_the_name_of_a_family_is_refused(change):
    with pytest.raises(ConfigError) as error:
        compose(change, "steps=0", checks={"model": CHECKS["model"]})
    assert error.value.problems.keys() == {"model.family", "steps"}


def test_an_interrupt_that_nobody_expects_ends_with_a_message(tmp_path):
    outcome = Outcome(tmp_path, "seed=4")
    assert outcome.is_one_message(130)
    assert outcome.err.startswith("Interrupted.")


def test_a_bug_keeps_its_traceback(tmp_path):
    outcome = Outcome(tmp_path, "seed=2")
    assert outcome.code == 1
    assert "Traceback" in outcome.err
    assert outcome.err.endswith("KeyError: 'a bug'\n")


def test_a_run_gets_its_config_and_hydra_writes_nothing(tmp_path):
    outcome = Outcome(tmp_path, "experiment=digits", "stage=nnx", "steps=5")
    assert (outcome.code, outcome.out, outcome.err) == (0, "ran digits nnx 5\n", "")
    assert outcome.written == []


def test_a_multirun_runs_each_job(tmp_path):
    jobs = ("stage=linen,nnx", "steps=5,6")
    outcome = Outcome(tmp_path, "--multirun", *jobs, "run_dir=runs/${stage}${steps}")
    said = []
    for number, (stage, steps) in enumerate(itertools.product(("linen", "nnx"), (5, 6)), 1):
        said += [f"job {number} of 4: runs/{stage}{steps}", f"ran lm {stage} {steps}"]
    assert (outcome.code, outcome.out.splitlines()) == (0, said)
    assert outcome.written == ["runs", "runs/multirun.yaml"]


@pytest.mark.parametrize(
    "args",
    [
        ("optimizer.lr=1e-3,1e-2",),
        ("experiment=sweep", "run_dir=runs/${seed}"),
        ("hydra/sweeper=optuna", "optimizer.lr=interval(1e-4, 1e-1)"),
        ("optimizer.lr=1e-3,1e-2", "run_dir=runs/${optimizer.lr}", "checkpoint.dir=runs/kept"),
    ],
)
def test_a_multirun_into_one_folder_is_refused_before_its_first_job(tmp_path, args):
    outcome = Outcome(tmp_path, "--multirun", *args)
    assert outcome.is_one_message(code=2), outcome.err
    key = "checkpoint.dir" if "checkpoint.dir=runs/kept" in args else "run_dir"
    assert f"{key}: got runs/" in outcome.err and "lr${optimizer.lr}" in outcome.err


def test_the_configuration_can_be_shown_without_a_run(tmp_path):
    outcome = Outcome(tmp_path, "experiment=digits", "--cfg", "job", "--resolve")
    assert build(Config, yaml.safe_load(outcome.out)) == compose("experiment=digits")
    assert outcome.written == []


def test_the_shell_completes_experiments(tmp_path):
    line = "python train.py experiment=di"
    outcome = Outcome(tmp_path, "--shell-completion", "query=bash", COMP_LINE=line)
    assert {"experiment=diabetes", "experiment=digits"} == set(outcome.out.split())


def test_help_lists_every_choice_and_every_key(tmp_path):
    outcome = Outcome(tmp_path, "--help")
    assert (outcome.code, outcome.err, outcome.written) == (0, "", [])
    assert outcome.out.startswith("usage: python train.py [experiment=NAME]")
    for file in CONFIGS.glob("*/*.yaml"):
        choice = f"  {file.parent.name}={file.stem}  "
        assert (choice in outcome.out) == (file.parent.name != "rules")  # rule books are no choice
    for path in leaves(DEFAULT):
        if path != "debug.mode":  # what debug=... sets
            assert f"{path.rpartition('.')[2]}: " in outcome.out
    assert "hydra:" not in outcome.out.replace("${hydra:", "")
