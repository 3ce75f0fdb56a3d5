"""Finds the arrays among a call's arguments and among its results.

A traced function takes and returns arrays alone. A call may take a mode or a length beside them,
and return them in a dict or a dataclass.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from linen_nnx.infer.twin import Twin, TwinError, attempt

Rebuild = Callable[[tuple[jax.Array, ...]], tuple[Any, ...]]


def arrays_of_inputs(twin: Twin) -> tuple[tuple[jax.Array, ...], Rebuild]:
    """The arrays among a twin's inputs, and the function that puts arrays back among the rest.

    Raises:
      TwinError: when the inputs cannot be made, or are no tuple.

    Example:
        >>> twin = Twin(linen=None, nnx=None, inputs=lambda: (jnp.ones(2), "mean"))
        >>> arrays, rebuild = arrays_of_inputs(twin)
        >>> len(arrays), rebuild(("another array",))
        (1, ('another array', 'mean'))
    """
    inputs = attempt("inputs() of the twin", twin.inputs)
    if not isinstance(inputs, tuple):
        raise TwinError(
            f"inputs() must return the tuple of a call's arguments, got a {type(inputs).__name__}; "
            "write `inputs=lambda: (x,)`, with the comma"
        )
    # Plain values (a mode, a length) are part of the function: only arrays are its arguments.
    leaves, structure = jax.tree.flatten(inputs)
    places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

    def rebuild(arrays: tuple[jax.Array, ...]) -> tuple[Any, ...]:
        whole = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            whole[place] = array
        return structure.unflatten(whole)

    return tuple(jnp.asarray(leaves[place]) for place in places), rebuild


def arrays_of_outputs(out: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the arrays in what a call returns, each with its place.

    In plain dataclasses and mappings, too, which are no pytrees (the `ModelOutput`s of old).

    Example:
        >>> out = {"logits": np.zeros(2), "hidden": (np.zeros(3), np.zeros(4))}
        >>> [name for name, _ in arrays_of_outputs(out)]
        ['hidden/0', 'hidden/1', 'logits']
    """
    for at, leaf in jax.tree_util.tree_flatten_with_path(out)[0]:
        name = jax.tree_util.keystr(at, simple=True, separator="/")
        here = _below(place, name)
        # To jax an object of a class that it does not know is one leaf, whatever is in it.
        inner: Mapping[Any, Any] = {}
        if hasattr(leaf, "dtype"):
            yield here, leaf
        elif is_dataclass(leaf):
            inner = {each.name: getattr(leaf, each.name) for each in fields(leaf)}
        elif isinstance(leaf, Mapping):
            inner = leaf
        for key, value in inner.items():
            yield from arrays_of_outputs(value, _below(here, str(key)))


def flat_outputs(out: Any) -> list[Any]:
    """The arrays in what a call returns, without their places."""
    return [array for _, array in arrays_of_outputs(out)]


def _below(place: str, name: str) -> str:
    """A name below a place, either of which may be empty."""
    return f"{place}/{name}" if place and name else place or name
