"""Translates parameters and checkpoints between Flax Linen and Flax NNX, bit for bit."""

from linen_nnx.grammar import Rule
from linen_nnx.plan import Plan, RuleError, Step
from linen_nnx.rules import RuleBook

__all__ = ["Plan", "Rule", "RuleBook", "RuleError", "Step"]
