"""Translates parameters and checkpoints between Flax Linen and Flax NNX, bit for bit.

    errors   what is refused
    book     rule books: their grammar, and what they make of shapes and arrays
    disk     checkpoints: every layout read, converted, written
    infer    twins: two models traced, and a rule book proposed
    ladder   one model at four stages, behind Linen's `init` and `apply`
    proof    conversions verified, and the first layer at which two models part

Each imports only what stands above it. `cli` is the command line over all of them.

Example:
  >>> import numpy as np
  >>> from linen_nnx import RuleBook
  >>> book = RuleBook.from_dict({"version": 1, "rules": [
  ...     {"linen": "params/Dense_{i}/{leaf}", "nnx": "layers/{i}/{leaf}"}]})
  >>> list(book.to_nnx({"params/Dense_0/kernel": np.ones((2, 3))}))
  ['layers/0/kernel']
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linen_nnx.book.plan import RuleError
    from linen_nnx.book.rules import RuleBook
    from linen_nnx.disk.convert import convert
    from linen_nnx.disk.runs import Runs
    from linen_nnx.errors import Refusal
    from linen_nnx.infer.keys import DrawError
    from linen_nnx.infer.twin import Twin, TwinError
    from linen_nnx.ladder.forms import VariablesError
    from linen_nnx.ladder.ladder import Ladder, Part
    from linen_nnx.ladder.stage import Stage
    from linen_nnx.ladder.suggest import suggest
    from linen_nnx.ladder.view import View
    from linen_nnx.proof.bisect import bisect
    from linen_nnx.proof.verify import verify

__all__ = [
    "DrawError", "Ladder", "Part", "Refusal", "RuleBook", "RuleError", "Runs", "Stage", "Twin",
    "TwinError", "VariablesError", "View", "bisect", "convert", "suggest", "verify",
]  # fmt: skip

_HOMES = {
    "DrawError": "infer.keys",
    "Ladder": "ladder.ladder",
    "Part": "ladder.ladder",
    "Refusal": "errors",
    "RuleBook": "book.rules",
    "RuleError": "book.plan",
    "Runs": "disk.runs",
    "Stage": "ladder.stage",
    "Twin": "infer.twin",
    "TwinError": "infer.twin",
    "VariablesError": "ladder.forms",
    "View": "ladder.view",
    "bisect": "proof.bisect",
    "convert": "disk.convert",
    "suggest": "ladder.suggest",
    "verify": "proof.verify",
}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is used: `convert.py --help` needs none, few need jax."""
    if name == "__version__":
        # What pip has installed: `pyproject.toml` is the one place where the version stands.
        from importlib.metadata import version

        return version("linen-nnx")
    if name in _HOMES:
        return getattr(import_module(f"linen_nnx.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
