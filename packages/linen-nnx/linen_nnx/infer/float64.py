"""Rewrites a traced model to float64, whatever dtype it was written for, and runs it.

In the models' own dtypes twins differ by rounding: 1e-4 in gradients where two attention functions
differ, percents in bfloat16. With every float widened, equal means 1e-12 and different means
different. Calls, remat and custom derivatives are opened on the way: the derivative of the result
is that of the function itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.dtypes import float0
from jax.extend.core import ClosedJaxpr

from linen_nnx.infer.jaxprs import bind, branches, called, interpret, scan_parts, while_parts

UNOPTIMISED: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""For programs that run a few times: compiling takes less than half as long."""
_SMALL = 1000  # equations: ten blocks of a transformer


def widen(jaxpr: Any, plain: bool = False) -> Any:
    """The closed jaxpr with every float in float64, complex in complex128; evaluate it with x64.

    `plain`: without its `stop_gradient`s, so that its derivative is that of what it computes.
    """
    with jax.enable_x64(True):
        specs = [jax.ShapeDtypeStruct(a.shape, _wide_dtype(a.dtype)) for a in jaxpr.in_avals]
        return jax.make_jaxpr(lambda *args: _evaluate(jaxpr, args, plain))(*specs)


def outputs_and_slopes(
    function: Callable[..., list[Any]], leaves: Sequence[Any], inputs: Sequence[Any], count: int
) -> tuple[list[Any], list[Any]]:
    """What a function gives, and the gradient of a random projection of its first `count` outputs.

    The gradient is by every leaf, 0 by those that are no floats.
    """

    def split(*leaves: Any) -> tuple[list[Any], list[Any]]:
        outs = function(*leaves, *inputs)
        return outs[:count], outs[count:]

    # The others are left out: even with a weight of 0, an infinite slope of one gives NaN.
    outs, pull, others = jax.vjp(split, *leaves, has_aux=True)
    weights = []
    for number, out in enumerate(outs):
        weight = np.random.default_rng([number, *out.shape]).normal(size=out.shape)
        is_smooth = jnp.issubdtype(out.dtype, jnp.inexact)
        weights.append(weight.astype(out.dtype) if is_smooth else np.zeros(out.shape, float0))
    slopes = [
        jnp.zeros(leaf.shape) if slope.dtype == float0 else slope
        for leaf, slope in zip(leaves, pull(weights), strict=True)
    ]
    return [*outs, *others], slopes


def is_small(jaxpr: Any) -> bool:
    """Whether a widened jaxpr is better compiled as a whole than run equation by equation."""
    return len(jaxpr.eqns) <= _SMALL


def with_little_compiling(
    function: Callable[..., Any], jaxpr: Any, **options: Any
) -> Callable[..., Any]:
    """What runs a widened jaxpr a few times with the least compiling.

    A small one as one program that is not optimised. A large one equation by equation: equal
    equations are compiled once, as layers are alike.
    """
    if not is_small(jaxpr):
        return function
    return jax.jit(function, compiler_options=UNOPTIMISED, **options)


def _evaluate(jaxpr: Any, args: Sequence[Any], plain: bool = False) -> list[Any]:
    return interpret(
        jaxpr, map(wide, args), wide, lambda _, eqn, given: equation(eqn, given, plain)
    )


def equation(eqn: Any, args: list[Any], plain: bool = False) -> Sequence[Any]:
    """The outputs of one equation with every float widened; `plain` as in `widen`."""
    name = eqn.primitive.name
    if name == "scan":
        return _scan(eqn, args, plain)
    if name == "while":
        loop = while_parts(eqn)
        of_test, of_body, carry = loop.operands(args)
        test, body = (
            _function(part, fixed, plain)
            for part, fixed in ((loop.test, of_test), (loop.body, of_body))
        )
        return lax.while_loop(lambda c: test(*c)[0], lambda c: tuple(body(*c)), tuple(carry))
    if name == "cond":
        ways = [_function(branch, [], plain) for branch in branches(eqn)]
        return lax.switch(args[0], ways, *args[1:])
    if (inner := called(eqn)) is not None:
        return _evaluate(inner, args, plain)
    if name == "reduce_precision" or (name == "stop_gradient" and plain):
        return args
    if name == "bitcast_convert_type":  # the bits of the original dtype are what counts
        outs = bind(eqn, [lax.convert_element_type(args[0], eqn.invars[0].aval.dtype)])
    else:
        changed = {key: _wide_param(value) for key, value in eqn.params.items()}
        if name in ("dot_general", "conv_general_dilated"):
            changed["precision"] = None  # else it may ask for products of bfloat16
        outs = bind(eqn, args, **changed)
    return [wide(out) for out in outs]


def _scan(eqn: Any, args: list[Any], plain: bool) -> Sequence[Any]:
    scan = scan_parts(eqn)
    fixed, carry, rows = scan.operands(args)
    body = _function(scan.body, fixed, plain)

    def step(carry: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = body(*carry, *rows)
        return outs[: scan.carried], outs[scan.carried :]

    carry, stacked = lax.scan(step, carry, rows, length=scan.length, reverse=scan.reverse)
    return [*carry, *stacked]


def _function(jaxpr: Any, fixed: Sequence[Any], plain: bool) -> Callable[..., list[Any]]:
    return lambda *args: _evaluate(jaxpr, [*fixed, *args], plain)


def wide(value: Any) -> Any:
    """The value in float64 or complex128 if it is a narrower one; anything else as it is."""
    kind = getattr(value, "dtype", None)
    if kind is None:
        kind = jnp.result_type(value)
    to = _wide_dtype(kind)
    return value if to is kind else lax.convert_element_type(value, to)


def _wide_param(value: Any) -> Any:
    """A parameter in float64: a dtype, or the program of a reduction or a scatter."""
    if not hasattr(value, "eqns"):
        return _wide_dtype(value)
    if hasattr(value, "consts"):
        return widen(value)
    return widen(ClosedJaxpr(value, ())).jaxpr


def _wide_dtype(value: Any) -> Any:
    """float64 in place of a narrower float, complex128 for complex64; anything else as it is."""
    try:
        if isinstance(value, str) or not isinstance(value, jnp.dtype | type):
            return value
        if jnp.issubdtype(value, jnp.complexfloating):
            return jnp.dtype("complex128")
        return jnp.dtype("float64") if jnp.issubdtype(value, jnp.floating) else value
    except TypeError:
        return value
