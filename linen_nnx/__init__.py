"""Translates parameters and checkpoints between Flax Linen and Flax NNX, bit for bit."""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linen_nnx.bisect import Bisection, Layer, bisect
    from linen_nnx.convert import convert
    from linen_nnx.grammar import Rule
    from linen_nnx.plan import Plan, RuleError, Step
    from linen_nnx.rules import RuleBook, Unassigned
    from linen_nnx.suggest import suggest
    from linen_nnx.twin import Twin, TwinError
    from linen_nnx.verify import verify

__all__ = [
    "Bisection", "Layer", "Plan", "Rule", "RuleBook", "RuleError", "Step", "Twin", "TwinError",
    "Unassigned", "bisect", "convert", "suggest", "verify",
]  # fmt: skip

_HOMES = {"Plan": "plan", "RuleError": "plan", "Step": "plan", "Rule": "grammar"}
_HOMES |= {"RuleBook": "rules", "Unassigned": "rules", "Twin": "twin", "TwinError": "twin"}
_HOMES |= {"convert": "convert", "suggest": "suggest", "verify": "verify"}
_HOMES |= {"Bisection": "bisect", "Layer": "bisect", "bisect": "bisect"}


class _Package(ModuleType):
    """Imports each name when it is used: `convert.py --help` needs none, and only some need jax.

    `linen_nnx.suggest` is the function, also once its file of the same name has been imported.
    """

    def __getattribute__(self, name: str) -> Any:
        if name in _HOMES:
            return getattr(import_module(f"linen_nnx.{_HOMES[name]}"), name)
        return super().__getattribute__(name)


sys.modules[__name__].__class__ = _Package
