"""An nnx module as a form to be filled: its structure, the leaves that it needs, and its streams.

The constructor runs once, abstractly. Then each call fills the form with the variables, and with
keys for the streams. Between calls the caller keeps a plain tree of arrays:

    >>> class Net(nnx.Module):
    ...     def __init__(self, rngs):
    ...         self.up = nnx.Linear(2, 3, use_bias=False, rngs=rngs)
    ...         self.drop = nnx.Dropout(0.5, rngs=rngs)
    ...     def __call__(self, x):
    ...         return self.drop(self.up(x))
    >>> port = Port(Net)
    >>> port.leaves
    {'up/kernel': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}
    >>> port.streams
    {'drop/rngs': ()}
    >>> model = port.fill({"up/kernel": jnp.ones((2, 3))}, {"drop/rngs": jax.random.key(0)})
    >>> model(jnp.ones((1, 2))).shape
    (1, 3)
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from linen_nnx.infer.keys import adopt, aside, set_mode, typed
from linen_nnx.infer.trace import joined
from linen_nnx.infer.twin import TwinError, attempt

Leaves = dict[str, Any]


class Port:
    """The structure of one nnx module.

    Attributes:
      kind: the class of the module.
      leaves: `{path: jax.ShapeDtypeStruct}` of its Variables, random state left out.
      types: `{path: name of the Variable's type}`, which the bridge takes for the collection.
      streams: `{path: lanes}` of its streams; lanes are `()` save where layers are stacked.
      keys: `{path: keys}` of its Variables; of lists the keys are integers.
    """

    def __init__(self, create: Callable[[nnx.Rngs], nnx.Module], name: str = "") -> None:
        """Builds the module abstractly.

        Args:
          create: `(rngs) -> module`.
          name: the name of the part, if it is one of several.

        Raises:
          TwinError: when the module cannot be built.
        """
        model = attempt("nnx(rngs)", _abstract, create)
        # Before it is split, so that every module that is filled has these streams.
        adopt(model, name)
        self.kind = type(model)
        self._structures: dict[tuple[str, tuple[str, ...]], Any] = {}
        for mode in ("tag", "plain"):
            set_mode(model, mode)
            self._structures[mode, ()], state = nnx.split(model)
        self._flat = nnx.to_flat_state(state)
        self._constants = _constants(create, self._flat)
        self.leaves: Leaves = {}
        self.types: dict[str, str] = {}
        self.streams: dict[str, tuple[int, ...]] = {}
        self.keys: dict[str, tuple[Any, ...]] = {}
        for path, leaf in self._flat:
            name = joined(path)
            if isinstance(leaf, nnx.RngKey):
                self.streams[joined(path[:-1])] = tuple(leaf.shape)
            # Counts are no leaves, as Linen keeps none: they would have no home on the way back.
            elif isinstance(leaf, nnx.Variable) and not isinstance(leaf, nnx.RngState):
                self.leaves[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
                self.types[name] = type_name(leaf)
                self.keys[name] = path

    def fill(
        self,
        leaves: Mapping[str, Any] | None,
        keys: Mapping[str, Array],
        mode: str = "plain",
        counts: Mapping[str, Array] | None = None,
    ) -> nnx.Module:
        """A module of this structure.

        Args:
          leaves: `{path: array}` for each Variable; None leaves them abstract, to be filled later.
          keys: `{stream: typed keys}`, of the shape `lanes` or, as given keys, `(*lanes, draws)`.
            To draw from a stream that has none raises `Undrawn`.
          mode: `plain`, or `tag`, see `keys.Stream`.
          counts: `{stream: count}` of streams that have been drawn from before.
        """
        state: list[tuple[Any, Any]] = []
        for path, leaf in self._flat:
            stream = joined(path[:-1])
            if isinstance(leaf, nnx.RngKey):
                # A stream without keys is muted, and needs one of the right shape all the same:
                # `nnx.scan` takes it apart whether it is drawn from or not.
                key = keys.get(stream)
                leaf = leaf.replace(_placeholder(leaf.shape) if key is None else typed(key))
            elif isinstance(leaf, nnx.RngCount):
                # Each call counts from 0, as Linen does; a part that is called twice in it counts
                # on.
                count = (counts or {}).get(stream)
                leaf = leaf.replace(jnp.zeros(leaf.shape, leaf.dtype) if count is None else count)
            elif not isinstance(leaf, nnx.Variable):
                leaf = self._constants[joined(path)]
            elif leaves is not None:
                leaf = leaf.replace(leaves[joined(path)])
            state.append((path, leaf))
        muted = tuple([stream for stream in self.streams if stream not in keys])
        # A copy, so that the call does not update the Variables of the form itself.
        return nnx.merge(self._structure(mode, muted), nnx.from_flat_state(state), copy=True)

    def _structure(self, mode: str, muted: tuple[str, ...]) -> Any:
        """The graphdef of a mode, with some streams muted.

        Each is kept, as making one puts the whole module together.
        """
        if (mode, muted) not in self._structures:
            whole = self._structures[mode, ()]
            model = nnx.merge(whole, nnx.from_flat_state(self._flat), copy=True)
            set_mode(model, "mute", muted)
            self._structures[mode, muted] = nnx.graphdef(model)
        return self._structures[mode, muted]


def values(model: nnx.Module) -> tuple[Leaves, dict[str, str]]:
    """The Variables of a module that has run, by path, and the names of their types."""
    leaves: Leaves = {}
    types: dict[str, str] = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Not(nnx.RngState))):
        if isinstance(leaf, nnx.Variable):
            leaves[joined(path)] = leaf.get_value()
            types[joined(path)] = type_name(leaf)
    return leaves, types


def counts(model: nnx.Module) -> dict[str, Array]:
    """`{stream: count}`: how often each stream of a module has been drawn from."""
    state = nnx.to_flat_state(nnx.state(model, nnx.RngCount))
    return {joined(path[:-1]): leaf.get_value() for path, leaf in state}


def type_name(leaf: Any) -> str:
    """The name that the bridge gives to the type of a Variable.

    Raises:
      TwinError: for a name that another type has.

    Example:
      >>> type_name(nnx.BatchStat(jnp.zeros(3)))
      'batch_stats'
    """
    try:
        return nnx.variable_name_from_type(type(leaf), allow_register=True)
    except ValueError:
        raise TwinError(
            f"two types of Variables are called {type(leaf).__name__}, which is the name of their "
            "collection in Linen: rename one, or register it by another name "
            "(nnx.register_variable_name)"
        ) from None


def _abstract(create: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    # Any seed will do: the streams get other keys before anything is drawn from them.
    return nnx.eval_shape(lambda: create(nnx.Rngs(0)))


def _constants(create: Callable[[nnx.Rngs], nnx.Module], flat: Any) -> Leaves:
    """The arrays of a module that are no Variables (a mask, a table): they are part of its code."""
    names = [joined(path) for path, leaf in flat if not isinstance(leaf, nnx.Variable)]
    # Most modules have none; then the constructor, which draws all parameters, need not run.
    if not names:
        return {}

    def build() -> Leaves:
        state = nnx.to_flat_state(nnx.state(create(nnx.Rngs(0))))
        return {joined(path): leaf for path, leaf in state if joined(path) in names}

    # Compiled, so that XLA drops the parameters, which may be larger than memory.
    return aside(jax.jit(build))


def _placeholder(shape: tuple[int, ...]) -> Array:
    return jnp.broadcast_to(jax.random.key(0), shape)
