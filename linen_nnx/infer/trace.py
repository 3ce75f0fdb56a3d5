"""Either side of a twin as one pure function of named leaves and inputs, traced to a jaxpr."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from linen_nnx.book.ops import Side
from linen_nnx.infer.twin import Twin, TwinError, attempt


@dataclass(frozen=True)
class Leaf:
    """Shape, dtype and collection of one leaf; nnx collections come from the Variable's type."""

    shape: tuple[int, ...]
    dtype: Any
    collection: str


class Trace(NamedTuple):
    """One side as a pure function: `jaxpr(*leaves, *inputs) -> (*outputs, *updates)`.

    `updates` names the leaves whose new values follow the outputs (batch statistics, say).
    `layers` maps the path of each submodule to its class. `bare` names the arrays of an nnx module
    that are no Variables: they are constants of the function, not leaves.
    """

    side: Side
    jaxpr: Any
    leaves: dict[str, Leaf]
    inputs: tuple[jax.Array, ...]
    updates: tuple[str, ...]
    layers: dict[str, type]
    bare: tuple[str, ...] = ()


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

    def create(key: jax.Array, *given: jax.Array) -> Any:
        with nn.intercept_methods(note):
            return nn.unbox(init(module, key, *rebuild(given)))

    variables = attempt(
        "the Linen init of the twin",
        jax.eval_shape,
        create,
        jax.eval_shape(jax.random.key, 0),
        *arrays,
    )
    flat = {_join(path): (path, leaf) for path, leaf in _flat(variables).items()}
    leaves = {
        name: Leaf(leaf.shape, leaf.dtype, str(path[0])) for name, (path, leaf) in flat.items()
    }

    def forward(values: list[jax.Array], *given: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        tree = unflatten_dict(
            {path: value for (path, _), value in zip(flat.values(), values, strict=True)}
        )
        out = call(module, tree, *rebuild(given))
        if isinstance(out, tuple) and len(out) == 2 and _collections(out[1], variables):
            after = {_join(path): value for path, value in _flat(out[1]).items()}
            return out[0], {name: value for name, value in after.items() if name in leaves}
        return out, {}

    return _trace("linen", forward, leaves, arrays, layers)


def trace_nnx(twin: Twin) -> Trace:
    """Traces the nnx side. Raises `TwinError` naming the part of the twin that failed."""
    arrays, rebuild = _inputs(twin)
    call = twin.call_nnx or (lambda model, *inputs: model(*inputs))
    model = attempt("nnx(rngs) of the twin", _built, twin)
    layers = {_join(path): type(module) for path, module in nnx.iter_modules(model)}
    graphdef, state = nnx.split(model)
    variables, fixed = {}, {}
    for path, leaf in nnx.to_flat_state(state):
        if isinstance(leaf, nnx.RngState):
            fixed[path] = leaf.replace(_random(leaf))
        elif isinstance(leaf, nnx.Variable):
            variables[path] = leaf
        else:
            fixed[path] = leaf
    bare = tuple(_join(path) for path, leaf in fixed.items() if not isinstance(leaf, nnx.RngState))
    leaves = {
        _join(path): Leaf(variable.shape, variable.dtype, _collection(variable))
        for path, variable in variables.items()
    }

    def forward(values: list[jax.Array], *given: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        pairs = zip(variables.items(), values, strict=True)
        flat = [(path, variable.replace(value)) for (path, variable), value in pairs]
        model = nnx.merge(graphdef, nnx.from_flat_state([*flat, *fixed.items()]))
        out = call(model, *rebuild(given))
        state = nnx.to_flat_state(nnx.state(model, nnx.Variable))
        after = {_join(path): leaf.get_value() for path, leaf in state}
        before = zip(leaves, values, strict=True)
        return out, {name: after[name] for name, value in before if after[name] is not value}

    return _trace("nnx", forward, leaves, arrays, layers, bare)


def _trace(
    side: Side,
    forward: Callable[..., Any],
    leaves: dict[str, Leaf],
    arrays: tuple[jax.Array, ...],
    layers: dict[str, type],
    bare: tuple[str, ...] = (),
) -> Trace:
    updated: list[str] = []

    def flat(values: list[jax.Array], *given: jax.Array) -> tuple[list[Any], list[Any]]:
        out, updates = forward(values, *given)
        updated[:] = updates
        outputs = [leaf for leaf in jax.tree.leaves(out) if hasattr(leaf, "dtype")]
        return outputs, list(updates.values())

    specs = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves.values()]
    jaxpr = attempt(f"the {side} call of the twin", jax.make_jaxpr(flat), specs, *arrays)
    return Trace(side, jaxpr, leaves, arrays, tuple(updated), layers, bare)


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


def _flat(tree: Any) -> dict[tuple[Any, ...], Any]:
    return dict(flatten_dict(tree))


def _collections(updates: Any, variables: Mapping[str, Any]) -> bool:
    """Whether the second of two results is what `apply(..., mutable=[...])` returns."""
    return (
        isinstance(updates, Mapping)
        and bool(set(updates) & set(variables))
        and all(isinstance(value, Mapping) for value in updates.values())
    )


def _collection(variable: Any) -> str:
    is_param = isinstance(variable, nnx.Param)  # of any subclass
    return "params" if is_param else nnx.variable_name_from_type(type(variable))


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


def _random(variable: Any) -> jax.Array:
    """A fixed key or count in place of an abstract one."""
    spec = variable.get_value()
    is_key = jax.dtypes.issubdtype(spec.dtype, jax.dtypes.prng_key)
    return jnp.broadcast_to(jax.random.key(0) if is_key else jnp.uint32(0), spec.shape)


def _join(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
