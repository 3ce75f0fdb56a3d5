"""What `suggest` proposes for pairs with misleading names and orders: nothing that is wrong."""

import numpy as np
import pytest
from pairs import PAIRS

from linen_nnx.rules import RuleBook
from linen_nnx.suggest import suggest
from linen_nnx.twin import trace_linen


@pytest.mark.parametrize("name", PAIRS)
def test_every_assigned_rule_is_right(name: str) -> None:
    """Leaves of distinct numbers go to nnx as by the rules that were written by hand."""
    pair = PAIRS[name]()
    leaves = {}
    for number, (path, leaf) in enumerate(trace_linen(pair.twin).leaves.items()):
        values = 1000.0 * number + np.arange(np.prod(leaf.shape, dtype=int))
        leaves[path] = values.reshape(leaf.shape).astype(leaf.dtype)

    book = suggest(pair.twin)

    found = book.to_nnx(leaves, partial=True)
    truth = pair.truth.to_nnx(leaves, partial=True)
    assert found
    for path, values in found.items():
        assert values.tobytes() == truth[path].tobytes(), path
    still_open = {path for path in truth if path not in found}
    assert len(still_open) <= 0.02 * len(truth) or pair.open, sorted(still_open)


def test_a_book_with_open_leaves_survives_saving(tmp_path) -> None:
    pair = next(pair for pair in (make() for make in PAIRS.values()) if pair.open)
    book = suggest(pair.twin)
    assert book.unassigned

    book.save(tmp_path / "rules.yaml")

    assert RuleBook.load(tmp_path / "rules.yaml") == book
