"""Leaves that only one model has: what fills them when a checkpoint comes from the other.

    pe            (16, 8)   a table that Linen computes: the numbers of the constructor
    attn/k/bias   (8,)      a bias that Linen's attention lacks: zeros
    up/lora_a     (8, 2)    an adapter's: as the constructor draws it

Each gets an `init` rule with the values that the model's own constructor gives it. At these values
both models compute the same: that has been run.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from linen_nnx.book.grammar import Rule
from linen_nnx.book.ops import Init
from linen_nnx.book.packing import packed
from linen_nnx.infer.found import FoundRule, SidedPath, rule_of
from linen_nnx.infer.proposals import OpenLeaves
from linen_nnx.infer.trace import Trace
from linen_nnx.infer.trial import Trial

Array = np.ndarray
_LARGEST = 1 << 20  # bytes: a larger leaf that is drawn at random is drawn anew
_KEPT = "only nnx has it; both compute the same where it keeps its constructor's value"
_UNUSED = "only nnx has it, and the forward pass does not use it"


def additions(
    trial: Trial,
    found: Sequence[FoundRule],
    open_: OpenLeaves,
    lossy: Sequence[dict[str, str]],
) -> list[Rule]:
    """Rules for the leaves that only one side has.

    Args:
      trial: tries rules out, on common ground.
      found: the rules that were found.
      open_: the Linen and nnx leaves that are used and have no rule.
      lossy: for Linen and nnx the leaves that no rule can translate, with the reason.
    """
    linen, nnx = trial.ground.sides
    rules: list[Rule] = []
    for path in linen.held:
        if linen.trace.leaves[path].collection != "params" and path not in lossy[0]:
            rules.append(addition(linen.trace, path, "only Linen has it"))
    # Where leaves of Linen are held, too, those of nnx of that shape are no additions: they hold
    # the same in another form.
    forms: set[tuple[int, ...]] = set()
    for path in linen.held:
        if linen.trace.leaves[path].collection == "params" and path not in lossy[0]:
            forms.add(linen.trace.leaves[path].shape)
    filled: list[str] = []
    for path in nnx.held:
        if path not in lossy[1] and nnx.trace.leaves[path].shape not in forms:
            filled.append(path)
    # Once every Linen leaf has a rule, what nnx has over can only be its own.
    if not open_[0] and open_[1]:
        values = {path: nnx.trace.constructed(path) for path in open_[1]}
        if trial.point(found, fixed=values).gap <= trial.tolerance:
            filled += sorted(open_[1], key=nnx.paths.index)
    rules += [addition(nnx.trace, path, _KEPT) for path in filled]
    # An unused leaf of nnx may be an unused one of Linen, if that has its size: a person must say.
    sizes = {math.prod(linen.trace.leaves[path].shape) for path in _idle(trial, found, 0)}
    for path in _idle(trial, found, 1):
        if math.prod(nnx.trace.leaves[path].shape) not in sizes:
            rules.append(addition(nnx.trace, path, _UNUSED))
    return rules


def _idle(trial: Trial, found: Sequence[FoundRule], number: int) -> list[str]:
    """The leaves of a side that are not used and have no rule."""
    side = trial.ground.sides[number]
    done: set[SidedPath] = set()
    for rule in found:
        done.update(rule.leaves)
    return [path for path in side.paths if not side.slots_of[path] and (number, path) not in done]


def addition(trace: Trace, path: str, why: str) -> Rule:
    """The rule that fills a leaf as its model's constructor does; `why` says that it has to.

    Example:
        >>> from linen_nnx.infer.example import two_layers
        >>> from linen_nnx.infer.trace import trace_nnx
        >>> addition(trace_nnx(two_layers()), "first/bias", "only nnx has it").note
        'only nnx has it; filled with zeros, as its constructor does'
    """
    leaf = trace.leaves[path]
    values = trace.constructed(path)
    known = _flat(values)
    form: dict[str, Any] = {"shape": tuple(leaf.shape), "dtype": str(np.dtype(leaf.dtype))}
    if leaf.collection != "params" and trace.side == "nnx":
        form["collection"] = leaf.collection  # a Linen path says it itself
    if known is not None:
        op = Init(known, **form)
        what = f"filled with {known}, as its constructor does"
    # A table goes into the book whatever its size: drawing it anew would change the model.
    elif values.nbytes <= _LARGEST or not trace.varies(path):
        data = values.astype(values.dtype.newbyteorder("<")).tobytes()
        op = Init("constructor", data=packed(data), **form)
        what = "filled with the numbers of its constructor"
    else:
        op = Init("normal", stddev=float(values.std()), **form)
        what = "its constructor draws it at random: drawn anew, with the same spread"
    linen, nnx = ([path], []) if trace.side == "linen" else ([], [path])
    return replace(rule_of(linen, nnx, (op,)), note=f"{why}; {what}")


def _flat(values: Array) -> Literal["zeros", "ones"] | None:
    """The name of a filling that has one number."""
    if (values == 0).all():
        return "zeros"
    return "ones" if (values == 1).all() else None
