"""The claim of docs/optimizers.md: which updates are the same bits however leaves are named."""

from pathlib import Path

import pytest
from optimizers import measure

from training import chains

PAGE = (Path(__file__).parents[1] / "docs" / "optimizers.md").read_text()
ROUNDING = 1e-3  # of how far a leaf has moved; measured at most 5e-5
SOME = ["adam", "clip_by_global_norm", "momo", "muon"]


def row(name):
    reasons = chains.depending_on_stage([{name: {}}])
    return next(iter(reasons.values()), None)


def check(name):
    measured, reason = measure(name), row(name)
    if isinstance(measured, str):
        assert f"`{name}`" in PAGE.split("## What cannot be named")[1], measured
    elif reason is None:
        assert measured == {"renamed": 0.0, "stacked": 0.0}
    elif name in chains.SUMS:
        assert max(measured.values()) < ROUNDING
    elif name in chains.WHOLE:
        assert measured["renamed"] == 0.0


@pytest.mark.parametrize("name", SOME)
def test_an_update_is_as_exact_as_its_row_says(name):
    check(name)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", sorted(chains.factories()))
def test_every_update_is_as_exact_as_its_row_says(name):
    check(name)


def test_the_page_names_every_transformation_that_depends_on_the_stage():
    for group in (chains.SUMS, chains.WHOLE, chains.DRAWS):
        assert all(f"`{name}`" in PAGE for name in group)
        assert group <= chains.factories().keys()
