"""How slots are paired, on evidence written down by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from linen_nnx.infer.assign import _Candidates, assign
from linen_nnx.infer.dataflow import Flow
from linen_nnx.infer.fingerprints import Prints
from linen_nnx.infer.sides import SlottedSide

FORM = ("params", 2, 2)


def matrix(size, *places):
    """(size, size) bool, with True at some places."""
    result = np.zeros((size, size), bool)
    for row, column in places:
        result[row, column] = True
    return result


def assigned(linen, nnx, flows=(), partial=False, rich=(FORM,), seen=True):
    """What is assigned of slots of one form, each with a fingerprint of one number.

    `flows`: pairs `(a, b)` of Linen slots of which b flows into a; in nnx, nothing flows.
    """
    both = []
    for name, numbers, places in (("linen", linen, flows), ("nnx", nnx, ())):
        flow = Flow([], matrix(len(numbers), *places), {}, np.zeros(0, np.int32))
        both.append(SlottedSide(SimpleNamespace(side=name), flow, [FORM] * len(numbers)))
    gradients = [np.array([[[number], [0.0]] for number in each]) for each in (linen, nnx)]
    left, right = (each.reshape(-1, 2, 1) for each in gradients)
    prints = Prints(left, right, 0.0, np.full(len(linen), seen), set(rich), partial, None)
    return assign(*both, prints)


@pytest.mark.parametrize(
    ("linen", "nnx", "options", "reason"),
    [
        ([1], [], {}, "the other side uses nothing of its collection and size"),
        ([1], [1], {"rich": ()}, "was not compared"),
        ([0], [0], {"partial": True}, "no output depends on it"),
        ([1], [2], {}, "near enough to its own (nearest 5e-01)"),
        ([1], [1, 1], {}, "2 uses of the other side fit it"),
        ([1, 1], [1], {}, "fits others as well"),
        ([1, 2], [1, 2], {"flows": [(1, 0)]}, "the dataflow contradicts every use"),
        ([1, 1], [1, 1], {"seen": False}, "no output sees it"),
        ([1, 1], [1, 1], {"partial": True}, "not told apart"),
    ],
)
def test_an_open_slot_says_what_kept_it_open(linen, nnx, options, reason):
    _, why = assigned(linen, nnx, **options).open[0][0]

    assert reason in why


def test_a_pair_that_takes_the_place_of_another_is_evidence_too():
    # Slot 0 is a wrong pair at first. It goes as (1, 1) comes, which tells slots 2 and 3 apart.
    linen, nnx = matrix(4, (1, 0), (2, 1)), matrix(4, (3, 1))
    fits = matrix(4, (0, 0), (1, 1), (1, 2), (2, 2), (2, 3), (3, 2), (3, 3))

    assert _Candidates((linen, nnx), fits).pairs() == [(1, 1), (2, 3), (3, 2)]


def test_narrowing_goes_on_until_it_changes_nothing():
    for seed in range(200):
        draws = np.random.default_rng(seed)
        above = [np.tril(draws.random((4, 4)) < 0.25, -1) for _ in range(2)]
        fits = (draws.random((4, 4)) < 0.3) | np.eye(4, dtype=bool)
        candidates = _Candidates((above[0], above[1]), fits)

        before = candidates.fits.copy()
        candidates.narrow()

        assert (candidates.fits == before).all()
