"""Golden rows: what moves all four stages alike, such as another initialisation, is seen here.

The other tests compare the stages with each other, and so cannot see it. A change that is meant to
move the curves writes the figures that it finds into this file, and says why in its message.
"""

import json
from pathlib import Path

import jax
import pytest
from conftest import QUIET, SMALL, Train

from training import compose
from training.assemble import prepare

# The losses of the first four steps, and the validation loss after them.
GOLDEN = {
    "lm": ([6.058136, 6.067670, 6.108777, 6.136027], 5.943300),
    "digits": ([2.333722, 2.376467, 2.455908, 2.583683], 2.358502),
    "diabetes": ([3.136357, 3.202138, 4.590585, 1.531802], 2.738352),
}
# Other machines and versions of XLA round otherwise; another seed moves the first digits.
CLOSE = 1e-4


@pytest.mark.parametrize("experiment", GOLDEN)
def test_the_first_losses_of_an_experiment_are_the_known_ones(
    train: Train, tmp_path: Path, experiment: str
) -> None:
    settings = ["stop_at=4", "eval.every=4"]
    if experiment == "diabetes":  # the others run programs that other tests run, too
        settings += ["steps=4", "optimizer.warmup=2"]
    if experiment == "lm":  # the text of Python's reference differs from version to version
        text = "".join(f"The square of {n} is {n * n}.\n" for n in range(3000))
        (tmp_path / "squares.txt").write_text(text)
        settings.append(f"data.path={tmp_path / 'squares.txt'}")

    run = train(experiment, *settings)

    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if row["split"] == "train"]
    (validation,) = (row["loss"] for row in rows if row["split"] == "eval")
    first, last = GOLDEN[experiment]
    assert losses == pytest.approx(first, rel=CLOSE)
    assert validation == pytest.approx(last, rel=CLOSE)


def test_a_batch_is_all_that_a_step_takes_from_the_host() -> None:
    setup = prepare(compose(*SMALL["diabetes"], *QUIET))
    program = setup.program
    state, batch = program.init(), jax.device_put(setup.example)
    state, _ = program.train_step(state, batch)  # compiling does move constants

    with jax.transfer_guard("disallow"):
        state, metrics = program.train_step(state, batch)
        assert jax.device_get(metrics["loss"]) > 0
        with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
            program.train_step(state, setup.example)
