"""Either side of a twin as one pure function of named leaves and inputs, traced to a jaxpr.

    Linen   module.apply(variables, *inputs)
    nnx     model(*inputs)                      both: jaxpr(*leaves, *inputs) -> outputs, updates

    >>> from linen_nnx.infer.example import two_layers
    >>> trace = trace_nnx(two_layers())
    >>> {path: (leaf.shape, leaf.collection) for path, leaf in trace.leaves.items()}
    {'first/bias': ((2,), 'params'), 'first/kernel': ((2, 2), 'params'), 'last': ((2, 2), 'params')}
    >>> trace.numbers("first/kernel")      # its elements, counted through all leaves
    array([[2, 3],
           [4, 5]], dtype=int32)

From here on both sides are treated alike.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import jaxpr_as_fun

from linen_nnx.book.specs import Side
from linen_nnx.infer import calls
from linen_nnx.infer.arguments import arrays_of_inputs, arrays_of_outputs
from linen_nnx.infer.float64 import UNOPTIMISED, Pull, is_small, pulling, widen
from linen_nnx.infer.jaxprs import holds, some_outputs
from linen_nnx.infer.keys import Stream, adopt, set_mode
from linen_nnx.infer.twin import Twin, attempt


@dataclass(frozen=True)
class LeafSpec:
    """Shape, dtype and collection of one leaf; nnx collections come from the Variable's type."""

    shape: tuple[int, ...]
    dtype: Any
    collection: str


@dataclass(frozen=True)
class Trace:
    """One side as a pure function: `jaxpr(*leaves, *inputs) -> (*outputs, *updates)`.

    Attributes:
      side: "linen" or "nnx", for messages.
      leaves: the leaves by path, in the order of the function's arguments.
      inputs: the arrays among the twin's inputs.
      updates: the leaves whose new values follow the outputs (batch statistics, say).
      layers: the class of each submodule, by path.
      bare: the arrays of an nnx module that are no Variables. They are constants of the function.
      random: the RNG state of an nnx module, constant likewise.
      outputs: the names of the outputs: their places in what the call returns.
      construct: gives the values with which the model's own constructor fills all leaves, for a
        seed.
      chosen: how the model is called where the twin leaves that open, a sentence each.
      kinds: the class of each nnx Variable.
    """

    side: Side
    jaxpr: Any
    leaves: dict[str, LeafSpec]
    inputs: tuple[jax.Array, ...]
    updates: tuple[str, ...]
    layers: dict[str, type]
    bare: tuple[str, ...] = ()
    random: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    construct: Callable[[int], dict[str, Any]] = lambda seed: {}
    chosen: tuple[str, ...] = ()
    kinds: Mapping[str, str] = field(default_factory=dict)
    _made: dict[tuple[int, str], np.ndarray] = field(default_factory=dict)
    _programs: dict[int, Any] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """The number of outputs."""
        return len(self.jaxpr.out_avals) - len(self.updates)

    @cached_property
    def wide(self) -> Any:
        """The jaxpr in float64."""
        return widen(self.jaxpr)

    @property
    def small(self) -> bool:
        """Whether the function in float64 is compiled as a whole."""
        return is_small(self.wide)

    @cached_property
    def run_wide(self) -> Callable[..., list[jax.Array]]:
        """The function in float64, to be called with x64."""
        run = jaxpr_as_fun(self.wide)
        return jax.jit(run, compiler_options=UNOPTIMISED) if self.small else run

    @cached_property
    def pull_wide(self) -> Pull:
        """`outputs_and_slopes` of that function. It takes its leaves over, see `pulling`."""
        return pulling(self.wide)

    @cached_property
    def pull_plain(self) -> Pull:
        """`pull_wide` without any `stop_gradient`."""
        if not holds(self.jaxpr, "stop_gradient"):
            return self.pull_wide
        return pulling(widen(self.jaxpr, plain=True))

    def constructed(self, path: str, seed: int = 0) -> np.ndarray:
        """What the model's own constructor fills a leaf with."""
        if (seed, path) not in self._made:
            self._made[seed, path] = self._of_program(path, seed)
        return self._made[seed, path]

    def varies(self, path: str) -> bool:
        """Whether its constructor draws a leaf at random."""
        return not np.array_equal(self.constructed(path), self.constructed(path, 1))

    def _of_program(self, path: str, seed: int) -> np.ndarray:
        """A leaf's value by as much of the constructor as it needs."""
        place = list(self.leaves).index(path)
        try:
            if seed not in self._programs:
                self._programs[seed] = jax.make_jaxpr(lambda: list(self.construct(seed).values()))()
            # Drawing the other leaves, too, would take long in a large model.
            return np.asarray(some_outputs(self._programs[seed], [place])[0])
        except Exception:  # a constructor that needs its own values cannot be a program
            return np.asarray(self.construct(seed)[path])

    def with_outputs(self, places: Iterable[int]) -> "Trace":
        """The trace with some of its outputs, in another order; updates follow as before."""
        order = [*places, *range(self.count, len(self.jaxpr.out_avals))]
        run = jaxpr_as_fun(self.jaxpr)
        specs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in self.jaxpr.in_avals]

        def chosen(*args: Any) -> list[Any]:
            results = run(*args)
            return [results[k] for k in order]

        names = tuple(self.outputs[k] for k in order[: len(order) - len(self.updates)])
        return replace(self, jaxpr=jax.make_jaxpr(chosen)(*specs), outputs=names)

    # Elements are counted through all leaves in their order, so those of a leaf stand in a row.

    @cached_property
    def spans(self) -> dict[str, slice]:
        """For each leaf the slice of the numbers of its elements."""
        spans: dict[str, slice] = {}
        start = 0
        for path, leaf in self.leaves.items():
            spans[path] = slice(start, start + math.prod(leaf.shape))
            start = spans[path].stop
        return spans

    @cached_property
    def size(self) -> int:
        """The number of elements of all leaves."""
        return max((span.stop for span in self.spans.values()), default=0)

    def numbers(self, path: str) -> np.ndarray:
        """The numbers of a leaf's elements, in its shape; made anew, as they are as large as it."""
        kind = np.int32 if self.size < 2**31 else np.int64
        span = self.spans[path]
        return np.arange(span.start, span.stop, dtype=kind).reshape(self.leaves[path].shape)

    def all_numbers(self) -> dict[str, np.ndarray]:
        """`numbers` of all leaves."""
        return {path: self.numbers(path) for path in self.leaves}

    def part(self, values: np.ndarray, path: str) -> np.ndarray:
        """What an array (elements,) has for one leaf, in its shape: a view."""
        return values[self.spans[path]].reshape(self.leaves[path].shape)


