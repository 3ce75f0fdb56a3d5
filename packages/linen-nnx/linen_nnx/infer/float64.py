"""Rewrites a traced model to float64, whatever dtype it was written for, and runs it.

In the models' own dtypes twins differ by rounding: 1e-4 in gradients where two attention functions
differ, percents in bfloat16. With every float widened, equal means 1e-12 and different means
different.

    >>> from jax.extend.core import jaxpr_as_fun
    >>> jaxpr = jax.make_jaxpr(lambda x: x.astype("bfloat16") * 3)(jnp.float32(0.1))
    >>> with jax.enable_x64(True):
    ...     float(jaxpr_as_fun(jaxpr)(np.float32(0.1))[0])       # as it was written
    ...     float(jaxpr_as_fun(widen(jaxpr))(np.float64(0.1))[0])
    0.30078125
    0.30000000000000004

Calls, remat and custom derivatives are opened on the way. So the result is derived as the function
that it computes, and not as a custom derivative says.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.dtypes import float0
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from linen_nnx.infer.jaxprs import bind, branches, called, interpret, scan_parts, while_parts

UNOPTIMISED: dict[str, Any] = {"xla_backend_optimization_level": 0}
"""For programs that run a few times: compiling takes less than half as long."""
_SMALL = 1000  # equations: ten blocks of a transformer


def widen(jaxpr: Any, plain: bool = False) -> Any:
    """The closed jaxpr with every float in float64, complex in complex128; evaluate it with x64.

    Args:
      jaxpr: a closed jaxpr.
      plain: whether to leave out `stop_gradient`. The leaves behind one (a frozen backbone) have no
        gradient, and nothing would tell them apart.
    """
    with jax.enable_x64(True):
        specs = [jax.ShapeDtypeStruct(a.shape, _wide_dtype(a.dtype)) for a in jaxpr.in_avals]
        return jax.make_jaxpr(lambda *args: _evaluate(jaxpr, args, plain))(*specs)


def outputs_and_slopes(
    function: Callable[..., list[Any]], leaves: Sequence[Any], inputs: Sequence[Any], count: int
) -> tuple[list[Any], list[Any]]:
    """What a function gives, and the gradient of a random projection of its first outputs.

    A plain sum would not do: the outputs of a softmax add up to 1 whatever the leaves are, and the
    sum has no gradient. The weights are random but fixed: both sides of a twin get the same.

    Args:
      function: `(*leaves, *inputs) -> outputs`.
      leaves: what to derive by.
      inputs: what else it takes.
      count: how many of the outputs the projection is of.

    Returns:
      the outputs, and a gradient for each leaf, 0 by those that are no floats.

    Example:
        >>> outs, slopes = outputs_and_slopes(lambda w, x: [w * x], [jnp.ones(2)], [jnp.ones(2)], 1)
        >>> outs[0].shape, slopes[0].shape
        ((2,), (2,))
    """

    def split(*leaves: Any) -> tuple[list[Any], list[Any]]:
        outs = function(*leaves, *inputs)
        return outs[:count], outs[count:]

    # The others are left out: even with a weight of 0, an infinite slope of one gives NaN.
    outs, pull, others = jax.vjp(split, *leaves, has_aux=True)
    weights = []
    for number, out in enumerate(outs):
        # Seeded by place and shape, as the outputs of both sides stand in one order.
        weight = np.random.default_rng([number, *out.shape]).normal(size=out.shape)
        is_smooth = jnp.issubdtype(out.dtype, jnp.inexact)
        weights.append(weight.astype(out.dtype) if is_smooth else np.zeros(out.shape, float0))
    slopes = []
    for leaf, slope in zip(leaves, pull(weights), strict=True):
        # jax gives integers and keys a gradient of dtype float0, which numpy cannot compute with.
        slopes.append(jnp.zeros(leaf.shape) if slope.dtype == float0 else slope)
    return [*outs, *others], slopes


Pull = Callable[[Sequence[Any], Sequence[Any], int], tuple[list[Any], list[Any]]]
"""`(leaves, inputs, count)` to the outputs and the gradients, as of `outputs_and_slopes`."""


def is_small(jaxpr: Any) -> bool:
    """Whether a widened jaxpr is better compiled as a whole than run equation by equation.

    A small one becomes one program that is not optimised. A large one runs equation by equation:
    equal equations are compiled once, as layers are alike. Either takes the least compiling.
    """
    return len(jaxpr.eqns) <= _SMALL


def pulling(jaxpr: Any) -> Pull:
    """Makes `outputs_and_slopes` of a widened jaxpr a function that runs a few times.

    The function takes its leaves over: the gradients are written where the leaves were. So it needs
    half the memory, and whoever has the leaves must not use them again.

    Example:
        >>> jaxpr = jax.make_jaxpr(lambda w, x: [w * x])(jnp.ones(2), jnp.ones(2))
        >>> outs, slopes = pulling(jaxpr)([jnp.ones(2)], [jnp.full(2, 3.0)], 1)
        >>> outs[0].tolist()
        [3.0, 3.0]
    """
    function = jaxpr_as_fun(jaxpr)
    if not is_small(jaxpr):
        return partial(outputs_and_slopes, function)

    def given(
        floats: Sequence[Any], others: Sequence[Any], inputs: Sequence[Any], count: int
    ) -> tuple[list[Any], list[Any]]:
        leaves = [b if a is None else a for a, b in zip(floats, others, strict=True)]
        return outputs_and_slopes(function, leaves, inputs, count)

    run = jax.jit(given, static_argnums=3, donate_argnums=0, compiler_options=UNOPTIMISED)

    def pull(
        leaves: Sequence[Any], inputs: Sequence[Any], count: int
    ) -> tuple[list[Any], list[Any]]:
        # Only floats have a gradient of their own size, to be written in their place.
        floats: list[Any] = []
        others: list[Any] = []
        for leaf in leaves:
            is_float = jnp.issubdtype(leaf.dtype, jnp.inexact)
            floats.append(leaf if is_float else None)
            others.append(None if is_float else leaf)
        return run(floats, others, inputs, count)

    return pull


def _evaluate(jaxpr: Any, args: Sequence[Any], plain: bool = False) -> list[Any]:
    """What a jaxpr gives with every float widened."""

    def widened(_: int, eqn: Any, given: list[Any]) -> Sequence[Any]:
        return equation(eqn, given, plain)

    return interpret(jaxpr, map(wide, args), wide, widened)


def equation(eqn: Any, args: list[Any], plain: bool = False) -> Sequence[Any]:
    """The outputs of one equation with every float widened; `plain` as in `widen`."""
    name = eqn.primitive.name
    if name == "scan":
        return _scan(eqn, args, plain)
    if name == "while":
        loop = while_parts(eqn)
        of_test, of_body, carry = loop.operands(args)
        test = _function(loop.test, of_test, plain)
        body = _function(loop.body, of_body, plain)
        return lax.while_loop(lambda c: test(*c)[0], lambda c: tuple(body(*c)), tuple(carry))
    if name == "cond":
        ways = [_function(branch, [], plain) for branch in branches(eqn)]
        return lax.switch(args[0], ways, *args[1:])
    if (inner := called(eqn)) is not None:
        return _evaluate(inner, args, plain)
    # `reduce_precision` rounds to another dtype on purpose, as a cast does: widened away likewise.
    if name == "reduce_precision" or (name == "stop_gradient" and plain):
        return args
    if name == "bitcast_convert_type":  # the bits of the original dtype are what counts
        outs = bind(eqn, [lax.convert_element_type(args[0], eqn.invars[0].aval.dtype)])
    else:
        # A dtype among the parameters (`preferred_element_type`) would narrow the result again.
        changed = {key: _wide_param(value) for key, value in eqn.params.items()}
        if name in ("dot_general", "conv_general_dilated"):
            changed["precision"] = None  # else it may ask for products of bfloat16
        outs = bind(eqn, args, **changed)
    return [wide(out) for out in outs]


def _scan(eqn: Any, args: list[Any], plain: bool) -> Sequence[Any]:
    """The outputs of a scan with every float widened."""
    scan = scan_parts(eqn)
    fixed, carry, rows = scan.operands(args)
    body = _function(scan.body, fixed, plain)

    def step(carry: list[Any], rows: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = body(*carry, *rows)
        return outs[: scan.carried], outs[scan.carried :]

    carry, stacked = lax.scan(step, carry, rows, length=scan.length, reverse=scan.reverse)
    return [*carry, *stacked]


def _function(jaxpr: Any, fixed: Sequence[Any], plain: bool) -> Callable[..., list[Any]]:
    """A jaxpr as a function of its last arguments; the first ones are fixed."""
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
    # `widen` takes and gives closed jaxprs: what was open is opened again.
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
    except TypeError:  # a class that jax cannot read as a dtype: some other parameter
        return value
