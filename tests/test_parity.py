"""The claim: an experiment draws the same loss curve at every stage, to the last bit."""

from pathlib import Path

import pytest
from conftest import STAGES, Train


def curve(run_dir: Path) -> bytes:
    return (run_dir / "metrics.jsonl").read_bytes()


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("experiment", "dtype"),
    [
        ("lm", "float32"),
        ("lm", "bfloat16"),
        ("digits", "float32"),
        ("digits", "bfloat16"),
        ("diabetes", "float32"),
    ],
)
def test_four_stages_draw_the_same_loss_curve(train: Train, experiment: str, dtype: str) -> None:
    settings = (f"model.dtype={dtype}", "stop_at=100", "eval.every=50")
    curves = {stage: curve(train(experiment, f"stage={stage}", *settings)) for stage in STAGES}

    assert curves["linen"].count(b'"train"') == 100
    assert b'"eval"' in curves["linen"]
    assert len(set(curves.values())) == 1, first_difference(curves)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("experiment", ["diabetes", pytest.param("lm", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "options",
    [
        ("optimizer=sgd", "optimizer.chain.0.trace.decay=0.9", "optimizer.schedule=linear",
         "optimizer.parts.encoder.freeze=true", "optimizer.parts.head.lr_factor=0.5"),
        ("optimizer=lion", "optimizer.lr=1e-4", "optimizer.schedule=constant"),
        ("optimizer=adafactor", "optimizer.lr=1e-2"),
        ("optimizer.accumulate=3", "optimizer.ema=0.9", "optimizer.weight_decay=0.1"),
    ],
    ids=lambda options: options[0],
)  # fmt: skip
def test_the_curve_is_the_same_under_every_optimizer_setting(
    train: Train, experiment: str, options: tuple[str, ...]
) -> None:
    settings = ("steps=24", "optimizer.warmup=4", "eval.every=8")
    curves = {
        stage: curve(train(experiment, f"stage={stage}", *settings, *options)) for stage in STAGES
    }

    assert len(set(curves.values())) == 1, first_difference(curves)


@pytest.mark.long
def test_the_curve_is_the_same_with_recomputed_activations(train: Train) -> None:
    options = ("steps=24", "model.remat=true", "eval.every=8")
    curves = {stage: curve(train("digits", f"stage={stage}", *options)) for stage in STAGES}

    assert len(set(curves.values())) == 1, first_difference(curves)


def test_the_curve_depends_on_the_seed(train: Train) -> None:
    assert curve(train("diabetes", "steps=3", "seed=0")) != curve(
        train("diabetes", "steps=3", "seed=1")
    )


def test_dropout_is_on_in_the_curves_that_are_compared(train: Train) -> None:
    assert curve(train("diabetes", "steps=3")) != curve(
        train("diabetes", "steps=3", "model.dropout=0.0")
    )


def first_difference(curves: dict[str, bytes]) -> str:
    lines = {stage: text.split(b"\n") for stage, text in curves.items()}
    for rows in zip(*lines.values(), strict=False):
        if len(set(rows)) > 1:
            return "\n".join(f"{stage}: {row!r}" for stage, row in zip(lines, rows, strict=True))
    return "the curves have different lengths"
