"""One side of a proof: a model in one form, as functions of leaves that can be run.

    of_twin(twin, "linen")      leaves   Id("params", "first/kernel"): float32[3,4], ...
    of_twin(twin, "nnx")        leaves   Id("", "first/kernel"): float32[3,4], ...

    forward(state, inputs)   -> {"output 0": ...} and the leaves that the call updates
    gradient(state, inputs)  -> the gradient by each leaf, of a random sum of all outputs
    step(state, gradients)   -> the state after one step of the optimizer

`prove.py` runs the two subjects of a conversion and compares. A subject comes from a twin (here),
or from whoever knows how to build the model of a saved run.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import jaxpr_as_fun

from linen_nnx.book.plan import RuleError
from linen_nnx.book.specs import Side
from linen_nnx.book.tree import unflatten
from linen_nnx.disk.state import OPTIMIZER, Id
from linen_nnx.infer.float64 import UNOPTIMISED, outputs_and_slopes
from linen_nnx.infer.trace import LeafSpec, Trace, named, trace_linen, trace_nnx
from linen_nnx.infer.twin import Twin
from linen_nnx.proof.compare import spec

Array = np.ndarray
Arrays = dict[Id | str, Array]
"""Leaves of a training state: the model's by `Id`, the others by neutral path (`state.py`)."""
OptimizerStep = Callable[[Arrays, Mapping[Any, Array], bool], Arrays]
"""`(state, gradients of the parameters, fresh) -> state`."""

# nnx writes `kernel/value`, and `blocks/0/value` or `blocks/value/0` for a list of arrays.
_BOX = re.compile(r"/value(?=(/[0-9]+)*$)")


@dataclass(frozen=True)
class Subject:
    """A model in one form.

    Attributes:
      trace: the model as a pure function, with example inputs.
      flat: whether its leaves lie below the names of their collections.
      step: one step of the optimizer, from the state or, with `fresh`, from an optimizer that has
        just been created. None if no optimizer is known. It raises `RuleError` for a state that is
        not this optimizer's.
      exact: whether the other side must give the same bits.
    """

    trace: Trace
    flat: bool
    step: OptimizerStep | None = None
    exact: bool = False

    @cached_property
    def leaves(self) -> dict[Id, LeafSpec]:
        """The model's leaves."""
        found = {}
        for path, leaf in self.trace.leaves.items():
            id = Id(*path.split("/", 1)) if self.flat else Id("", path)
            found[id] = leaf
        return found

    def forward(
        self, state: Arrays, inputs: Sequence[Any], wide: bool = False
    ) -> tuple[dict[str, Array], Arrays]:
        """The outputs, and the new values of the leaves that the call updates; `wide`: float64."""
        count = self.trace.count
        if wide and not self.trace.small:
            # A large model runs equation by equation: there is no program to share.
            with jax.enable_x64(True):
                outs = self.trace.run_wide(*self._arguments(state, inputs, wide))
        else:
            outs, _ = self._outputs_and_slopes(state, inputs, wide, count)
        outs = [np.asarray(out) for out in outs]
        ids = dict(zip(self.trace.leaves, self.leaves, strict=True))
        updated = [ids[path] for path in self.trace.updates]
        updates = dict(zip(updated, outs[count:], strict=True))
        return {f"output {k}": out for k, out in enumerate(outs[:count])}, {**updates}

    def gradient(
        self,
        state: Arrays,
        inputs: Sequence[Any],
        wide: bool = False,
        updates: bool = False,
        plain: bool = False,
    ) -> dict[Id, Array]:
        """The gradient of a random projection of all outputs by every leaf of floats.

        Args:
          state: the leaves, and what else is in it.
          inputs: in the place of the example inputs.
          wide: in float64.
          updates: as if what the call updates were outputs, too.
          plain: in float64, as if the model had no `stop_gradient`.
        """
        count = len(self.trace.jaxpr.out_avals) if updates else self.trace.count
        _, slopes = self._outputs_and_slopes(state, inputs, wide, count, plain)
        found = {}
        for (id, leaf), slope in zip(self.leaves.items(), slopes, strict=True):
            if jnp.issubdtype(leaf.dtype, jnp.floating):
                found[id] = np.asarray(slope)
        return found

    def _outputs_and_slopes(
        self, state: Arrays, inputs: Sequence[Any], wide: bool, count: int, plain: bool = False
    ) -> tuple[list[Any], list[Any]]:
        """All that one program gives, see `float64.outputs_and_slopes`: outputs and gradients.

        Compiling is most of what a small model costs, so there is no other program for the outputs
        alone. What was asked last is kept.
        """
        known = self._last.get(wide)
        asked = count, plain
        # By identity: comparing two states element by element would take as long as a run.
        if known is None or known[0] is not state or known[1] is not inputs or known[2] != asked:
            with jax.enable_x64(wide):
                values = self._arguments(state, inputs, wide)
                leaves, given = values[: len(self.leaves)], values[len(self.leaves) :]
                pull = self.trace.pull_wide if wide else self._jitted
                pull = self.trace.pull_plain if plain else pull
                known = self._last[wide] = state, inputs, asked, pull(leaves, given, count)
        return known[3]

    def _arguments(self, state: Arrays, inputs: Sequence[Any], wide: bool) -> list[Any]:
        """Leaves and inputs as arrays of the dtypes that the traced function takes."""
        given = [*(state[id] for id in self.leaves), *inputs]
        arguments = []
        for value, aval in zip(given, self.trace.jaxpr.in_avals, strict=True):
            if jnp.issubdtype(value.dtype, jnp.floating):
                # A copy: a program in float64 takes its leaves over, and the state is not its own.
                to = jnp.dtype("float64") if wide else aval.dtype
                value = jnp.array(value, to, copy=wide)
            arguments.append(value)
        return arguments

    @cached_property
    def _last(self) -> dict[bool, tuple[Any, ...]]:
        """By whether it was in float64: what `_outputs_and_slopes` was given, and gave."""
        return {}

    @cached_property
    def _jitted(self) -> Callable[..., tuple[list[Any], list[Any]]]:
        """`outputs_and_slopes` in the dtypes of the model, optimised where bits must be equal."""
        # What has to give the same bits is what trains, and that is optimised. For the rest,
        # compiling without takes less than half as long.
        options = None if self.exact else UNOPTIMISED
        function = partial(outputs_and_slopes, jaxpr_as_fun(self.trace.jaxpr))
        return jax.jit(function, static_argnums=2, compiler_options=options)


