"""From a family's loss to numbers: the model as a loss calls it, and means over examples.

A loss gives values by metric, `(batch,)` each; or values with weights of the same shape, such as
the nats of tokens and which tokens count:

    {"loss": (nats, real)}        nats [[1, 3], [5, 9]], real [[1, 1], [1, 0]]  ->  (1+3+5) / 3 = 3
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from linen_nnx import Stage

from model import Metrics, Rngs
from training.runtime.errors import refuse

RESERVED = {"step", "split", "lr"}  # names of the run's own metrics; also `grad_norm_<part>`

Sums = dict[str, tuple[Array, Array]]
"""By metric, two float32 scalars: the sum of weighted values, and the sum of weights."""


class Model:
    """A stage applied to the variables at hand; what a family's loss is given as `model`.

    Attributes:
        train: whether this is a training step.
        collections: everything beside the parameters, as the calls so far have left it.
        outputs: what the calls have returned.
    """

    def __init__(self, stage: Stage, variables: Mapping[str, Any], rngs: Rngs, train: bool) -> None:
        self.train = train
        self.collections = {name: tree for name, tree in variables.items() if name != "params"}
        self.outputs: list[Any] = []
        self._stage, self._params, self._rngs = stage, variables["params"], rngs

    def __call__(self, *args: Any, rngs: Rngs | None = None, **kwargs: Any) -> Any:
        """The outputs of `forward`, or of `method=`; in training, collections move on."""
        variables = {"params": self._params, **self.collections}
        kwargs["rngs"] = self._rngs if rngs is None else rngs
        if self.train and self.collections:
            kwargs["mutable"] = list(self.collections)
            outputs, updates = self._stage.apply(variables, *args, **kwargs)
            self.collections |= updates
        else:
            outputs = self._stage.apply(variables, *args, **kwargs)
        self.outputs.append(outputs)
        return outputs


def keys(seed: int, index: Any, streams: tuple[str, ...]) -> dict[str, Array]:
    """One typed key a stream, for step or batch `index`; the first stream's is the step's own."""
    # A function of the number of the step, not a key that is split and carried on: so a resumed run
    # draws what it would have drawn, without a key in its state.
    key = jax.random.fold_in(jax.random.key(seed), index)
    return {name: jax.random.fold_in(key, n) if n else key for n, name in enumerate(streams)}


def sums(metrics: Metrics, rows: Array | None = None) -> Sums:
    """Adds a batch up; `rows` (batch,) weigh its examples, 0 for one that only fills up."""
    added = {}
    for name, given in metrics.items():
        values, weights = given if isinstance(given, tuple) else (given, jnp.ones_like(given))
        # Sums and weights, not means: batches that are filled up, or whose examples have other
        # lengths, add up to the mean over all, which a mean of means is not.
        if rows is not None:
            weights = weights * rows.reshape(rows.shape + (1,) * (weights.ndim - 1))
        added[name] = (values * weights).sum(), weights.sum()
    return added


def check(metrics: Metrics, rows: int, parts: list[str]) -> Metrics:
    """The metrics of a loss, if they are of a form that cannot be added up wrongly.

    Raises:
        Refused: naming each that is not; while tracing, where (rows, 1), say, would broadcast.
    """
    # A loss of shape (rows, 1) against targets (rows,) broadcasts to (rows, rows), trains, and
    # learns the mean. So shapes are compared, not only summed.
    problems = [] if "loss" in metrics else ["  loss: missing"]
    for name, given in metrics.items():
        if name in RESERVED or name in {f"grad_norm_{part}" for part in parts}:
            problems.append(f"  {name}: the run itself has a metric of that name")
        pair = given if isinstance(given, tuple) else (given,)
        got = " and ".join(f"{leaf.dtype}{list(leaf.shape)}" for leaf in pair)
        if len(pair) == 1 and got != f"float32[{rows}]":
            problems.append(f"  {name}: got {got}, expected float32[{rows}]")
        elif any(leaf.dtype != jnp.float32 or leaf.shape != pair[0].shape for leaf in pair):
            problems.append(f"  {name}: got {got}, expected float32 values and weights alike")
        elif pair[0].shape[:1] != (rows,):
            problems.append(f"  {name}: got {got}, expected [{rows}, ...]")
    if problems:
        text = "loss() of the model family must give float32 values by metric, an example a row:"
        refuse(["\n".join([text, *sorted(problems)])])
    return metrics
