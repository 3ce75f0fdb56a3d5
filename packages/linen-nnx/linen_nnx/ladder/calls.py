"""One call of a model as data: what is an array in it, and what makes it the kind of call it is.

`apply(variables, x, train=True)` and `apply(variables, x, True)` are calls of one kind, whatever
`x` is; `train=False` makes another, in which other keys are drawn or none.
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

_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Call:
    """The arguments of one `apply`.

    Attributes:
      method: as `Module.apply` takes it: None, a name, or a function of the module.
      args, kwargs: those of the method.
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
        """The call with other arrays and keys."""
        rest = iter(arrays)

        def other(leaf: Any) -> Any:
            return next(rest) if is_array(leaf) else leaf

        args, kwargs = jax.tree.map(other, (self.args, self.kwargs))
        return Call(self.method, args, kwargs, rngs, self.mutable)

    def signature(self) -> tuple[Any, ...]:
        """A hashable summary: equal calls are traced alike."""
        leaves, structure = jax.tree.flatten((self.args, self.kwargs, dict(self.rngs)))
        summary = (
            (leaf.shape, str(leaf.dtype)) if is_array(leaf) else repr(leaf) for leaf in leaves
        )
        return self.name, structure, tuple(summary), repr(self.mutable)

    def kind(self, function: Callable[..., Any]) -> Pairing:
        """The kind of call, as an entry of `draws:` without draws; `function` is the method."""
        given: dict[str, Any] = {}
        for name, value in _arguments(function, self.args, self.kwargs).items():
            leaves = jax.tree_util.tree_leaves_with_path(value, is_leaf=lambda x: x is None)
            for path, leaf in leaves:
                if not is_array(leaf):
                    inner = jax.tree_util.keystr(path, simple=True, separator="/")
                    plain = leaf if isinstance(leaf, _PLAIN) else repr(leaf)
                    given["/".join(filter(None, [name, inner]))] = plain
        return Pairing(self.name, given)

    def example(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> "Call":
        """A call of this kind with concrete arrays: those of `inputs` where they fit.

        They are the twin's own example, with numbers that the model is made for (token ids, say),
        and mostly small. Other arrays get random numbers; integers 0 and 1.
        """
        known = _arguments(function, inputs, {})
        mine = _arguments(function, self.args, self.kwargs)
        fits = all(_fits(value, known.get(name)) for name, value in mine.items())
        random = np.random.default_rng(0)

        def array(leaf: Any, own: Any) -> Any:
            if not is_array(leaf):
                return leaf
            return with_noise(own, 0) if fits else _random(leaf, random)

        def concrete(name: str, value: Any) -> Any:
            own = known[name] if fits and name in known and jax.tree.leaves(value) else value
            return jax.tree.map(array, value, own)

        made = {name: concrete(name, value) for name, value in mine.items()}
        bound = inspect.signature(function).bind(None, *self.args, **self.kwargs)
        bound.arguments.update({name: made[name] for name in bound.arguments if name in made})
        return Call(self.method, bound.args[1:], bound.kwargs, self.rngs, self.mutable)


def is_array(leaf: Any) -> bool:
    """Whether a value is an array, a tracer or stands for one; Python's own numbers are not."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def _arguments(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """The arguments by name, with defaults, without the module; by place if they do not bind."""
    try:
        bound = inspect.signature(function).bind(None, *args, **kwargs)
    except (TypeError, ValueError):
        return {**{str(k): value for k, value in enumerate(args)}, **kwargs}
    bound.apply_defaults()
    return dict(list(bound.arguments.items())[1:])


def _fits(value: Any, own: Any) -> bool:
    """Whether each array of `value` has one of its type and rank at its place in `own`."""
    arrays = [leaf for leaf in jax.tree.leaves(value) if is_array(leaf)]
    if not arrays:
        return True
    if jax.tree.structure(value) != jax.tree.structure(own):
        return False
    pairs = zip(jax.tree.leaves(value), jax.tree.leaves(own), strict=True)
    return all(
        not is_array(a) or (is_array(b) and (a.ndim, a.dtype) == (np.ndim(b), b.dtype))
        for a, b in pairs
    )


def _random(leaf: Any, random: np.random.Generator) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(7), leaf.shape)
    if jnp.issubdtype(leaf.dtype, jnp.inexact):
        return random.normal(size=leaf.shape).astype(leaf.dtype)
    return random.integers(0, 2, leaf.shape).astype(leaf.dtype)
