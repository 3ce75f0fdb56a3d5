"""The parameters of a stage free of the names that it gives them, part by part."""

from collections.abc import Collection, Mapping
from typing import Any

from jax import Array
from linen_nnx import Stage
from linen_nnx.book.tree import flatten
from linen_nnx.ladder import view

WHOLE = "model"
"""The name of the part where there is only one."""


class View(view.View):
    """The library's view, which also knows the parts that have parameters.

    Attributes:
        parts: their names, in the order of the model.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        # A model of one part has no name for it, and its paths begin with that of a module.
        self._is_whole = "" in stage.forms
        params = flatten(stage.abstract().get("params", {}))
        found = {self.part_of(path) for path in params}
        self.parts = [part for part in (*stage.forms, WHOLE) if part in found]

    def part_of(self, path: str) -> str:
        """The part that a parameter belongs to, by its path."""
        return WHOLE if self._is_whole else path.split("/")[0]

    def norm(self, params: Mapping[str, Any], parts: Collection[str] | None = None) -> Array:
        """The Euclidean norm over the leaves of some parts: float32 scalar, alike at each stage."""
        return super().norm(params, None if self._is_whole else parts)
