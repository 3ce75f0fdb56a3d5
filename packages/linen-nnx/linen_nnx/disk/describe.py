"""The sort of a tree, told by its names alone: for `inspect`, which has no rule book to ask.

    Dense_0/kernel               bare parameters of Linen, which numbers its submodules so
    layers/0/kernel              a pure dict of nnx, whose lists have numbers for keys
    fc/kernel                    either of the two
    0/count, 0/mu/fc/kernel      the state of an optimizer

Where that is not enough, `state.read_state` says what a tree with `params` or boxes is.
"""

import re
from collections.abc import Sequence

from linen_nnx.disk.leaves import DICT, Leaf
from linen_nnx.disk.state import OPTIMIZER

# `nn.Dense` without a name becomes `Dense_0`. Attributes of nnx begin with a small letter.
_LINEN_NAME = re.compile(r"[A-Z]\w*_\d+")
# Not `v`, as many a model's attention calls its values so.
_OPTAX_FIELDS = {
    "acc_grads", "count", "gradient_step", "hyperparams", "inner_opt_state", "inner_state",
    "inner_states", "mini_step", "mu", "nu", "trace", "v_col", "v_row",
}  # fmt: skip
_DEPTH = 4  # fields of an optimizer's state lie below a chain in a chain, at most


def describe(leaves: Sequence[Leaf]) -> str | None:
    """The sort of a tree that is no whole state; None where its names say more, or nothing.

    Example:
      >>> from linen_nnx.disk.leaves import Key
      >>> describe([Leaf((Key("Dense_0", DICT), Key("kernel", DICT)), "jax.Array")])
      'bare parameters of Linen'
    """
    names: set[str] = set()
    for leaf in leaves:
        names.update([key.name for key in leaf.keys])
    # A whole state: `state.read_state` knows more of it.
    if "params" in names:
        return None
    if is_optimizer(leaves):
        owner = "nnx.Optimizer" if OPTIMIZER in names else "an optimizer"
        return f"the state of {owner} alone, without a model"
    # Boxes of `nn.with_partitioning` end in `value`, and so do the Variables of an nnx.State.
    ends = {leaf.keys[-1] for leaf in leaves}
    if ("value", DICT) in ends or OPTIMIZER in names:
        return None
    linen = any(_LINEN_NAME.fullmatch(name) for name in names)
    nnx = any(map(str.isdigit, names))
    # Signs of both, or of neither, prove nothing.
    if linen != nnx:
        return "bare parameters of Linen" if linen else "nnx.State as a pure dict of the model"
    return "bare parameters of Linen, or a pure dict of nnx: their names do not tell"


def is_optimizer(leaves: Sequence[Leaf]) -> bool:
    """Whether all leaves lie in an optimizer's state.

    Example:
      >>> from linen_nnx.disk.leaves import SEQUENCE, Key
      >>> count = (Key("0", SEQUENCE), Key("count", DICT))
      >>> is_optimizer([Leaf(count, "jax.Array")])
      True
    """
    paths = [leaf.path.split("/") for leaf in leaves]
    heads = {path[0] for path in paths}
    # `nnx.Optimizer` counts its updates in `step`, beside the state of optax.
    if OPTIMIZER in heads:
        return heads <= {OPTIMIZER, "step"}
    # One transformation by itself, or a chain of several, whose states are numbered.
    if not all(map(str.isdigit, heads)):
        return bool(heads & _OPTAX_FIELDS)
    return any(_OPTAX_FIELDS.intersection(path[:_DEPTH]) for path in paths)
