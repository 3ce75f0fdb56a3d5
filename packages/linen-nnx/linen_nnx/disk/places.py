"""Where a leaf of a whole training state goes, said before it is known how that is laid out.

No files here: what moves to a place may be a leaf of a checkpoint or an array in memory.
"""

from typing import NamedTuple

from linen_nnx.disk.leaves import Keys
from linen_nnx.disk.state import OPTIMIZER, Id, names_of


class Place(NamedTuple):
    """Where a target leaf goes: to `id` in the model, or to the neutral `path` in the rest.

    The path of Adam's first moment of a kernel, `opt_state/0/mu/d/kernel`, begins with structure of
    the rest's own (`opt_state/0/mu`), and then mirrors the model (`d/kernel`). SM3 keeps a list for
    each parameter: in `opt_state/0/mu/d/kernel/1` the `1` is a tail behind the mirrored part.
    """

    id: Id | None = None
    path: str = ""
    prefix: Keys = ()
    """The keys of the rest's own structure, of the types that the source gives them."""
    branch: bool = False
    """Whether it is an empty node in place of a branch of the model."""
    tail: Keys = ()
    """The keys behind the mirrored part."""

    def __str__(self) -> str:
        return self.path if self.id is None else self.id.path

    @property
    def in_optimizer(self) -> bool:
        return self.id is None and self.path.split("/")[0] == OPTIMIZER

    @property
    def mirrored(self) -> tuple[str, ...]:
        """The elements of the path that mirror the model."""
        names = names_of(self.path)
        return tuple(names[len(self.prefix) : len(names) - len(self.tail)])
