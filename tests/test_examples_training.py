"""The examples that train: each the same curve, in every byte, at all four stages."""

import json
import re
from pathlib import Path

import pytest
from conftest import QUIET, STAGES
from pages import ROOT

from training import compose, loop

EXAMPLES = ROOT / "examples"
# By family: what makes it small. Dropout, noise, averages, clipping all stay on.
SMALL = {
    "actor_critic": ("model.width=8", "data.moves=400", "data.batch=16"),
    "classifier": ("model.width=4", "data.sentences=100", "data.length=8", "data.batch=8"),
    "diffusion": ("model.width=4", "data.batch=8"),
    "sums": ("model.depth=1", "model.width=8", "data.sums=160", "data.digits=2", "data.batch=8"),
    "vae": ("model.hidden=8", "data.batch=8"),
}
LONG = ("actor_critic", "classifier", "diffusion", "sums")  # to compile


def train(name: str, run_dir: Path, *overrides: str) -> list[str]:
    """Trains a small example in this process; the lines of its `metrics.jsonl`."""
    settings = [*SMALL[name], *QUIET, "steps=6", "optimizer.warmup=0", "log.samples=0"]
    settings += ["eval={every: 3, batches: 2}", "checkpoint.best=false", "checkpoint.every=100000"]
    if name == "sums":
        settings.append(f"data.path={run_dir.parent / 'files'}")
    cfg = compose(
        f"experiment={name}",
        *settings,
        f"run_dir={run_dir}",
        *overrides,
        config_dir=EXAMPLES / name / "configs",
    )
    loop.train(cfg)
    return (run_dir / "metrics.jsonl").read_text().splitlines()


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.long] * (name in LONG)) for name in SMALL]
)
def test_an_example_draws_the_same_curve_at_all_four_stages(name: str, tmp_path: Path) -> None:
    """And one that was stopped half way goes on with it: optimizers, target, files being read."""
    curves = []
    for stage in STAGES:
        if stage == "nnx":
            train(name, tmp_path / stage, f"stage={stage}", "stop_at=2")
        curves.append(train(name, tmp_path / stage, f"stage={stage}"))
    assert curves == [curves[0]] * len(STAGES)
    losses = [json.loads(line)["loss"] for line in curves[0]]
    assert len(losses) == len(set(losses)) == 8


def test_the_models_of_the_examples_import_nothing_of_this_project() -> None:
    for name in SMALL:
        for file in ("linen.py", "nnx.py"):
            lines = (EXAMPLES / name / file).read_text().splitlines()
            imported = {line.split()[1] for line in lines if line.startswith(("import ", "from "))}
            assert imported <= {"flax", "flax.linen", "jax", "jax.numpy"}, (name, file)


@pytest.mark.slow
def test_a_target_network_and_two_optimizers_go_to_another_stage(tmp_path: Path) -> None:
    """Each of them mirrors some of the parameters, not all."""
    whole = train("actor_critic", tmp_path / "whole", "stage=linen")
    train("actor_critic", tmp_path / "half", "stage=linen", "stop_at=3")
    rest = train("actor_critic", tmp_path / "rest", "stage=nnx", f"init_from={tmp_path / 'half'}")
    assert rest == whole


def test_every_example_is_listed() -> None:
    families = {path.parent.name for path in EXAMPLES.glob("*/configs")}
    listed = re.findall(r"^\| (?:\[?`)(\w+)`", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert {*listed} >= families == {*SMALL}
