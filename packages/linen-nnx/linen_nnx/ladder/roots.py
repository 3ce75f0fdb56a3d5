"""The two roots: parts of either framework put together in a Linen module, or in an nnx module.

A part that is written in the other framework goes through Flax's bridge. Two things that the bridge
leaves to its user are done here, so that such a part acts as one of the root's own framework would:

    bridge.to_linen   makes a new nnx module at each call. The counts of its streams go on from the
                      module of the call before; else a part that is called twice draws one mask
                      twice.
    bridge.ToNNX      applies the Linen module anew at each call. Here it gets one that stays bound,
                      so that counts, sown values and updates go on as below a Linen root.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
from flax import nnx
from flax.nnx import bridge

from linen_nnx.ladder.port import Port, counts

Entry = Callable[..., Any]
"""A function of the parts and of a call's arguments: `forward`, or one of `methods`."""


class LinenRoot(nn.Module):
    """A Linen module with some submodules by name; it runs through `method=` alone."""

    make: Callable[[], Mapping[str, nn.Module]]

    def setup(self) -> None:
        for name, module in self.make().items():
            setattr(self, name, module)


class NnxRoot(nnx.Module):
    """An nnx module with some submodules by name."""

    def __init__(self, parts: Mapping[str, nnx.Module]) -> None:
        for name, module in parts.items():
            setattr(self, name, module)


class Bridged:
    """Stands for an nnx class in `bridge.to_linen`: to call it fills the form of a `Port`.

    It is an object and no function, as the bridge looks up the methods of the class on it.
    """

    def __init__(self, port: Port, keys: Any) -> None:
        self.port, self.keys = port, keys
        self.model: nnx.Module | None = None
        """The module of the latest call."""

    def __call__(self) -> nnx.Module:
        # From the call before, in the same call of the root: a part may be called twice.
        before = counts(self.model) if self.model is not None else None
        self.model = self.port.fill(None, self.keys, counts=before)
        return self.model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copy and pickle ask of any object
            raise AttributeError(name)
        return getattr(self.port.kind, name)

    def to_linen(self) -> nn.Module:
        """The part as a Linen module."""
        return bridge.to_linen(self, skip_rng=True, metadata_fn=None)


class Bound:
    """Stands for a Linen module in `bridge.ToNNX`.

    It is a child of a Linen root, or the root itself (`child` None). It is bound at its first call
    and stays so.
    """

    def __init__(self, root: nn.Module, child: str | None, rngs: Any, mutable: Any) -> None:
        self.root, self.child, self.rngs, self.mutable = root, child, rngs, mutable
        self._bound: nn.Module | None = None

    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `Module.apply` with `mutable`: outputs and updates."""
        # The bridge has its own; the ladder's were given to the constructor.
        del kwargs["rngs"], kwargs["mutable"]
        if self._bound is None:
            # Below the name that the part has in a Linen root, from which Linen derives its keys.
            if self.child is not None:
                variables = {name: {self.child: tree} for name, tree in variables.items()}
            self._bound = self.root.bind(variables, rngs=self.rngs, mutable=self.mutable)
        module = self._bound if self.child is None else getattr(self._bound, self.child)
        outputs = linen_method(module, method)(*args, **kwargs)
        scope: Any = self._bound.scope
        updates = scope.mutable_variables()
        if self.child is None:
            return outputs, updates
        mine: dict[str, Any] = {}
        for name, tree in updates.items():
            if tree.get(self.child) is not None:
                mine[name] = tree[self.child]
        return outputs, mine


class LinenPart(bridge.ToNNX):
    """A Linen part of an nnx root."""

    def __init__(self, bound: Any, kind: type, variables: Mapping[str, Any]) -> None:
        super().__init__(bound)
        self.to_nnx__kind = kind
        for name, tree in _attributes(variables).items():
            setattr(self, name, nnx.data(tree))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Any filter but False makes the bridge take the updates; the bound module has the real one.
        return super().__call__(*args, mutable=[], **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Names with an underscore are nnx's own; `to_nnx__` are the bridge's.
        if not name.startswith(("_", "to_nnx__")):
            method = getattr(self.to_nnx__kind, name, None)
            if callable(method):
                return partial(self.__call__, method=method)
        return super().__getattribute__(name)


def linen_method(module: nn.Module, method: Any) -> Callable[..., Any]:
    """A method of a bound Linen module; `method` as `Module.apply` takes it."""
    if method is None:
        return module
    return getattr(module, method) if isinstance(method, str) else partial(method, module)


def _attributes(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Linen variables as `bridge.ToNNX` keeps them: nested by path, of the collection's type.

    Example:
      >>> kept = _attributes({"params": {"up": {"kernel": 1.0}}})
      >>> type(kept["up"]["kernel"]).__name__
      'Param'
    """
    result: dict[str, Any] = {}

    def put(node: dict[str, Any], tree: Mapping[str, Any], kind: Any) -> None:
        for name, value in tree.items():
            if isinstance(value, Mapping):
                put(node.setdefault(name, {}), value, kind)
            else:
                node[name] = kind(value)

    for collection, tree in variables.items():
        put(result, tree, nnx.variable_type_from_name(collection, allow_register=True))
    return result
