"""The names of leaves, and a view of the parameters for all that reduces over leaves.

A sum over leaves taken in the tree's own order rounds differently wherever names sort differently;
a mask by rank changes where layers are stacked. So both work on the leaves in nnx form, whatever
the stage, and sums are sorted before they are added. Then the order of names has no effect.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from linen_nnx import RuleBook
from linen_nnx.book.plan import Step
from linen_nnx.book.tree import flatten
from model.stages import HALVES, STAGES, Leaves, Stage


def path_name(path: Any) -> str:
    """A key path of jax's, whatever the containers: `a/0/b`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by `path_name`."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


class View:
    """The parameters of one stage, seen as the leaves of the all-nnx model."""

    def __init__(self, stage: Stage, rules: RuleBook | None) -> None:
        """`rules` may be None when the stage is all nnx, where there is nothing to translate."""
        self._steps: dict[str, list[Step]] = {}
        # "half/path" of each parameter -> (path, rank) of the nnx leaves that it holds.
        self._forms: dict[str, list[tuple[str, int]]] = {}
        for half in HALVES:
            specs = {p: s for p, s in stage.abstract.items() if p.split("/")[1] == half}
            if getattr(STAGES[stage.name], half) == "nnx":
                for path, spec in specs.items():
                    collection, _, name = path.partition("/")
                    if collection == "params":
                        self._forms[name] = [(name, len(spec.shape))]
                continue
            if rules is None:
                raise ValueError(f"Stage {stage.name!r} has a Linen {half}: it needs a rule book.")
            plan = rules.within(half).plan(specs, to="nnx")
            self._steps[half] = [s for s in plan.steps if s.sources[0].startswith("params/")]
            for step in self._steps[half]:
                ranks = [len(spec.shape) for spec in step.specs]
                forms = list(zip(step.targets, ranks, strict=True))
                self._forms |= {path.removeprefix("params/"): forms for path in step.sources}

    def leaves(self, params: Mapping[str, Any], halves: Collection[str] = HALVES) -> Leaves:
        """`{nnx path: array}` of a params-shaped tree of arrays or tracers, for some halves."""
        result: Leaves = {}
        for half in halves:
            own = flatten({"params": {half: params[half]}})
            if half in self._steps:
                for step in self._steps[half]:
                    arrays = step.run([own[path] for path in step.sources])
                    result |= zip(step.targets, arrays, strict=True)
            else:
                result |= {path.split("/", 1)[1]: leaf for path, leaf in own.items()}
        return result

    def norm(self, params: Mapping[str, Any], halves: Collection[str] = HALVES) -> Array:
        """The Euclidean norm over all leaves of the halves: float32 scalar, alike at each stage."""
        squares = [
            jnp.sum(jnp.square(leaf.astype(jnp.float32)))
            for leaf in self.leaves(params, halves).values()
        ]
        return jnp.sqrt(jnp.sum(jnp.sort(jnp.stack(squares))))

    def ranks(self) -> dict[str, int]:
        """`{"half/path" at this stage: rank}` of the parameters in nnx form."""
        return {path: max(rank for _, rank in forms) for path, forms in self._forms.items()}

    def mask(self, test: Callable[[str, int], bool]) -> dict[str, bool]:
        """`{"half/path" at this stage: bool}`: whether `test(nnx path, rank)` holds for the leaf.

        Where a leaf stacks several nnx leaves, it holds if it does for all of them.
        """
        return {path: all(test(*form) for form in forms) for path, forms in self._forms.items()}
