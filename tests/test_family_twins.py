"""The families of this template, seen by the library: rule books are found, twins are equal."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from conftest import Train
from linen_nnx import RuleBook, Twin, bisect, suggest
from linen_nnx.infer.trace import trace_linen

import model

FAMILIES = {
    "transformer": {"family": "transformer", "vocab": 7, "length": 4, "depth": 2, "width": 8,
                    "heads": 2, "mlp_factor": 2, "dropout": 0.1, "dtype": "float32",
                    "remat": False, "scan": False},
    "convnet": {"family": "convnet", "depth": 2, "width": 4, "channels": 1, "classes": 3,
                "dropout": 0.1, "dtype": "float32", "remat": False},
    "mlp": {"family": "mlp", "features": 3, "hidden": 4, "outputs": 1, "dropout": 0.1,
            "dtype": "float32"},
}  # fmt: skip
INPUTS = {
    "transformer": jnp.zeros((2, 4), jnp.int32),
    "convnet": jnp.zeros((2, 4, 4, 1)),
    "mlp": jnp.zeros((2, 3)),
}


def family(options: dict[str, Any]) -> model.Family:
    return model.create({**FAMILIES[options["family"]], **options})


def twin_of(made: model.Family, inputs: jax.Array) -> Twin:
    """The twin of a family, in evaluation."""
    return made.ladder({"inputs": inputs}, None).twin


def numbered(twin: Twin) -> dict[str, np.ndarray]:
    """Linen leaves in which every element has a number of its own."""
    leaves = trace_linen(twin).leaves
    sizes = np.cumsum([0, *(int(np.prod(leaf.shape)) for leaf in leaves.values())])
    return {
        path: np.arange(start, start + np.prod(leaf.shape, dtype=int)).reshape(leaf.shape)
        for (path, leaf), start in zip(leaves.items(), sizes, strict=False)
    }


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    return left.keys() == right.keys() and all(np.array_equal(left[p], right[p]) for p in left)


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    "options",
    [
        {"family": "transformer"},
        {"family": "transformer", "scan": True, "depth": 3, "remat": True, "dtype": "bfloat16"},
        {"family": "convnet"},
        {"family": "mlp"},
    ],
    ids=["transformer", "transformer_scan", "convnet", "mlp"],
)
def test_the_rule_books_of_this_template_are_found_without_being_read(
    options: dict[str, Any],
) -> None:
    made = family(options)
    twin = twin_of(made, INPUTS[options["family"]])
    written = RuleBook.load(made.rules_path)
    given = numbered(twin)

    found = suggest(twin)

    assert not found.unassigned
    due = written.to_nnx(given)
    assert same(found.to_nnx(given), due)
    assert same(found.to_linen(due), written.to_linen(due))
    assert len(found.rules) <= len(written.rules)  # as short as a person wrote it


@pytest.mark.sampled(1)
@pytest.mark.parametrize("stage", ["linen", "nnx_in_linen", "nnx"])
def test_bisect_takes_a_run_of_this_template_at_any_stage(train: Train, stage: str) -> None:
    run = train("diabetes", f"stage={stage}", "steps=2")
    options = yaml.safe_load((run / "config.yaml").read_text())["model"]
    made = model.create(options)
    inputs = jax.random.normal(jax.random.key(0), (4, options["features"]))

    found = bisect(twin_of(made, inputs), made.rules_path, [run])

    assert {line.verdict for line in found.layers} == {"exact"}
    assert not found.notes and not found.findings


@pytest.mark.long
def test_flags_are_known_also_where_a_transform_calls_the_layers() -> None:
    made = family({"family": "transformer", "dtype": "bfloat16", "remat": True, "scan": True})
    tokens = jnp.array([[1, 2, 3, 4], [6, 5, 0, 1]])

    found = bisect(twin_of(made, tokens), made.rules_path)

    assert {line.verdict for line in found.layers} == {"exact"}
    assert not found.notes and not found.findings
    assert "encoder/ScanBlock/Mlp_0/Dense_0[1]" in {line.linen for line in found.layers}
