"""The parameters of a stage, seen as those of the all-nnx model: for all that reduces over leaves.

The stages name and stack the same parameters in different ways, and a floating-point sum depends on
the order of its terms. With clipping by `optax.global_norm` the four stages of a convnet have
different losses from step 22 on. And a mask that decides by the number of axes decides otherwise
where layers are stacked. So norms and masks work on the leaves in nnx form, whatever the stage, and
a norm sorts its terms before it adds them. Then every stage gets the same bits.
"""

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import Array

from linen_nnx.book.tree import flatten
from linen_nnx.ladder.port import Leaves

if TYPE_CHECKING:
    from linen_nnx.ladder.stage import Stage


class View:
    """The parameters of one stage, seen as the leaves of the all-nnx model; from `Stage.view`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen as nn, nnx
      >>> from linen_nnx import Ladder, Twin
      >>> twin = Twin(linen=lambda: nn.Dense(3),
      ...             nnx=lambda rngs: nnx.Linear(2, 3, rngs=rngs),
      ...             inputs=lambda: (jnp.ones((1, 2)),))
      >>> stage = Ladder(twin).at("linen")
      >>> stage.view.mask(lambda path, rank: rank > 1)
      {'bias': False, 'kernel': True}
      >>> float(stage.view.norm({"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}))
      3.0
    """

    def __init__(self, stage: "Stage") -> None:
        self._ladder, self._stage = stage.ladder, stage
        self._all = stage.ladder.forms("nnx")
        # "part/path" of each parameter -> (path, rank) of the nnx leaves that it holds. A stack of
        # three layers in Linen form holds three of them.
        self._held: dict[str, list[tuple[str, int]]] = {}
        own = stage.ladder.book.abstract(stage.forms)
        for name, spec in own.items():
            if name.startswith("params/") and stage.forms[stage.ladder.part(name)] == "nnx":
                path = name.removeprefix("params/")
                self._held[path] = [(path, len(spec.shape))]
        for way in stage.ladder.book.ways["nnx"]:
            if stage.forms[way.part] == "linen":
                held: list[tuple[str, int]] = []
                for name, spec in zip(way.move.targets, way.move.specs, strict=True):
                    held.append((name.split("/", 1)[1], len(spec.shape)))
                for source in way.move.sources:
                    if source.startswith("params/"):
                        self._held[source.removeprefix("params/")] = held

    def leaves(self, params: Mapping[str, Any], parts: Collection[str] | None = None) -> Leaves:
        """`{nnx path: array}` of a tree shaped like the parameters, such as gradients or moments.

        Args:
          params: nested dicts, as in `variables["params"]`; some parts alone will do.
          parts: the parts wanted; by default all.
        """
        tree = params if parts is None else {part: params[part] for part in parts}
        leaves = flatten({"params": dict(tree)})
        found = self._ladder.book.translate(leaves, self._stage.forms, self._all)
        return {name.split("/", 1)[1]: leaf for name, leaf in found.items()}

    def norm(self, params: Mapping[str, Any], parts: Collection[str] | None = None) -> Array:
        """The Euclidean norm over all leaves: a float32 scalar, the same bits at each stage.

        The arguments are those of `leaves`.
        """
        squares: list[Array] = []
        for leaf in self.leaves(params, parts).values():
            # In float32, as a sum of squares in bfloat16 stops growing after 256 equal terms.
            squares.append(jnp.sum(jnp.square(leaf.astype(jnp.float32))))
        return jnp.sqrt(jnp.sum(jnp.sort(jnp.stack(squares))))

    def ranks(self) -> dict[str, int]:
        """`{path at this stage: the rank of the parameter in nnx form}`."""
        return {path: max(rank for _, rank in held) for path, held in self._held.items() if held}

    def mask(self, test: Callable[[str, int], bool]) -> dict[str, bool]:
        """`{path at this stage: bool}`, as a mask for `optax.masked`.

        Args:
          test: `(nnx path, rank) -> bool`. For a parameter that holds several nnx leaves, it must
            hold for all of them.
        """
        return {path: all(test(*one) for one in held) for path, held in self._held.items()}
