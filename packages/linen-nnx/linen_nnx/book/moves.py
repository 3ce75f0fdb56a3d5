"""The one type for anything that moves: some leaves, through actions, to some other leaves.

Two layers of a Linen model that its nnx twin keeps stacked are one move, which five parts of this
library write down in their own words for a leaf:

    a rule book's plan   paths            ("params/l0/w", "params/l1/w")  ->  ("layers/w",)
    a model              collection+path  (Id("params", "l0/w"), ...)     ->  (Id("params", ...),)
    a training state     leaf, place      (<leaf opt_state/0/mu/l0/w>, ...) -> (<place ...>,)
    a checkpoint         leaf, leaf       the same, each target with its keys on disk
    a proof              keys of arrays

The actions stay the same from the first to the last, so one `run` serves all of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from linen_nnx.book.actions import Action, Agree, Copies, Fill, Multiply
from linen_nnx.book.grammar import Rule
from linen_nnx.book.specs import Spec

From = TypeVar("From")
To = TypeVar("To")


class Move(NamedTuple, Generic[From, To]):
    """What becomes of some leaves: `sources` go through `actions` and become `targets`.

    A move without a target drops its source. A move without a source fills its target. A move
    without an action keeps every byte, and only the name changes.

    It is a tuple and not a dataclass, since a plan makes several for each of 50,000 leaves.

    Example:
      >>> import numpy as np
      >>> from linen_nnx.book.actions import Gather
      >>> stack = Move(("l0/w", "l1/w"), ("layers/w",), (Gather("stack", 0, 2, 1),))
      >>> [array.shape for array in stack.run([np.zeros((4, 8)), np.ones((4, 8))])]
      [(2, 4, 8)]
      >>> Move(("drop/rngs/key",), ()).run([np.zeros(2)])
      []
    """

    sources: tuple[From, ...]
    targets: tuple[To, ...]
    actions: tuple[Action, ...] = ()
    specs: tuple[Spec, ...] = ()
    """Shape and dtype of each target. Where nothing but a name changes they may be left out."""
    rule: Rule | None = None
    """The rule that says so; None where no rule was needed, as for a step count."""

    def run(self, arrays: Sequence[Any]) -> list[Any]:
        """The arrays of the targets from those of the sources, both in their order.

        Raises `Mismatch` where an action finds values that it cannot take: copies that differ.
        """
        result = list(arrays) if self.targets else []
        # If the caller has no name for them either, the sources are freed after the first action.
        del arrays
        for action in self.actions:
            result = action.run(result)
        return result

    @property
    def lossless(self) -> bool:
        """Whether every bit of the targets comes from a source as it is."""
        return not any(isinstance(action, Multiply | Fill) for action in self.actions)

    @property
    def joins(self) -> bool:
        """Whether several equal leaves become one."""
        return any(isinstance(action, Agree) for action in self.actions)

    @property
    def copies(self) -> bool:
        """Whether one leaf becomes several equal ones."""
        return any(isinstance(action, Copies) for action in self.actions)


def targets_of(moves: Iterable[Move[Any, To]]) -> Iterator[To]:
    """Every target of some moves, in their order."""
    for move in moves:
        yield from move.targets
