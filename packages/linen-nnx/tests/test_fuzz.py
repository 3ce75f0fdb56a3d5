"""Damaged checkpoints, runs and rule books are refused with a message: a sample of `make fuzz`."""

import contextlib
import itertools
import json

import pytest

from benchmarks.fuzz.attack import run_all
from linen_nnx import Refusal
from linen_nnx.disk.runs import NO_RUNS, said_in

STRANGE = (None, True, -1, 1.5, "", "x", "nnx", [], [1], [[]], {}, {"a": {}}, {"a": []})


@pytest.mark.slow
def test_no_damage_of_some_hundred_breaks_a_reader(tmp_path):
    outcomes = run_all(tmp_path, seed=0, count=500)
    assert [str(outcome) for outcome in outcomes if outcome.fault] == []
    refused = sum(outcome.code == 1 for outcome in outcomes)
    assert refused > 250  # the damage is noticed, for the most part


def test_whatever_a_checkpoint_says_of_itself_is_read_or_refused(tmp_path):
    (tmp_path / "run").mkdir()
    known = {"stage": "linen", "rules": {}, "forms": {"a": "nnx"}, "ported": ["a"], "config": {}}
    for left_out, key in itertools.product((None, *known), known):
        for value in STRANGE:
            content = {**known, key: value}
            content.pop(left_out, None)
            (tmp_path / "run" / "metadata").write_text(json.dumps(content))
            with contextlib.suppress(Refusal):
                if (said := said_in(tmp_path, NO_RUNS)) is not None:
                    said.at("nnx_in_linen")
