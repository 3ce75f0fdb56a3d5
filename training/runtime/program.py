"""The compiled steps of a run, and the shapes and places of its state.

What is computed comes from the caller: an object with `start`, `train` and `evaluate` (see
`training/step.py`), and what draws the initial variables.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from linen_nnx.ladder.forms import check

from training.runtime.errors import Refused
from training.runtime.mesh import Layout, OneDevice
from training.runtime.names import named, path_name

State = dict[str, Any]

OWN = ("step", "opt_state", "ema")  # entries of a state that no collection may be called like


class Steps(Protocol):
    """What a run computes."""

    def start(self, variables: State) -> State: ...

    def train(self, state: State, batch: Any) -> tuple[State, dict[str, Array]]: ...

    def evaluate(self, state: State, batch: Any, rows: Array, index: Array) -> Any: ...


class Program:
    """What one run computes, compiled.

    Attributes:
        abstract: the state's shapes, dtypes and shardings.
        layout: where the arrays lie.
        train_step: `(state, batch) -> (state, metrics)`, donating `state`; metrics are float32
            scalars.
        eval_step: `(state, batch, rows, index) -> {metric: (sum, weight)}`; `rows` (rows,) float32
            weigh the examples, `index` counts the batches of the validation set.
    """

    def __init__(
        self,
        steps: Steps,
        variables: Mapping[str, Any],
        initial: Callable[[], Any],
        layout: Layout | OneDevice,
    ) -> None:
        """Traces the start, and computes nothing.

        Args:
            steps: what is computed.
            variables: `{"params": ..., collection: ...}` of shapes.
            initial: draws them; to be traced.
            layout: where they will lie.

        Raises:
            Refused: for a model whose collections are named as the run's own state is.
        """
        # A state is one flat dict: a collection `ema` would silently replace the average, or be
        # replaced.
        if taken := sorted(set(OWN) & set(variables)):
            raise Refused(
                f"The model has collections named {', '.join(taken)}, under which a checkpoint "
                "keeps the run's own. Rename them: in nnx, the name that the Variable's type is "
                "registered by."
            )
        self.layout = layout
        self._start = steps.start
        # Drawing and the optimizer in one program: apart, all parameters would lie on one device
        # first.
        self._create = lambda: steps.start(initial())
        self.abstract = layout.state(jax.eval_shape(steps.start, dict(variables)))
        self._places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        self.train_step = layout.jit(steps.train, (self._places, layout.whole), donate=(0,))
        self.eval_step = layout.jit(steps.evaluate, layout.whole)

    def init(self) -> State:
        """The state before the first batch; one program, so that no device holds it all at once."""
        state = self.layout.jit(self._create, self._places)()
        return jax.device_put(state, self._places)

    def filled(
        self, arrays: Mapping[str, np.ndarray], where: str, fresh: Collection[str] = ()
    ) -> State:
        """A state of this run from arrays by name (`opt_state/0/mu/...`), wherever they came from.

        Args:
            arrays: whole arrays; those of `fresh` entries are passed over.
            where: what they are for, to be named in the message.
            fresh: entries of the state that begin anew, at the variables given.

        Raises:
            VariablesError: naming every array that is missing, unexpected or misshapen.
        """
        # What begins anew is neither asked for nor compared: that is what `fresh` is for.
        due = {entry: tree for entry, tree in self.abstract.items() if entry not in fresh}
        given = {path: leaf for path, leaf in arrays.items() if path.split("/")[0] in due}
        check(given, named(due), where)

        def place(path: Any, leaf: Any) -> Array:
            array = given[path_name(path)]
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda at: array[at])

        state = jax.tree_util.tree_map_with_path(place, due)
        if fresh:
            variables = {entry: tree for entry, tree in state.items() if entry not in OWN}
            anew = {entry: self._places[entry] for entry in fresh}
            begin = self.layout.jit(lambda given: {e: self._start(given)[e] for e in fresh}, anew)
            state |= begin(variables)
        return state

    def place(self, batch: Any) -> Any:
        """Arrays of a batch as the steps take them: on a mesh, whole, from this process's rows."""
        return self.layout.batch(batch)

    def fetch(self, tree: Any) -> Any:
        """Arrays as numpy, whole, wherever their parts lie; every process has to ask for them."""
        return self.layout.fetch(tree)

    def evaluate(self, state: State, batches: Any) -> dict[str, float]:
        """The weighted means of all metrics over pairs of a batch and its rows' weights."""
        pending = []
        for index, pair in enumerate(batches):
            batch, rows = self.place(pair)
            # Nothing is fetched before the last batch is on its way, or each would wait for the one
            # before.
            pending.append(self.eval_step(state, batch, rows, jnp.asarray(index, jnp.uint32)))
        totals: dict[str, list[float]] = {}
        for sums in jax.device_get(pending):
            for name, (total, weight) in sums.items():
                added = totals.setdefault(name, [0.0, 0.0])
                added[0] += float(total)
                added[1] += float(weight)
        return {name: total / weight for name, (total, weight) in totals.items()}
