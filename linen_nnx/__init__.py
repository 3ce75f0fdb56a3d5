"""Translates parameters and checkpoints between Flax Linen and Flax NNX, bit for bit."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linen_nnx.convert import convert
    from linen_nnx.grammar import Rule
    from linen_nnx.plan import Plan, RuleError, Step
    from linen_nnx.rules import RuleBook
    from linen_nnx.verify import verify

__all__ = ["Plan", "Rule", "RuleBook", "RuleError", "Step", "convert", "verify"]

_HOMES = {"Plan": "plan", "RuleError": "plan", "Step": "plan", "Rule": "grammar"}
_HOMES |= {"RuleBook": "rules", "convert": "convert", "verify": "verify"}


def __getattr__(name: str) -> Any:
    """Imports each name when it is first used: `convert.py --help` needs none of them."""
    if name not in _HOMES:
        raise AttributeError(f"module `linen_nnx` has no attribute `{name}`")
    return getattr(import_module(f"linen_nnx.{_HOMES[name]}"), name)
