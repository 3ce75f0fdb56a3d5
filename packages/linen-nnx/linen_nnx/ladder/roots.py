"""The two roots: parts of either framework put together in a Linen module, or in an nnx module.

A part that is written in the other framework goes through Flax's bridge. What the bridge leaves to
its user is done here, so that such a part acts as a part of the root's own framework would:

    bridge.to_linen   makes a new nnx module at each call: the counts of its streams go on from the
                      module of the call before, else a part called twice draws its masks twice
    bridge.ToNNX      applies the Linen module anew at each call: it gets one that stays bound, so
                      that counts, sown values and updates go on as below a Linen root
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
    """What `bridge.to_linen` takes for an nnx class: calls fill the form of a `Port`."""

    def __init__(self, port: Port, keys: Any) -> None:
        self.port, self.keys = port, keys
        self.model: nnx.Module | None = None
        """The module of the latest call."""

    def __call__(self) -> nnx.Module:
        before = counts(self.model) if self.model is not None else None
        self.model = self.port.fill(None, self.keys, counts=before)
        return self.model

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.port.kind, name)

    def to_linen(self) -> nn.Module:
        """The part as a Linen module."""
        return bridge.to_linen(self, skip_rng=True, metadata_fn=None)


class Bound:
    """What `bridge.ToNNX` takes for a Linen module: a child of a Linen root, bound at its first
    call and from then on the same."""

    def __init__(self, root: nn.Module, child: str | None, rngs: Any, mutable: Any) -> None:
        self.root, self.child, self.rngs, self.mutable = root, child, rngs, mutable
        self._bound: nn.Module | None = None

    def apply(self, variables: Any, *args: Any, method: Any = None, **kwargs: Any) -> Any:
        """As `Module.apply` with `mutable`: outputs and updates."""
        kwargs.pop("rngs"), kwargs.pop("mutable")  # those of the bridge
        if self._bound is None:
            if self.child is not None:
                variables = {name: {self.child: tree} for name, tree in variables.items()}
            self._bound = self.root.bind(variables, rngs=self.rngs, mutable=self.mutable)
        module = self._bound if self.child is None else getattr(self._bound, self.child)
        outputs = linen_method(module, method)(*args, **kwargs)
        scope: Any = self._bound.scope
        updates = scope.mutable_variables()
        if self.child is not None:
            mine = {name: tree.get(self.child) for name, tree in updates.items()}
            updates = {name: tree for name, tree in mine.items() if tree is not None}
        return outputs, updates


class LinenPart(bridge.ToNNX):
    """A Linen part of an nnx root."""

    def __init__(self, bound: Any, kind: type, variables: Mapping[str, Any]) -> None:
        super().__init__(bound)
        self.to_nnx__kind = kind
        for name, tree in _attributes(variables).items():
            setattr(self, name, nnx.data(tree))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Any filter but False makes the bridge take the updates; the bound module has its own.
        return super().__call__(*args, mutable=[], **kwargs)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith(("_", "to_nnx__")):
            method = getattr(self.to_nnx__kind, name, None)
            if callable(method):
                return partial(self.__call__, method=method)
        return super().__getattribute__(name)


def linen_method(module: nn.Module, method: Any) -> Callable[..., Any]:
    """A method of a bound Linen module, given as `apply` takes it: None, a name or a function."""
    if method is None:
        return module
    return getattr(module, method) if isinstance(method, str) else partial(method, module)


def _attributes(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Linen variables as `bridge.ToNNX` keeps them: nested by path, of the collection's type."""
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
