"""Damaged checkpoints, runs and rule books are refused with a message: a sample of `make fuzz`."""

import pytest

from benchmarks.fuzz.attack import run_all


@pytest.mark.slow
def test_no_damage_of_some_hundred_breaks_a_reader(tmp_path):
    outcomes = run_all(tmp_path, seed=0, count=500)
    assert [str(outcome) for outcome in outcomes if outcome.fault] == []
    refused = sum(outcome.code == 1 for outcome in outcomes)
    assert refused > 250  # the damage is noticed, for the most part
