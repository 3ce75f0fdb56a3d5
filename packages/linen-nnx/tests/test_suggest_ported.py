"""`suggest` on models written in two ways: each book is complete, right, and says why."""

import functools

import numpy as np
import pytest
from flax import nnx
from ported import PORTED

from linen_nnx import RuleBook, suggest
from linen_nnx.book.ops import Copy
from linen_nnx.infer.trace import trace_linen


@functools.cache
def pair(name):
    return PORTED[name]()


@functools.cache
def book_of(name):
    return suggest(pair(name).twin)


def numbers(name):
    """Linen leaves in which every element has a number of its own; equal ones where nnx has one."""
    leaves, start = {}, 0
    for path, leaf in trace_linen(pair(name).twin).leaves.items():
        size = int(np.prod(leaf.shape))
        leaves[path] = np.arange(start, start + size).reshape(leaf.shape)
        start += size
    for rule in pair(name).truth.rules:
        if len(rule.linen) > 1 and any(isinstance(op, Copy) for op in rule.ops):
            first, *others = (pattern.text for pattern in rule.linen)
            leaves |= dict.fromkeys(others, leaves[first])
    return leaves


def filled(book):
    return {pattern.text for rule in book.rules if rule.init for pattern in rule.nnx}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", PORTED)
def test_a_model_written_in_another_way_gets_a_complete_and_right_book(name):
    book, truth = book_of(name), pair(name).truth

    due, got = (each.to_nnx(numbers(name), partial=True) for each in (truth, book))

    assert not book.unassigned
    new = filled(book)
    assert got.keys() - new == due.keys()
    assert not [path for path in due if not np.array_equal(got[path], due[path])]
    alone = {rule.nnx[0].text for rule in truth.rules if not rule.linen}
    assert new == alone


@pytest.mark.parametrize("name", ["adapters", "diffusion_unet", "key_biases_and_a_mask"])
def test_what_only_nnx_has_gets_the_values_of_its_constructor(name):
    leaves = book_of(name).to_nnx(numbers(name))
    model = pair(name).twin.nnx(nnx.Rngs(0))
    state = nnx.to_flat_state(nnx.state(model, nnx.Variable))
    constructed = {"/".join(map(str, path)): leaf.get_value() for path, leaf in state}

    for path in filled(book_of(name)):
        assert leaves[path].dtype == constructed[path].dtype
        np.testing.assert_array_equal(leaves[path], constructed[path])


def test_a_book_with_copies_and_tables_survives_being_written_and_read(tmp_path):
    for name in ("tied_head_that_the_port_unties", "key_biases_and_a_mask", "adapters"):
        book_of(name).save(tmp_path / f"{name}.yaml")

        assert RuleBook.load(tmp_path / f"{name}.yaml") == book_of(name)


def test_notes_say_which_mode_was_chosen_and_which_outputs_correspond():
    notes = book_of("evaluation_and_a_model_output").notes

    assert "Linen is called with `train=False`, which the twin leaves open" in notes
    assert any("model.eval()" in note for note in notes)
    assert any("the output = `logits`" in note for note in notes)
    assert any("`hidden`" in note for note in notes)


def test_a_rule_by_gradients_says_where_the_two_models_differ():
    notes = {str(rule): rule.note for rule in book_of("temperature_before_a_product").rules}

    note = notes["`params/t2` <-> `scales/1`"]
    assert "gradients equal element by element" in note
    assert "Linen applies `params/c/bias` + `params/c/kernel` before" in note
    assert "outputs agree with numbers that differ from leaf to leaf" in note
