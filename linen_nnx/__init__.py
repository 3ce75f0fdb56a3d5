"""Translates parameters and checkpoints between Flax Linen and Flax NNX, bit for bit."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from linen_nnx.grammar import Rule
from linen_nnx.plan import Plan, RuleError, Step
from linen_nnx.rules import RuleBook, Unassigned

if TYPE_CHECKING:
    from linen_nnx.suggest import suggest
    from linen_nnx.twin import Twin, TwinError

__all__ = [
    "Plan", "Rule", "RuleBook", "RuleError", "Step", "Twin", "TwinError", "Unassigned", "suggest",
]  # fmt: skip

_NEED_JAX = {"Twin": "twin", "TwinError": "twin", "suggest": "suggest"}


class _Package(ModuleType):
    """Imports what needs jax on first use; `linen_nnx.suggest` is the function, not its file."""

    def __getattribute__(self, name: str) -> Any:
        if name in _NEED_JAX:
            return getattr(import_module(f"linen_nnx.{_NEED_JAX[name]}"), name)
        return super().__getattribute__(name)


sys.modules[__name__].__class__ = _Package
