"""Runs one pair of layer twins on the same weights and compares them bit for bit.

The weights are the Linen twin's init, moved so that no bias is 0 and no scale is 1, and carried
over by the pair's rule book. Parameters are float32; `dtype` is the layers' compute dtype. What is
compared: the outputs together with the updated statistics (`forward`), and the gradients of every
parameter and float input under a random cotangent (`gradient`); each eager and jitted.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx
from jax import Array

from linen_nnx.book.rules import RuleBook
from linen_nnx.book.tree import flatten, unflatten

DTYPES = ("float32", "bfloat16")
MODES = ("eager", "jitted")
QUANTITIES = ("forward", "gradient")

Leaves = Mapping[str, Any]
Forward = Callable[[Leaves, Sequence[Any]], tuple[list[Array], dict[str, Array]]]


@dataclass(frozen=True)
class Pair:
    """A Linen layer and its nnx twin."""

    name: str
    linen: Callable[[Any], nn.Module]
    """The Linen module with a compute dtype."""
    nnx: Callable[[Any, nnx.Rngs], nnx.Module]
    """Its twin with the same."""
    inputs: tuple[Any, ...]
    """The arguments of both: float32 arrays, which are differentiated, and others."""
    rules: Sequence[Mapping[str, Any]] = ()
    """Which leaf is which, as in a rule book (`linen_nnx/book/grammar.py`)."""
    differs: tuple[str, ...] = ()
    """What is *not* equal in every bit: of `float32 forward`, `bfloat16 gradient`, ..."""
    varies: tuple[str, ...] = ()
    """What is equal or not depending on shapes and on the CPU, and so is shown but not judged."""
    why: str = ""
    fix: str = ""
    """What makes the pair exact."""
    note: str = ""
    """What else to know of such a layer."""
    linen_call: Mapping[str, Any] = field(default_factory=dict)
    nnx_call: Mapping[str, Any] = field(default_factory=dict)
    method: str = "__call__"
    cast_inputs: bool = False
    """Hand float inputs over in the compute dtype: for layers that have none of their own."""
    zero: tuple[str, ...] = ()
    """Linen leaves that are held at 0."""


@dataclass(frozen=True)
class Cell:
    """How far the twins are apart in one quantity, and in which array most."""

    dtype: str
    mode: str
    quantity: str
    exact: bool
    """Whether every bit is equal, the sign of zeros included."""
    largest: float
    """The largest absolute difference."""
    ulps: float
    """The same in units in the last place, in the compute dtype, of the array's largest element."""
    where: str


@dataclass(frozen=True)
class _Twin:
    forward: Forward
    params: Leaves
    statistics: Leaves


def compare(pair: Pair, dtype: str) -> list[Cell]:
    """The four cells of a pair in one compute dtype, `MODES` by `QUANTITIES`.

    Raises:
      RuleError: if the rules do not fit the leaves of the installed versions.
      ValueError: if the twins return other shapes or dtypes, if a value is not finite, or if a
        parameter has no gradient, so that equality would prove nothing about it.
    """
    rng = np.random.default_rng(0)
    inputs = jax.tree.map(lambda array: _cast(array, dtype, pair.cast_inputs), list(pair.inputs))
    book = RuleBook.from_dict({"version": 1, "rules": list(pair.rules)}, pair.name)
    linen = _linen_twin(pair, dtype, inputs, rng)
    twin = _nnx_twin(pair, dtype, book, linen)
    outputs = [
        jax.eval_shape(side.forward, {**side.params, **side.statistics}, inputs)[0]
        for side in (linen, twin)
    ]
    signatures = [[f"{a.dtype}{list(a.shape)}" for a in arrays] for arrays in outputs]
    if signatures[0] != signatures[1]:
        raise ValueError(f"Linen returns {signatures[0]}, nnx {signatures[1]}")
    cotangents = [jnp.asarray(rng.normal(size=a.shape), a.dtype) for a in outputs[0]]
    cells = []
    for mode in MODES:
        program = jax.jit(_program, static_argnums=0) if mode == "jitted" else _program
        results = [
            program(side.forward, side.params, side.statistics, inputs, cotangents)
            for side in (linen, twin)
        ]
        outputs, updated, grads, input_grads = results[0]
        _check({**outputs, **updated}, {**grads, **input_grads})
        updated = book.of_collection("batch_stats").to_nnx(updated)
        grads = book.of_collection("params").to_nnx(grads)
        for quantity, ours, theirs in (
            ("forward", {**outputs, **updated}, {**results[1][0], **results[1][1]}),
            ("gradient", {**grads, **input_grads}, {**results[1][2], **results[1][3]}),
        ):
            cells.append(_cell(dtype, mode, quantity, ours, theirs))
    return cells


def _cast(array: np.ndarray, dtype: str, wanted: bool) -> Array:
    return jnp.asarray(array, dtype if wanted and array.dtype.kind == "f" else None)


