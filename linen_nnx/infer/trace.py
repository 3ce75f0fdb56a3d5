"""Either side of a twin as one pure function of named leaves and inputs, traced to a jaxpr."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import jaxpr_as_fun

from linen_nnx.book.ops import Side
from linen_nnx.infer.evaluate import pulled, quick, widen
from linen_nnx.infer.twin import Twin, TwinError, attempt


@dataclass(frozen=True)
class Leaf:
    """Shape, dtype and collection of one leaf; nnx collections come from the Variable's type."""

    shape: tuple[int, ...]
    dtype: Any
    collection: str


@dataclass(frozen=True)
class Trace:
    """One side as a pure function: `jaxpr(*leaves, *inputs) -> (*outputs, *updates)`.

    `updates` names the leaves whose new values follow the outputs (batch statistics, say).
    `layers` maps the path of each submodule to its class. `bare` names the arrays of an nnx module
    that are no Variables, and `random` its RNG state: they are constants of the function, not
    leaves.
    """

    side: Side
    jaxpr: Any
    leaves: dict[str, Leaf]
    inputs: tuple[jax.Array, ...]
    updates: tuple[str, ...]
    layers: dict[str, type]
    bare: tuple[str, ...] = ()
    random: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """The number of outputs."""
        return len(self.jaxpr.out_avals) - len(self.updates)

    @cached_property
    def wide(self) -> Any:
        """The jaxpr in float64."""
        return widen(self.jaxpr)

    @cached_property
    def run_wide(self) -> Callable[..., list[jax.Array]]:
        """The function in float64, to be called with x64."""
        return quick(jaxpr_as_fun(self.wide), self.wide)

    @cached_property
    def pull_wide(self) -> Callable[..., tuple[list[jax.Array], list[jax.Array]]]:
        """`pulled` of that function: `(leaves, inputs, count) -> (outputs, slopes)`."""
        return quick(partial(pulled, jaxpr_as_fun(self.wide)), self.wide, static_argnums=2)

    @cached_property
    def numbers(self) -> dict[str, np.ndarray]:
        """For each leaf the numbers of its elements, counted through all leaves in their order."""
        ends = np.cumsum([0, *(int(np.prod(leaf.shape)) for leaf in self.leaves.values())])
        kind = np.int32 if ends[-1] < 2**31 else np.int64
        return {
            path: np.arange(start, end, dtype=kind).reshape(leaf.shape)
            for (path, leaf), start, end in zip(self.leaves.items(), ends, ends[1:], strict=False)
        }


