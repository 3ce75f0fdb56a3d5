"""`convert.py verify RUN OUT` proves a run's change of stage in every bit, from its own config."""

import json

import pytest
from conftest import Train
from linen_nnx import RuleBook
from linen_nnx.cli import main
from linen_nnx.disk.convert import convert

from training.runtime.runs import RUNS

OWN = {"runs": "training.runtime.runs:RUNS", "build": "training.proof:subject"}
LM = ("model.dtype=bfloat16", "optimizer.ema=0.9", "optimizer.accumulate=2")


def proof(capsys, *arguments):
    """The exit code, and the checks by name."""
    code = main(["verify", *map(str, arguments), "--json"], **OWN)
    content = json.loads(capsys.readouterr().out.splitlines()[-1])
    return code, {check["name"]: check for check in content["checks"]}


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("experiment", "before", "after", "settings"),
    [
        pytest.param("lm", "linen", "nnx", LM, marks=pytest.mark.long),
        ("diabetes", "linen_in_nnx", "linen", ("optimizer.parts.encoder.freeze=true",)),
        ("digits", "nnx", "linen", ("optimizer=lion", "optimizer.lr=1e-3")),
    ],
)
def test_a_runs_change_of_stage_is_proved_in_every_bit(
    train: Train, tmp_path, capsys, experiment, before, after, settings
):
    run = train(experiment, f"stage={before}", "steps=8", "stop_at=4", *settings)
    convert(run, tmp_path / "out", after, runs=RUNS)
    code, checks = proof(capsys, run, tmp_path / "out")
    numeric = [c for name, c in checks.items() if name.startswith(("forward", "gradients", "one"))]

    assert code == 0 and len(numeric) == 5
    assert all(c["passed"] and not c["close"] and "exact" in c["details"][0] for c in numeric)
    assert checks["a step from a fresh optimizer, which must differ"]["passed"]
    blind = checks["every leaf is seen by an output"]["details"]
    assert bool(blind) == (experiment == "lm") and all("/key/bias`" in text for text in blind)


@pytest.mark.long
def test_a_wrong_rule_book_of_a_run_is_found_by_running_it(train: Train, tmp_path, capsys):
    run = train("lm", "stage=linen", "steps=2", "model.depth=1")
    rules = RuleBook.load(run / "rules.yaml").to_dict()
    norms = [rule for rule in rules["rules"] if rule["nnx"].endswith("_norm/{leaf}")]
    norms[0]["nnx"], norms[1]["nnx"] = norms[1]["nnx"], norms[0]["nnx"]
    convert(run, tmp_path / "out", "nnx", rules=RuleBook.from_dict(rules), runs=RUNS)
    code, checks = proof(capsys, run, tmp_path / "out")

    assert code == 1
    assert checks["every bit, through the rule book"]["passed"]
    assert not checks["forward pass, randomised weights"]["passed"]
