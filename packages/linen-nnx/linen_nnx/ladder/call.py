"""One call of a model as data: which arguments are arrays, and which make it the kind that it is.

Which draws a model makes depends on the kind of call and not on the numbers in it. So draws are
paired once for each kind. `apply(variables, x, train=True)` and `apply(variables, x, True)` are of
one kind, whatever `x` is; `train=False` makes another, in which other keys are drawn or none:

    >>> def method(self, x, train=False): ...
    >>> Call(args=(np.ones(3), True)).kind(method).kind
    '__call__(train=True)'
    >>> Call(args=(np.zeros(5),)).kind(method).kind
    '__call__(train=False)'
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from linen_nnx.book.draws import Pairing
from linen_nnx.infer.run import with_noise

_PLAIN = (bool, int, float, str, type(None))  # values that a rule book can hold


@dataclass(frozen=True)
class Call:
    """The arguments of one `apply`.

    Attributes:
      method: as `Module.apply` takes it: None, a name, or a function of the module.
      args: positional arguments of the method; `kwargs`: its named ones.
      rngs: `{stream: key}`.
      mutable: the filter of collections.
    """

    method: Any = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    rngs: dict[str, Any] = field(default_factory=dict)
    mutable: Any = False

    @property
    def name(self) -> str:
        """The name of the method."""
        if self.method is None:
            return "__call__"
        return self.method if isinstance(self.method, str) else self.method.__name__

    @property
    def arrays(self) -> list[Any]:
        """The arrays among the arguments."""
        return [leaf for leaf in jax.tree.leaves((self.args, self.kwargs)) if is_array(leaf)]

    def joined(self, arrays: list[Any], rngs: dict[str, Any]) -> "Call":
        """The call with other arrays, in the order of `arrays`, and other keys."""
        rest = iter(arrays)

        def other(leaf: Any) -> Any:
            return next(rest) if is_array(leaf) else leaf

        args, kwargs = jax.tree.map(other, (self.args, self.kwargs))
        return Call(self.method, args, kwargs, rngs, self.mutable)

    def signature(self) -> tuple[Any, ...]:
        """A hashable summary: equal calls are traced alike."""
        leaves, structure = jax.tree.flatten((self.args, self.kwargs, dict(self.rngs)))
        summary: list[Any] = []
        for leaf in leaves:
            summary.append((leaf.shape, str(leaf.dtype)) if is_array(leaf) else repr(leaf))
        # The keys' dtypes are among them: raw keys and typed ones lead to other equations.
        return self.name, structure, tuple(summary), repr(self.mutable)

    def kind(self, function: Callable[..., Any]) -> Pairing:
        """The kind of call, as a pairing without pairs; `function` is the method."""
        given: dict[str, Any] = {}
        for name, value in _arguments(function, self.args, self.kwargs).items():
            # For jax None is a tree without leaves; here it is a value like any other.
            leaves = jax.tree_util.tree_leaves_with_path(value, is_leaf=lambda x: x is None)
            for path, leaf in leaves:
                if is_array(leaf):
                    continue
                inner = jax.tree_util.keystr(path, simple=True, separator="/")
                full = f"{name}/{inner}" if inner else name
                given[full] = leaf if isinstance(leaf, _PLAIN) else repr(leaf)
        return Pairing(self.name, given)

    def example(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> "Call":
        """A call of this kind with concrete arrays.

        Args:
          function: the method.
          inputs: the twin's own example. Its arrays are taken where they fit the call: they hold
            numbers that the model is made for, such as token ids, and are mostly small. Where they
            do not fit, floats are drawn from a normal distribution, and integers are 0 or 1.
        """
        known = _arguments(function, inputs, {})
        mine = _arguments(function, self.args, self.kwargs)
        fits = all(_fits(value, known.get(name)) for name, value in mine.items())
        random = np.random.default_rng(0)

        def concrete(leaf: Any, own: Any) -> Any:
            if not is_array(leaf):
                return leaf
            # An example of all ones hides which elements a mask keeps: it gets noise.
            return with_noise(own, 0) if fits else _random(leaf, random)

        made: dict[str, Any] = {}
        for name, value in mine.items():
            from_example = fits and name in known and jax.tree.leaves(value)
            made[name] = jax.tree.map(concrete, value, known[name] if from_example else value)
        bound = inspect.signature(function).bind(None, *self.args, **self.kwargs)
        for name in bound.arguments:
            if name in made:
                bound.arguments[name] = made[name]
        return Call(self.method, bound.args[1:], bound.kwargs, self.rngs, self.mutable)


def is_array(leaf: Any) -> bool:
    """Whether a value is an array, a tracer or a shape; Python's own numbers are not."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments by name, with defaults, without the module.

    Where they do not fit the function, those without a name get their number for one.
    """
    try:
        bound = inspect.signature(function).bind(None, *args, **kwargs)
    except (TypeError, ValueError):  # the model will say what is wrong, when it is called
        return {**{str(k): value for k, value in enumerate(args)}, **kwargs}
    bound.apply_defaults()
    named = list(bound.arguments.items())
    return dict(named[1:])


def _fits(value: Any, own: Any) -> bool:
    """Whether each array of `value` has one of its type and rank at its place in `own`."""
    leaves = jax.tree.leaves(value)
    if not any(map(is_array, leaves)):
        return True
    if jax.tree.structure(value) != jax.tree.structure(own):
        return False
    for leaf, mine in zip(leaves, jax.tree.leaves(own), strict=True):
        if not is_array(leaf):
            continue
        # Not the shape: a batch of another size is a call of the same kind.
        if not is_array(mine) or (leaf.ndim, leaf.dtype) != (np.ndim(mine), mine.dtype):
            return False
    return True


def _random(leaf: Any, random: np.random.Generator) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(7), leaf.shape)
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return random.normal(size=leaf.shape).astype(leaf.dtype)
    return random.integers(0, 2, leaf.shape).astype(leaf.dtype)