def _arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as the layers take them: keys are no numpy arrays there."""
    return {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in call.items()}


def _linen_twin(pair: Pair, dtype: str, inputs: list[Any], rng: np.random.Generator) -> _Twin:
    module = pair.linen(jnp.dtype(dtype))
    call: dict[str, Any] = {"method": pair.method, **_arguments(pair.linen_call)}
    leaves = flatten(module.init(jax.random.key(0), *inputs, **call))
    for path, leaf in leaves.items():
        moved = leaf + rng.uniform(-0.3, 0.3, leaf.shape)
        leaves[path] = jnp.asarray(0 * leaf if path in pair.zero else moved, leaf.dtype)

    def forward(leaves: Leaves, inputs: Sequence[Any]) -> tuple[list[Array], dict[str, Array]]:
        outputs, updated = module.apply(unflatten(leaves), *inputs, mutable=["batch_stats"], **call)
        return jax.tree.leaves(outputs), flatten(updated)

    params = {path: leaf for path, leaf in leaves.items() if path.startswith("params/")}
    return _Twin(forward, params, {p: leaf for p, leaf in leaves.items() if p not in params})


def _nnx_twin(pair: Pair, dtype: str, book: RuleBook, linen: _Twin) -> _Twin:
    graphdef, state, rest = nnx.split(
        pair.nnx(jnp.dtype(dtype), nnx.Rngs(0)), (nnx.Param, nnx.BatchStat), ...
    )
    variables = {_name(path): (path, variable) for path, variable in nnx.to_flat_state(state)}

    def forward(leaves: Leaves, inputs: Sequence[Any]) -> tuple[list[Array], dict[str, Array]]:
        flat = [(path, variable.replace(leaves[n])) for n, (path, variable) in variables.items()]
        model = nnx.merge(graphdef, nnx.from_flat_state(flat), rest, copy=True)
        outputs = getattr(model, pair.method)(*inputs, **_arguments(pair.nnx_call))
        updated = nnx.to_flat_state(nnx.state(model, nnx.BatchStat))
        return jax.tree.leaves(outputs), {_name(p): variable.get_value() for p, variable in updated}

    leaves = book.to_nnx(
        {**linen.params, **linen.statistics},
        target={name: variable.get_value() for name, (_, variable) in variables.items()},
    )
    params = {n: leaf for n, leaf in leaves.items() if isinstance(variables[n][1], nnx.Param)}
    return _Twin(forward, params, {n: leaf for n, leaf in leaves.items() if n not in params})


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def _program(
    forward: Forward, params: Leaves, statistics: Leaves, inputs: list[Any], cotangents: list[Array]
) -> tuple[Leaves, Leaves, Leaves, Leaves]:
    """(outputs, updated statistics, gradients of the parameters, gradients of float inputs)."""
    arrays, treedef = jax.tree.flatten(inputs)
    floats = {i: a for i, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.floating)}

    def call(params: Leaves, floats: Mapping[int, Array]) -> tuple[list[Array], Leaves]:
        full = [floats.get(i, array) for i, array in enumerate(arrays)]
        return forward({**params, **statistics}, jax.tree.unflatten(treedef, full))

    outputs, pullback, updated = jax.vjp(call, params, floats, has_aux=True)
    grads, input_grads = pullback(cotangents)
    return (
        {f"(output {i})": array for i, array in enumerate(outputs)},
        updated,
        grads,
        {f"(input {i})": array for i, array in input_grads.items()},
    )


def _check(values: Leaves, grads: Leaves) -> None:
    wild = [path for path, a in {**values, **grads}.items() if not jnp.isfinite(a).all()]
    blind = [path for path, gradient in grads.items() if not jnp.any(gradient)]
    if wild or blind:
        raise ValueError(f"not finite: {wild}; without a gradient, so not compared: {blind}")


def _cell(dtype: str, mode: str, quantity: str, ours: Leaves, theirs: Leaves) -> Cell:
    """The cell of two sets of arrays. Raises `ValueError` if they cannot be compared."""
    if set(ours) != set(theirs):
        raise ValueError(f"only one twin has {sorted(set(ours) ^ set(theirs))}")
    exact, largest, ulps, where = True, 0.0, 0.0, ""
    for path in ours:
        one, other = np.asarray(ours[path]), np.asarray(theirs[path])
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            raise ValueError(
                f"`{path}` is {one.dtype}{one.shape}, in nnx {other.dtype}{other.shape}"
            )
        exact = exact and one.tobytes() == other.tobytes()
        one, other = one.astype(np.float64), other.astype(np.float64)
        apart = float(np.max(np.abs(one - other)))
        if apart:
            top = float(np.max(np.abs([one, other])))
            unit = float(jnp.finfo(dtype).eps) * 2.0 ** math.floor(math.log2(top))
            largest = max(largest, apart)
            ulps, where = max((ulps, where), (apart / unit, path))
    return Cell(dtype, mode, quantity, exact, largest, ulps, where)
