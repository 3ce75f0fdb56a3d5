"""Puts parts that were saved one by one together as the one state that they are.

People save `model-100` and `optimizer-100` beside each other. In Linen that makes a TrainState:

    model:      params/fc/kernel              params/fc/kernel
    optimizer:  0/mu/fc/kernel         ->     opt_state/0/mu/fc/kernel

where the model may also be bare parameters (`fc/kernel`). The states of nnx stay below the names of
their parts, as `{"model": nnx.State, "optimizer": nnx.State}`, which is the usual layout there.
"""

import itertools
from collections.abc import Mapping, Sequence

from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.describe import is_optimizer
from linen_nnx.disk.leaves import DICT, Leaf, dict_keys, repeated
from linen_nnx.disk.state import OPTIMIZER
from linen_nnx.errors import quoted


def join(saved: Mapping[str, Sequence[Leaf]]) -> list[Leaf]:
    """The leaves of everything that was saved, under the keys that they have in the whole.

    Args:
      saved: the leaves of each checkpoint, by the name that its steps have.

    Raises:
      StoreError: if two checkpoints have a leaf of one path.

    Example:
      >>> from linen_nnx.disk.leaves import Key
      >>> kernel = Leaf((Key("fc", DICT), Key("kernel", DICT)), "jax.Array")
      >>> mu = kernel.at((Key("0", DICT), Key("mu", DICT), *kernel.keys))
      >>> count = kernel.at((Key("0", DICT), Key("count", DICT)))
      >>> [leaf.path for leaf in join({"model": [kernel], "optimizer": [mu, count]})]
      ['params/fc/kernel', 'opt_state/0/mu/fc/kernel', 'opt_state/0/count']
    """
    is_nnx = any(map(_has_box, itertools.chain.from_iterable(saved.values())))
    joined = []
    for name, leaves in saved.items():
        above = dict_keys(*[name] if is_nnx else _above(name, leaves, saved))
        joined += [leaf.at((*above, *leaf.keys)) for leaf in leaves]
    if twice := repeated([leaf.path for leaf in joined]):
        shown = quoted([path for path, _ in twice[:10]])
        raise StoreError(f"the parts {', '.join(saved)} both have {shown}: take one of them alone")
    return joined


def _has_box(leaf: Leaf) -> bool:
    """Whether a leaf is a variable of nnx, which `nnx.State` saves below a key `value`."""
    return leaf.keys[-1] == ("value", DICT)


def _above(name: str, leaves: Sequence[Leaf], saved: Mapping[str, Sequence[Leaf]]) -> list[str]:
    """The keys that come above the leaves of one checkpoint of a Linen state."""
    heads = {leaf.keys[0].name for leaf in leaves}
    if OPTIMIZER in heads or "params" in heads:
        return []  # it says itself what is what
    if is_optimizer(leaves):
        return [OPTIMIZER]
    # The one that is no optimizer's can only be the parameters, whatever it is called. Of two such
    # each is a collection by its own name: `params` beside `batch_stats`.
    others = [leaves for leaves in saved.values() if not is_optimizer(leaves)]
    if len(others) == 1 and name not in ("batch_stats", "step"):
        return ["params"]
    return [name]
