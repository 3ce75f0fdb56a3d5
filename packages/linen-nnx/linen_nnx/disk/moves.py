"""What a translation of a whole state is made of: leaves that move to places.

No files here: the leaves of a move may be those of a checkpoint or arrays in memory.
"""

from typing import Generic, NamedTuple, TypeVar

from linen_nnx.book.grammar import Rule
from linen_nnx.book.ops import Action, Spec
from linen_nnx.disk.leaves import Key
from linen_nnx.disk.state import OPTIMIZER, Id, names_of

Source = TypeVar("Source")
Target = TypeVar("Target")


class Place(NamedTuple):
    """Where a target leaf goes: to `id` in the model, or to the neutral `path` in the rest.

    The path of Adam's first moment of a kernel, `opt_state/0/mu/d/kernel`, begins with structure of
    the rest's own (`opt_state/0/mu`), and then mirrors the model (`d/kernel`). SM3 keeps a list for
    each parameter: in `opt_state/0/mu/d/kernel/1` the `1` is a tail behind the mirrored part.
    """

    id: Id | None = None
    path: str = ""
    prefix: tuple[Key, ...] = ()
    """The keys of the rest's own structure, of the types that the source gives them."""
    branch: bool = False
    """Whether it is an empty node in place of a branch of the model."""
    tail: tuple[Key, ...] = ()
    """The keys behind the mirrored part."""

    @property
    def in_optimizer(self) -> bool:
        return self.id is None and self.path.split("/")[0] == OPTIMIZER

    @property
    def mirrored(self) -> tuple[str, ...]:
        """The elements of the path that mirror the model."""
        names = names_of(self.path)
        return tuple(names[len(self.prefix) : len(names) - len(self.tail)])


class Move(NamedTuple, Generic[Source, Target]):
    """What becomes of some leaves: `sources`, through `actions`, go to `targets`.

    No target: dropped. No source: filled. No action: only names change.
    """

    sources: tuple[Source, ...]
    targets: tuple[Target, ...]
    actions: tuple[Action, ...] = ()
    specs: tuple[Spec, ...] = ()
    """Shape and dtype of each target after the last action, where there are actions."""
    rule: Rule | None = None
    """The rule that says so; None where no rule was needed, as for a step count."""


Step = Move[Id, Id]
"""A step of a rule book's plan: from the source's model to the target's."""