def trace_linen(twin: Twin) -> Trace:
    """Traces the Linen side. Raises `TwinError` naming the part of the twin that failed."""
    module = attempt("linen() of the twin", twin.linen)
    arrays, rebuild = _inputs(twin)
    init = twin.init_linen or (lambda module, key, *inputs: module.init(key, *inputs))
    call = twin.call_linen or (lambda module, variables, *inputs: module.apply(variables, *inputs))
    layers: dict[str, type] = {}

    def note(call_next: Any, args: Any, kwargs: Any, context: Any) -> Any:
        layers["/".join(context.module.path)] = type(context.module)
        return call_next(*args, **kwargs)

    def create(*given: jax.Array) -> Any:
        with nn.intercept_methods(note):
            return nn.unbox(init(module, jax.random.key(0), *rebuild(given)))

    variables = attempt("the Linen init of the twin", jax.eval_shape, create, *arrays)
    structure = jax.tree.structure(variables)
    leaves = {
        path: Leaf(leaf.shape, leaf.dtype, path.split("/")[0])
        for path, leaf in named(variables).items()
    }

    def forward(values: list[jax.Array], *given: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        out = call(module, structure.unflatten(values), *rebuild(given))
        if isinstance(out, tuple) and len(out) == 2 and _collections(out[1], variables):
            after = named(nn.unbox(out[1]))
            return out[0], {path: value for path, value in after.items() if path in leaves}
        return out, {}

    return _trace("linen", forward, leaves, arrays, layers)


def trace_nnx(twin: Twin) -> Trace:
    """Traces the nnx side. Raises `TwinError` naming the part of the twin that failed."""
    arrays, rebuild = _inputs(twin)
    call = twin.call_nnx or (lambda model, *inputs: model(*inputs))
    model = attempt("nnx(rngs) of the twin", _built, twin)
    layers = {joined(path): type(module) for path, module in nnx.iter_modules(model)}
    graphdef, random, variables, bare = nnx.split(model, nnx.RngState, nnx.Variable, ...)
    structure = jax.tree.structure(variables)
    leaves = {}
    for path, variable in nnx.to_flat_state(variables):
        kind = nnx.Param if isinstance(variable, nnx.Param) else type(variable)  # of any subclass
        collection = nnx.variable_name_from_type(kind)
        leaves[joined(path)] = Leaf(variable.shape, variable.dtype, collection)

    def forward(values: list[jax.Array], *given: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        fixed = jax.tree.map(_fixed, random)  # new Variables, which this trace may change
        model = nnx.merge(graphdef, fixed, structure.unflatten(values), bare)
        out = call(model, *rebuild(given))
        state = nnx.to_flat_state(nnx.state(model, nnx.Variable))
        after = {joined(path): leaf.get_value() for path, leaf in state}
        before = zip(leaves, values, strict=True)
        return out, {path: after[path] for path, value in before if after[path] is not value}

    constants = [
        tuple(joined(path) for path, _ in nnx.to_flat_state(state)) for state in (bare, random)
    ]
    return _trace("nnx", forward, leaves, arrays, layers, *constants)


def named(tree: Any) -> dict[str, Any]:
    """The leaves of any pytree by their paths."""
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
    leaves: dict[str, Leaf],
    arrays: tuple[jax.Array, ...],
    layers: dict[str, type],
    *constants: tuple[str, ...],
) -> Trace:
    updated: list[str] = []

    def flat(values: list[jax.Array], *given: jax.Array) -> tuple[list[Any], list[Any]]:
        out, updates = forward(values, *given)
        updated[:] = updates
        outputs = [leaf for leaf in jax.tree.leaves(out) if hasattr(leaf, "dtype")]
        return outputs, list(updates.values())

    specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves.values()]
    jaxpr = attempt(f"the {side} call of the twin", jax.make_jaxpr(flat), specs, *arrays)
    return Trace(side, jaxpr, leaves, arrays, tuple(updated), layers, *constants)


def _inputs(twin: Twin) -> tuple[tuple[jax.Array, ...], Callable[..., tuple[Any, ...]]]:
    """The arrays among the inputs, and the function that puts arrays back among the rest."""
    inputs = attempt("inputs() of the twin", twin.inputs)
    if not isinstance(inputs, tuple):
        raise TwinError(
            f"inputs() must return the tuple of a call's arguments, got a {type(inputs).__name__}; "
            "write `inputs=lambda: (x,)`, with the comma"
        )
    leaves, structure = jax.tree.flatten(inputs)
    places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

    def rebuild(arrays: tuple[jax.Array, ...]) -> tuple[Any, ...]:
        given = dict(zip(places, arrays, strict=True))
        return structure.unflatten([given.get(k, leaf) for k, leaf in enumerate(leaves)])

    return tuple(jnp.asarray(leaves[k]) for k in places), rebuild


def _collections(updates: Any, variables: Mapping[str, Any]) -> bool:
    """Whether the second of two results is what `apply(..., mutable=[...])` returns."""
    return (
        isinstance(updates, Mapping)
        and bool(set(updates) & set(variables))
        and all(isinstance(value, Mapping) for value in updates.values())
    )


def _built(twin: Twin) -> nnx.Module:
    """The nnx model without values; with them if it holds arrays that are no Variables.

    Such arrays count by their values, and under abstract evaluation they make trouble.
    """
    rngs = nnx.Rngs(0)
    try:
        model = nnx.eval_shape(lambda: twin.nnx(_rngs()))
    except Exception:  # if it is the twin's own fault, it shows again
        return twin.nnx(rngs)
    bare = jax.Array | jax.ShapeDtypeStruct
    return twin.nnx(rngs) if any(isinstance(x, bare) for _, x in nnx.iter_graph(model)) else model


class _Stream(nnx.RngStream):
    """A stream that always gives the same key: under abstract evaluation counting is quadratic."""

    def __call__(self) -> jax.Array:
        return self.key[...]


def _rngs() -> nnx.Rngs:
    rngs: Any = nnx.Rngs(0)
    rngs.default = _Stream(0, tag="default")
    return rngs


def _fixed(spec: Any) -> jax.Array:
    """A fixed key or count in place of an abstract one."""
    is_key = jax.dtypes.issubdtype(spec.dtype, jax.dtypes.prng_key)
    return jnp.broadcast_to(jax.random.key(0) if is_key else jnp.uint32(0), spec.shape)
