"""Puts parts that were saved one by one together as the one state that they are.

People save `model-100` and `optimizer-100` beside each other. In Linen that makes a TrainState:

    model:      params/fc/kernel              params/fc/kernel
    optimizer:  0/mu/fc/kernel         ->     opt_state/0/mu/fc/kernel

where the model may also be bare parameters (`fc/kernel`). The states of nnx stay below the names of
their parts, as `{"model": nnx.State, "optimizer": nnx.State}`, which is the usual layout there.
"""

from collections.abc import Mapping, Sequence

from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.describe import is_optimizer
from linen_nnx.disk.leaves import DICT, Leaf, make_key, repeated
from linen_nnx.disk.state import OPTIMIZER


def join(parts: Mapping[str, Sequence[Leaf]]) -> list[Leaf]:
    """The leaves of all parts, under the keys that they have in the whole.

    Raises `StoreError` if two parts have a leaf of one path.
    """
    boxed = any(leaf.keys[-1] == ("value", DICT) for leaves in parts.values() for leaf in leaves)
    joined = []
    for name, leaves in parts.items():
        above = [name] if boxed else _above(name, leaves, parts)
        keys = tuple([make_key(key, DICT) for key in above])
        joined += [leaf.at((*keys, *leaf.keys)) for leaf in leaves]
    if twice := repeated([leaf.path for leaf in joined]):
        shown = ", ".join(f"`{path}`" for path, _ in twice[:10])
        raise StoreError(f"the parts {', '.join(parts)} both have {shown}: take one of them alone")
    return joined


def _above(name: str, leaves: Sequence[Leaf], parts: Mapping[str, Sequence[Leaf]]) -> list[str]:
    """The keys above a part of a Linen state."""
    if OPTIMIZER in _heads(leaves) or "params" in _heads(leaves):
        return []
    if is_optimizer(leaves):
        return [OPTIMIZER]
    bare = [one for one, other in parts.items() if not is_optimizer(other)]
    if bare == [name] and name not in ("batch_stats", "step"):
        return ["params"]
    return [name]


def _heads(leaves: Sequence[Leaf]) -> set[str]:
    return {leaf.keys[0].name for leaf in leaves}