def trace_linen(twin: Twin) -> Trace:
    """Traces the Linen side.

    Raises:
      TwinError: naming the part of the twin that failed.
    """
    module = attempt("linen() of the twin", twin.linen)
    arrays, rebuild = arrays_of_inputs(twin)
    whole = calls.complete(twin)
    assert whole.init_linen is not None and whole.call_linen is not None
    init, call = whole.init_linen, whole.call_linen
    layers: dict[str, type] = {}

    def note(call_next: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layers["/".join(context.module.path)] = type(context.module)
        return call_next(*args, **kwargs)

    def create(*given: jax.Array, seed: int = 0) -> Any:
        # Partitioned parameters come in boxes: the leaves are what is in them.
        with nn.intercept_methods(note):
            return nn.unbox(init(module, jax.random.key(seed), *rebuild(given)))

    def construct(seed: int) -> dict[str, Any]:
        return named(attempt("the Linen init of the twin", partial(create, seed=seed), *arrays))

    # Shapes alone: nothing is drawn, however large the model.
    variables = attempt("the Linen init of the twin", jax.eval_shape, create, *arrays)
    structure = jax.tree.structure(variables)
    leaves: dict[str, LeafSpec] = {}
    for path, leaf in named(variables).items():
        collection, _, _ = path.partition("/")
        leaves[path] = LeafSpec(leaf.shape, leaf.dtype, collection)

    def forward(values: list[jax.Array], *given: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        out = call(module, structure.unflatten(values), *rebuild(given))
        if isinstance(out, tuple) and len(out) == 2 and _collections(out[1], variables):
            return out[0], _changed(named(nn.unbox(out[1])), dict(zip(leaves, values, strict=True)))
        return out, {}

    traced = _trace("linen", forward, leaves, arrays, layers)
    chosen = calls.of_linen(twin, module, rebuild(arrays), getattr(call, "draws", False))
    return replace(traced, construct=construct, chosen=chosen)


def trace_nnx(twin: Twin) -> Trace:
    """Traces the nnx side.

    Raises:
      TwinError: naming the part of the twin that failed.
    """
    arrays, rebuild = arrays_of_inputs(twin)
    in_training = trains(twin)
    call: Any = calls.complete(twin, in_training).call_nnx
    model = attempt("nnx(rngs) of the twin", _built, twin)
    # If the model draws in evaluation, each draw of both sides is given one key (see `calls.py`).
    adopt(model)
    set_mode(model, "same")
    layers = {joined(path): type(module) for path, module in nnx.iter_modules(model)}
    graphdef, random, variables, bare = nnx.split(model, nnx.RngState, nnx.Variable, ...)
    structure = jax.tree.structure(variables)
    leaves: dict[str, LeafSpec] = {}
    kinds: dict[str, str] = {}
    for path, variable in nnx.to_flat_state(variables):
        kinds[joined(path)] = type(variable).__name__
        leaves[joined(path)] = LeafSpec(variable.shape, variable.dtype, _collection(type(variable)))

    def construct(seed: int) -> dict[str, Any]:
        # A model of its own: the traced one may have no values, and its streams do not count.
        model = attempt("nnx(rngs) of the twin", twin.nnx, nnx.Rngs(seed))
        found = _values(model)
        return {path: found[path] for path in leaves}

    def forward(values: list[jax.Array], *given: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        # New Variables each time, which this trace may change.
        fixed = jax.tree.map(_fixed, random)
        model = nnx.merge(graphdef, fixed, structure.unflatten(values), bare)
        out = call(model, *rebuild(given))
        return out, _changed(_values(model), dict(zip(leaves, values, strict=True)))

    traced = _trace("nnx", forward, leaves, arrays, layers, _paths(bare), _paths(random))
    chosen = calls.of_nnx(twin, model, rebuild(arrays), in_training)
    return replace(traced, construct=construct, chosen=chosen, kinds=kinds)


def trains(twin: Twin) -> bool:
    """Whether nnx is to be called in train mode: the twin's own Linen call updates something."""
    if twin.call_linen is None or twin.call_nnx is not None:
        return False
    return bool(trace_linen(twin).updates)


def _values(model: nnx.Module) -> dict[str, jax.Array]:
    """The values of a model's Variables by path."""
    state = nnx.to_flat_state(nnx.state(model, nnx.Variable))
    return {joined(path): variable.get_value() for path, variable in state}


def _changed(after: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """The new values of the leaves that a call has changed.

    Whoever updates a leaf puts another tracer in its place. What only `after` has is no leaf:
    `mutable` may make new collections (`intermediates`).
    """
    return {
        path: after[path] for path in before if path in after and after[path] is not before[path]
    }


def _paths(state: Any) -> tuple[str, ...]:
    """The paths in a state."""
    return tuple(joined(path) for path, _ in nnx.to_flat_state(state))


def _collection(kind: type[Any]) -> str:
    """The name of a Variable's type as Flax has it; of one's own, unregistered, its class name."""
    # Flax gives a subclass of Param a collection of its own, but it holds parameters all the same.
    kind = nnx.Param if issubclass(kind, nnx.Param) else kind
    try:
        return nnx.variable_name_from_type(kind)
    except ValueError:  # Flax itself runs, saves and restores such a type without a name
        return kind.__name__


def named(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by their paths.

    Example:
        >>> named({"params": {"up": [1, 2]}})
        {'params/up/0': 1, 'params/up/1': 2}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(at, simple=True, separator="/"): leaf for at, leaf in leaves}


def joined(path: Iterable[Any]) -> str:
    """A path of names and integers as text."""
    return "/".join(map(str, path))


def place(path: Iterable[Any]) -> str:
    """The path of a module as people read it."""
    return joined(path) or "(root)"


def _trace(
    side: Side,
    forward: Callable[..., Any],
    leaves: dict[str, LeafSpec],
    arrays: tuple[jax.Array, ...],
    layers: dict[str, type],
    bare: tuple[str, ...] = (),
    random: tuple[str, ...] = (),
) -> Trace:
    """Traces `forward(leaves, *inputs) -> (outputs, updates)`, and names what it returns."""
    # Filled while tracing: what the function returns by name, besides the arrays.
    updated: list[str] = []
    places: list[str] = []

    def flat(values: list[jax.Array], *given: jax.Array) -> tuple[list[Any], list[Any]]:
        out, updates = forward(values, *given)
        # Cleared, as jax may trace more than once.
        updated[:] = updates
        places.clear()
        outputs: list[Any] = []
        for name, array in arrays_of_outputs(out):
            places.append(name)
            outputs.append(array)
        return outputs, list(updates.values())

    specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves.values()]
    jaxpr = attempt(f"the {side} call of the twin", jax.make_jaxpr(flat), specs, *arrays)
    names = tuple(places)
    return Trace(side, jaxpr, leaves, arrays, tuple(updated), layers, bare, random, names)


def _collections(updates: Any, variables: Mapping[str, Any]) -> bool:
    """Whether the second of two results is what `apply(..., mutable=[...])` returns."""
    return (
        isinstance(updates, Mapping)
        and bool(set(updates) & set(variables))
        and all(isinstance(value, Mapping) for value in updates.values())
    )


def _built(twin: Twin) -> nnx.Module:
    """The nnx model without values; with them if it holds arrays that are no Variables.

    Such arrays count by their values, and under abstract evaluation they have none.
    """
    rngs = nnx.Rngs(0)
    try:
        model = nnx.eval_shape(lambda: twin.nnx(_rngs()))
    except Exception:  # if it is the twin's own fault, it shows again
        return twin.nnx(rngs)
    for _, node in nnx.iter_graph(model):
        if isinstance(node, jax.Array | jax.ShapeDtypeStruct):
            return twin.nnx(rngs)
    return model


def _rngs() -> nnx.Rngs:
    """With a stream that does not count: under abstract evaluation counting is quadratic."""
    rngs: Any = nnx.Rngs(0)
    rngs.default = Stream(0, tag="default")
    rngs.default.mode = "same"
    return rngs


def _fixed(spec: Any) -> jax.Array:
    """A fixed key or count in place of an abstract one."""
    is_key = jax.dtypes.issubdtype(spec.dtype, jax.dtypes.prng_key)
    return jnp.broadcast_to(jax.random.key(0) if is_key else jnp.uint32(0), spec.shape)
