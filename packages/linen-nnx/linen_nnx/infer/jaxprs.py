"""Reads jaxprs: all that depends on how the installed jax writes an equation down.

jax changes that from version to version, without notice: up to 0.10 a `scan` counts its operands
(`num_consts`, `num_carry`), from 0.12 on it has a tree of them (`ft_in`). So nothing else in this
library looks up a parameter of an equation. A parameter that is not there is a `TwinError` that
names the version of jax, never a `KeyError`.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import Literal

from linen_nnx.infer.twin import TwinError

# The primitives that do nothing but call a program, and the parameter that holds it. Some names are
# those of older versions of jax.
_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "core_closed_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "shard_map": "jaxpr",
}


def param(eqn: Any, name: str) -> Any:
    """A parameter of an equation.

    Raises:
      TwinError: where this version of jax does not write it.

    Example:
        >>> import jax.numpy as jnp
        >>> eqn = jax.make_jaxpr(lambda x: x.T)(jnp.ones((2, 3))).eqns[0]
        >>> param(eqn, "permutation")
        (1, 0)
    """
    if name not in eqn.params:
        known = ", ".join(f"`{key}`" for key in eqn.params) or "none"
        raise TwinError(
            f"jax {jax.__version__} writes `{eqn.primitive.name}` without the parameter `{name}` "
            f"(it has {known}): this version of linen_nnx cannot read it; use a version of jax "
            "that it was tested with (docs/library.md)"
        )
    return eqn.params[name]


# Parameters that say where and how exactly an equation is computed, not what.
_WORDS = (
    "accuracy indices_are_sorted mode name out_sharding precision preferred_element_type sharding "
    "unique_indices weak_type"
)
_MANNER = frozenset(_WORDS.split())


def described(eqn: Any) -> dict[str, str]:
    """What an equation computes beside its primitive's name: its parameters as text."""
    found: dict[str, str] = {}
    for key, value in eqn.params.items():
        is_program = hasattr(value, "eqns")  # its own equations are described one by one
        if key not in _MANNER and value is not None and not is_program:
            found[key] = str(value)
    return found


