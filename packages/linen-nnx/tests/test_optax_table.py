"""What docs/optax.md says of each optimizer is so: its state goes to nnx, and trains on there."""

import re

import pytest

from benchmarks.optimizers import NOT_TRIED, PAGE, factories, outcomes, table

ROWS = re.findall(r"^\| (`.*`) \| (.*) \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
SAID = {
    name: tuple(both) for names, *both in ROWS for name in names.replace("`", "").split(", ")
}  # fmt: skip
# One of each kind: of state, of wrapping, and of what comes of it.
FEW = ("sgd", "adam", "chain", "MultiSteps", "masked", "inject_hyperparams",
       "scale_by_factored_rms", "flatten", "zero_nans")  # fmt: skip


def test_the_page_names_every_factory_once() -> None:
    assert sorted([*SAID, *NOT_TRIED]) == sorted(factories())
    for name, why in NOT_TRIED.items():
        assert f"- `{name}`: {why}\n" in PAGE.read_text()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", FEW)
def test_a_state_is_taken_along_as_the_page_says(name: str) -> None:
    assert outcomes(name) == SAID[name]


@pytest.mark.long
def test_every_state_is_taken_along_as_the_page_says() -> None:
    found = {name: outcomes(name) for name in SAID}
    assert table(found) in PAGE.read_text()
