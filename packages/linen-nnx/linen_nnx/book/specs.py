"""The specs of leaves, known before any array is read: shapes and dtypes, and grids of them.

Nothing here imports jax or numpy: a dtype may be of either, or a name.
"""

import math
from typing import Any, Literal, NamedTuple

from linen_nnx.errors import Refusal

Side = Literal["linen", "nnx"]

PART = "part"
"""The coordinate of the parts of a concat. An integer capture is one letter, and never this."""


class Mismatch(Refusal):
    """Arrays that an op cannot take; the planner adds the rule and the paths."""


class Spec(NamedTuple):
    """Shape and dtype of one leaf.

    Example:
      >>> import numpy as np
      >>> kernel = Spec.of(np.zeros((4, 8), np.float32))
      >>> print(kernel, kernel.size)
      float32[4,8] 32
      >>> kernel.same(Spec((4, 8), "float32"))
      True
    """

    shape: tuple[int, ...]
    dtype: Any

    @classmethod
    def of(cls, leaf: Any) -> "Spec":
        """The spec of anything that has `.shape` and `.dtype`."""
        return cls(tuple(leaf.shape), leaf.dtype)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    def same(self, other: "Spec") -> bool:
        """Whether shape and dtype agree, whichever library the dtypes come from."""
        # As text: a dtype may be one of numpy or jax, or a name that neither knows (`key<fry>`).
        return self.shape == other.shape and str(self.dtype) == str(other.dtype)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class SpecGrid(NamedTuple):
    """The specs of the arrays that one rule is about, at one point between its ops.

    They lie in a grid whose coordinates have names: the part of a concat, a layer. `specs` lists
    the grid in row-major order, the last coordinate fastest:

        SpecGrid({"part": 2, "i": 3}, ...)     specs: part 0 of layers 0, 1, 2; then part 1 of them
    """

    coords: dict[str, int]
    """The size of the grid along each coordinate."""
    specs: tuple[Spec, ...]