def of_twin(twin: Twin, side: Side) -> Subject:
    """One side of a twin.

    Raises:
      TwinError: when a part of the twin cannot be built or called; it names the part.

    Example:
        >>> import flax.linen as nn
        >>> twin = Twin(lambda: nn.Dense(2), nnx.Module, lambda: (jnp.ones((1, 3)),))
        >>> list(of_twin(twin, "linen").leaves)
        [Id(collection='params', path='bias'), Id(collection='params', path='kernel')]
    """
    trace = trace_linen(twin) if side == "linen" else trace_nnx(twin)
    subject = Subject(trace, side == "linen")
    if twin.optimizer is None:
        return subject
    return replace(subject, step=partial(_step, subject, twin.optimizer))


def _step(
    subject: Subject, tx: Any, state: Arrays, gradients: Mapping[Any, Array], fresh: bool
) -> Arrays:
    """One update as `TrainState` or `nnx.Optimizer` does it, of the tree that they have."""
    by_path: dict[str, Id] = {}
    for id, leaf in subject.leaves.items():
        if leaf.collection == "params":
            by_path[id.path] = id
    above = _level(by_path, state) if subject.flat else ""

    def tree(arrays: Mapping[Any, Array]) -> Any:
        params = {f"{above}{path}": jnp.asarray(arrays[id]) for path, id in by_path.items()}
        if subject.flat:
            return unflatten(params)
        return nnx.from_flat_state([(_keys(path), nnx.Param(x)) for path, x in params.items()])

    def flatten(tree: Any) -> dict[str, Any]:
        if subject.flat:
            return named(tree)
        return {_BOX.sub("", path): leaf for path, leaf in named(tree).items()}

    params = tree(state)
    if fresh:
        start = tx.init(params)
    else:
        empty = jax.eval_shape(tx.init, params)
        carried = _carried(flatten(empty), state)
        start = jax.tree.unflatten(jax.tree.structure(empty), map(jnp.asarray, carried))

    moved, after = _program(tx)(tree(gradients), start, params)
    result: Arrays = {}
    for path, leaf in flatten(moved).items():
        result[by_path[path.removeprefix(above)]] = np.asarray(leaf)
    for path, leaf in flatten(after).items():
        result[f"{OPTIMIZER}/{path}"] = np.asarray(leaf)
    return result


def _carried(due: Mapping[str, Any], state: Arrays) -> list[Array]:
    """The leaves of an optimizer's state, in the order of those that it must have.

    Raises `RuleError` with every leaf that the state lacks or has otherwise.
    """
    problems, found = [], []
    for path, leaf in due.items():
        array = state.get(f"{OPTIMIZER}/{path}")
        if spec(array) != spec(leaf):
            wants = f"the optimizer wants {spec(leaf)}"
            problems.append(f"`{OPTIMIZER}/{path}` is {spec(array)}, {wants}")
        elif array is not None:
            found.append(array)
    if problems:
        raise RuleError("The state is not that of the twin's optimizer", problems)
    return found


@lru_cache(maxsize=4)
def _program(tx: Any) -> Callable[..., Any]:
    """One update by an optimizer, compiled once for all steps of one form."""
    import optax

    def update(gradients: Any, start: Any, params: Any) -> Any:
        updates, after = tx.update(gradients, start, params)
        return optax.apply_updates(params, updates), after

    return jax.jit(update, compiler_options=UNOPTIMISED)


def _level(params: Mapping[str, Id], state: Arrays) -> str:
    """`params/` where `TrainState.params` holds `{"params": ...}`: there moments do so, too."""
    ends = tuple(f"/{path}" for path in params)
    deeper_ends = tuple(f"/params/{path}" for path in params)
    is_deeper = False
    for key in state:
        if isinstance(key, str) and key.startswith(f"{OPTIMIZER}/") and key.endswith(ends):
            if not key.endswith(deeper_ends):
                return ""
            is_deeper = True
    # Without any moments (plain SGD) the level makes no difference.
    return "params/" if is_deeper else ""


def _keys(path: str) -> tuple[str | int, ...]:
    """A path as nnx has it: the layers of a list have integers for names."""
    return tuple(int(name) if name.isdigit() else name for name in path.split("/"))
