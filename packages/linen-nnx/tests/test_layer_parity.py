"""`make parity`: the table of layer twins holds on the installed versions, and is judged in both
directions. The fast rows are measured here, all of them by the command."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from benchmarks import gaps, pairs, parity, private
from benchmarks.compare import DTYPES, Pair, compare

ROWS = {pair.name: pair for pair in pairs.PAIRS}
FAST = (
    "Dense / Linear",
    "Einsum",
    "Embed, attend",
    "PReLU",
    "Dropout, same key",
    "SimpleCell",
    "GRUCell, hn/bias not 0",
    "remat",
    "RMSNorm, defaults",
    "RMSNorm, keep_dtype",
    "BatchNorm (eval), defaults",
    "BatchNorm (eval), keep_dtype",
)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("name", FAST)
def test_a_pair_is_as_the_table_says(name: str) -> None:
    row = parity.measure(ROWS[name])

    assert row.unexpected == []
    assert len(row.cells) == 8


@pytest.mark.sampled(4)
@pytest.mark.parametrize("gap", [*gaps.GAPS, *private.PRIVATE], ids=lambda gap: gap.name)
def test_a_known_gap_is_still_there(gap: gaps.Gap) -> None:
    result = parity.probe(gap)

    assert result.unexpected == []
    assert result.evidence


def test_every_pair_that_differs_says_why_and_what_makes_it_exact() -> None:
    for pair in pairs.PAIRS:
        told = bool(pair.why), bool(pair.fix)
        assert told == 2 * (bool(pair.differs or pair.varies),), pair.name
        assert {*pair.differs, *pair.varies} <= set(pairs.EVERYWHERE), pair.name
        assert not {*pair.differs} & {*pair.varies}, pair.name


def test_every_row_has_its_own_name() -> None:
    names = [row.name for row in (*pairs.PAIRS, *gaps.GAPS, *private.PRIVATE)]

    assert len(set(names)) == len(names)


def test_a_pair_that_is_no_longer_exact_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    planted = dataclasses.replace(ROWS["RMSNorm, defaults"], differs=())

    assert parity.main([], [planted], []) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "! RMSNorm, defaults is no longer exact in bfloat16 forward: eager " in said
    assert "2 unexpected findings" in said
    assert "float32 forward:" not in said


def test_a_known_difference_that_has_gone_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    planted = dataclasses.replace(
        ROWS["Dense / Linear"], differs=("float32 gradient",), why="a reason", fix="a fix"
    )

    assert parity.main([], [planted], []) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "! Dense / Linear is exact now in float32 gradient" in said
    assert "1 unexpected findings" in said


def test_a_closed_issue_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    gap = next(gap for gap in gaps.GAPS if gap.issue == 5594)

    assert parity.main([], [], [dataclasses.replace(gap, probe=lambda: "")]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "! flax #5594 is closed upstream" in said
    assert gap.then in said


def test_what_an_installed_version_raises_is_reported_and_the_table_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken(dtype: object, rngs: nnx.Rngs) -> nnx.Module:
        raise TypeError("no such argument")

    dense = ROWS["Dense / Linear"]
    rows = [dataclasses.replace(dense, name="broken", nnx=broken), dense]

    assert parity.main([], rows, []) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "broken cannot be compared in float32: TypeError: no such argument" in said
    assert "Dense / Linear = = = = = = = =" in said


def test_a_leaf_that_upstream_adds_is_reported() -> None:
    dense = ROWS["Dense / Linear"]
    row = parity.measure(dataclasses.replace(dense, rules=dense.rules[:1]))

    assert len(row.unexpected) == 2
    assert "params/bias" in row.unexpected[0]
    assert "no rule" in row.unexpected[0]


def test_the_json_file_holds_all_that_was_measured(tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    gap = gaps.GAPS[0]

    assert parity.main(["--json", str(path)], [ROWS["Dense / Linear"]], [gap]) == 0
    content = json.loads(path.read_text())
    assert set(content["versions"]) == {"flax", "jax", "jaxlib"}
    assert [cell["exact"] for cell in content["pairs"][0]["cells"]] == 8 * [True]
    assert content["gaps"][0]["issue"] == gap.issue
    assert content["unexpected"] == []


def test_a_word_that_is_in_no_row_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parity.main(["--only", "Denze"])

    assert stop.value.code == 2
    assert "denze" in capsys.readouterr().err


class Shifted(nnx.Linear):
    """A Linear whose output is off by one unit in the last place."""

    def __call__(self, inputs: jnp.ndarray) -> jnp.ndarray:
        output = super().__call__(inputs)
        constant = jax.lax.stop_gradient(output)
        return output + (jnp.nextafter(constant, jnp.inf) - constant)


def test_one_unit_in_the_last_place_is_a_difference() -> None:
    dense = ROWS["Dense / Linear"]
    shifted = dataclasses.replace(dense, nnx=lambda d, r: Shifted(16, 12, dtype=d, rngs=r))

    cells = [cell for cell in compare(shifted, "float32") if cell.quantity == "forward"]
    assert [cell.exact for cell in cells] == [False, False]
    assert all(0 < cell.largest < 1e-6 and cell.ulps <= 1 for cell in cells)


class LinenRelu(nn.Module):
    @nn.compact
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        return jnp.where(x > 0, x, 0.0)


class NegativeZeros(nnx.Module):
    def __call__(self, x: jnp.ndarray) -> jnp.ndarray:
        return jnp.where(x > 0, x, -0.0)


def test_the_sign_of_a_zero_is_a_difference() -> None:
    pair = Pair("relu", lambda d: LinenRelu(), lambda d, r: NegativeZeros(), (pairs.X,))

    forward, gradient = compare(pair, "float32")[:2]
    assert (forward.exact, forward.largest) == (False, 0.0)
    assert gradient.exact


@pytest.mark.parametrize("dtype", DTYPES)
def test_equality_that_would_prove_nothing_is_refused(dtype: str) -> None:
    dense = ROWS["Dense / Linear"]

    with pytest.raises(ValueError, match=r"without a gradient, so not compared.*kernel"):
        compare(dataclasses.replace(dense, inputs=(np.zeros_like(pairs.X),)), dtype)
    with pytest.raises(ValueError, match=r"not finite.*output 0"):
        compare(dataclasses.replace(dense, inputs=(np.full_like(pairs.X, np.inf),)), dtype)
