"""Leaves that only one model has: what fills them when a checkpoint comes from the other.

    pe            (16, 8)   a table that Linen computes: the numbers of the constructor
    attn/k/bias   (8,)      a bias that Linen's attention lacks: zeros
    up/lora_a     (8, 2)    an adapter's: as the constructor draws it

Each gets an `init` rule with the values that the model's own constructor gives it. At these values
both models compute the same: that has been run.
"""

from typing import Any, Literal

import numpy as np

from linen_nnx.book.grammar import Rule
from linen_nnx.book.ops import Init
from linen_nnx.book.packing import packed
from linen_nnx.book.patterns import Pattern
from linen_nnx.book.specs import Side
from linen_nnx.infer.trace import Trace

Array = np.ndarray
_LARGEST = 1 << 20  # bytes: a larger leaf that is drawn at random is drawn anew


def addition(trace: Trace, path: str, why: str) -> Rule:
    """The rule that fills a leaf as its model's constructor does; `why` says that it has to."""
    leaf = trace.leaves[path]
    values = trace.constructed(path)
    known = _flat(values)
    form: dict[str, Any] = {"shape": tuple(leaf.shape), "dtype": str(np.dtype(leaf.dtype))}
    if leaf.collection != "params" and trace.side == "nnx":
        form["collection"] = leaf.collection  # a Linen path says it itself
    if known is not None:
        op = Init(known, **form)
        what = f"filled with {known}, as its constructor does"
    elif values.nbytes <= _LARGEST or not trace.varies(path):
        data = values.astype(values.dtype.newbyteorder("<")).tobytes()
        op = Init("constructor", data=packed(data), **form)
        what = "filled with the numbers of its constructor"
    else:
        op = Init("normal", stddev=float(values.std()), **form)
        what = "its constructor draws it at random: drawn anew, with the same spread"
    return _one_sided(trace.side, path, op, f"{why}; {what}")


def _one_sided(side: Side, path: str, op: Init, note: str) -> Rule:
    mine, none = (Pattern(path),), ()
    linen, nnx = (mine, none) if side == "linen" else (none, mine)
    return Rule(linen, nnx, (op,), note)


def _flat(values: Array) -> Literal["zeros", "ones"] | None:
    """The name of a filling that has one number."""
    if (values == 0).all():
        return "zeros"
    return "ones" if (values == 1).all() else None