def interpret(
    jaxpr: Any,
    args: Iterable[Any],
    constant: Callable[[Any], Any],
    equation: Callable[[int, Any, list[Any]], Sequence[Any]],
) -> list[Any]:
    """What a jaxpr, open or closed, returns, whatever stands for the values in it.

    Arrays may stand for them (`float64.py`), or what is known of them (`dataflow.py`).

    Args:
      jaxpr: what to walk through, from the first equation to the last.
      args: what stands for its arguments.
      constant: makes of a constant's value what stands for it.
      equation: `(number, eqn, args)` to what stands for the outputs of one equation.

    Example:
        >>> import jax.numpy as jnp
        >>> jaxpr = jax.make_jaxpr(lambda x: jnp.sin(x) + 1.0)(1.0)
        >>> interpret(jaxpr, ["x"], str, lambda k, eqn, args: [f"{eqn.primitive}({args[0]})"])
        ['add(sin(x))']
    """
    consts, jaxpr = getattr(jaxpr, "consts", ()), getattr(jaxpr, "jaxpr", jaxpr)
    known = dict(zip(jaxpr.constvars, map(constant, consts), strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        if isinstance(atom, Literal):
            aval: Any = atom.aval
            return constant(np.asarray(atom.val, aval.dtype))
        return known[atom]

    for number, eqn in enumerate(jaxpr.eqns):
        outs = equation(number, eqn, [read(atom) for atom in eqn.invars])
        known.update(zip(eqn.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def some_outputs(jaxpr: Any, places: Sequence[int]) -> list[Any]:
    """Some outputs of a closed jaxpr without arguments; no equation is run that they do not need.

    One equation after the other, as they run outside of any program: so every bit is the same.
    """
    inner = jaxpr.jaxpr
    # Backwards: an equation is needed if a later one needs what it gives. By identity, as variables
    # of one jaxpr are one object each, and literals cannot be hashed.
    wanted = {id(inner.outvars[place]) for place in places}
    kept = set[int]()
    for number in reversed(range(len(inner.eqns))):
        eqn = inner.eqns[number]
        if wanted.isdisjoint(map(id, eqn.outvars)):
            continue
        kept.add(number)
        wanted.update(map(id, eqn.invars))

    def equation(number: int, eqn: Any, given: list[Any]) -> Sequence[Any]:
        return bind(eqn, given) if number in kept else [None] * len(eqn.outvars)

    outs = interpret(jaxpr, (), lambda value: value, equation)
    return [outs[place] for place in places]


def bind(eqn: Any, args: Sequence[Any], **changed: Any) -> list[Any]:
    """Runs one equation on values, with some of its parameters changed; its outputs."""
    outs = eqn.primitive.bind(*args, **{**eqn.params, **changed})
    return list(outs) if eqn.primitive.multiple_results else [outs]


def called(eqn: Any) -> Any:
    """The jaxpr that a jit, remat or custom derivative calls; None for other equations."""
    name = _CALLS.get(eqn.primitive.name)
    if name is None:
        return None
    # custom_vjp_call has had both names; either way it holds the function itself.
    for key in (name, "call_jaxpr", "fun_jaxpr"):
        if key in eqn.params:
            return param(eqn, key)
    return param(eqn, name)  # which raises: this jax has none of them


def holds(jaxpr: Any, name: str) -> bool:
    """Whether a primitive of that name stands anywhere in a jaxpr."""
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        if eqn.primitive.name == name:
            return True
        if any(holds(inner, name) for inner in inside(eqn)):
            return True
    return False


def inside(eqn: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    found: list[Any] = []
    # A scan has its body as it is, a cond its branches in a tuple.
    for value in eqn.params.values():
        several = value if type(value) in (tuple, list) else (value,)
        found += [each for each in several if hasattr(each, "eqns")]
    return found


class Scan(NamedTuple):
    """A scan: its body, and how many of its operands are fixed and how many are carried.

    The operands come in the order fixed, carried, one row a step; the results in the order
    carried, one row a step.
    """

    body: Any
    length: int
    reverse: bool
    fixed: int
    carried: int

    def operands(self, args: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """The operands that are fixed, carried, and given row by row."""
        rows = self.fixed + self.carried
        return args[: self.fixed], args[self.fixed : rows], args[rows:]

    def steps(self) -> Sequence[int]:
        """The numbers of the rows in the order in which they are taken."""
        rows = range(self.length)
        return rows[::-1] if self.reverse else rows


def scan_parts(eqn: Any) -> Scan:
    """The parts of a `scan` equation."""
    # jax 0.12 has the operands as a tree of three, 0.10 and older count them.
    if "ft_in" in eqn.params:
        fixed, carried, _ = map(len, param(eqn, "ft_in").unpack())
    else:
        fixed, carried = param(eqn, "num_consts"), param(eqn, "num_carry")
    body, length = param(eqn, "jaxpr"), param(eqn, "length")
    return Scan(body, length, param(eqn, "reverse"), fixed, carried)


class While(NamedTuple):
    """A while loop: its test and its body, and how many operands either has to itself.

    The operands come in the order test's, body's, carried.
    """

    test: Any
    body: Any
    of_test: int
    of_body: int

    def operands(self, args: list[Any]) -> tuple[list[Any], list[Any], list[Any]]:
        """The operands of the test alone, of the body alone, and the carried ones."""
        carried = self.of_test + self.of_body
        return args[: self.of_test], args[self.of_test : carried], args[carried:]


def while_parts(eqn: Any) -> While:
    """The parts of a `while` equation."""
    counts = param(eqn, "cond_nconsts"), param(eqn, "body_nconsts")
    return While(param(eqn, "cond_jaxpr"), param(eqn, "body_jaxpr"), *counts)


def branches(eqn: Any) -> Sequence[Any]:
    """The jaxprs of a `cond` equation; its first operand chooses, the others are theirs."""
    return param(eqn, "branches")
