"""Equations are read alike on every version of jax, and what is not known is a message."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from linen_nnx import TwinError
from linen_nnx.infer import jaxprs
from linen_nnx.infer.float64 import widen


def equations(function, *args):
    return {eqn.primitive.name: eqn for eqn in jax.make_jaxpr(function)(*args).eqns}


def written(name, **params):
    """An equation as another version of jax might write it."""
    return SimpleNamespace(primitive=SimpleNamespace(name=name), params=params)


def scanned(x, w, rows):
    return jax.lax.scan(lambda c, row: (c @ w + row, c.sum()), x, rows, reverse=True)


def test_the_operands_of_a_scan_are_told_apart():
    eqn = equations(scanned, jnp.ones((2, 2)), jnp.ones((2, 2)), jnp.ones((3, 2, 2)))["scan"]

    scan = jaxprs.scan_parts(eqn)

    assert scan.operands(["w", "x", "rows"]) == (["w"], ["x"], ["rows"])
    assert list(scan.steps()) == [2, 1, 0]


def test_a_scan_is_read_as_either_version_writes_it():
    tree = SimpleNamespace(unpack=lambda: ((None,), (None, None), (None,)))
    common = {"jaxpr": "body", "length": 3, "reverse": False}

    old = jaxprs.scan_parts(written("scan", num_consts=1, num_carry=2, **common))
    new = jaxprs.scan_parts(written("scan", ft_in=tree, **common))

    assert old == new == jaxprs.Scan("body", 3, False, 1, 2)


@pytest.mark.parametrize(
    ("read", "eqn", "missing"),
    [
        (jaxprs.scan_parts, written("scan", jaxpr="body", length=3, reverse=False), "num_consts"),
        (jaxprs.while_parts, written("while", cond_jaxpr="test"), "cond_nconsts"),
        (jaxprs.branches, written("cond", ways=()), "branches"),
        (jaxprs.called, written("jit", program="f"), "jaxpr"),
    ],
    ids=["scan", "while", "cond", "jit"],
)
def test_a_parameter_that_is_not_there_is_a_message_with_the_version(read, eqn, missing):
    with pytest.raises(TwinError, match=f"jax {jax.__version__} writes .* `{missing}`"):
        read(eqn)


def test_a_reduction_by_a_program_of_its_own_is_no_call():
    def largest(x):
        return jax.lax.reduce(x, np.float32(0), lambda a, b: jnp.maximum(a, b) + 0 * a * b, (0,))

    assert jaxprs.called(equations(largest, jnp.ones(3))["reduce"]) is None


def test_loops_and_scans_are_the_same_function_in_float64():
    def forward(x, w, rows):
        y, sums = scanned(x, w, rows)
        return jax.lax.while_loop(lambda c: (c * w).sum() < 99, lambda c: c + w, y), sums

    random = np.random.default_rng(0)
    args = [random.normal(size=shape) for shape in ((2, 2), (2, 2), (3, 2, 2))]
    narrow = jax.make_jaxpr(forward)(*(np.float32(arg) for arg in args))
    with jax.enable_x64(True):
        got = jax.core.eval_jaxpr(widen(narrow).jaxpr, [], *args)
        due = jax.tree.leaves(forward(*map(jnp.asarray, args)))
    for one, two in zip(got, due, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12)
