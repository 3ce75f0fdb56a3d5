"""What the ladder relies on that no documentation of Flax or jax promises, each seen anew.

All of it is used in `linen_nnx/infer/keys.py` and `linen_nnx/ladder/roots.py`. A row that fails
says what breaks.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import Array

from benchmarks.gaps import Gap
from linen_nnx.infer.keys import is_mutable, probing, tag, tag_of, watching
from linen_nnx.ladder.port import Port
from linen_nnx.ladder.roots import Bound, LinenPart

X = jnp.ones((3, 4))


class _Noisy(nn.Module):
    @nn.compact
    def __call__(self, x: Array) -> Array:
        seen = self.variable("seen", "calls", lambda: jnp.zeros(()))
        if not self.is_initializing():
            seen.value += 1
        return nn.Dropout(0.5, deterministic=False)(x)


def _keys(module: nn.Module, rngs: dict[str, Array]) -> list[str]:
    """The draws that `watching` sees in a call."""
    found: list[str] = []

    def note(name: str, key: Array) -> Array:
        found.append(name)
        return key

    variables = module.init(jax.random.key(0), X)
    module.apply(variables, X, rngs=rngs, mutable=True)  # an earlier plain call
    with watching(note):
        module.apply(variables, X, rngs=rngs, mutable=True)
    return found


def _make_rng() -> str:
    found = _keys(_Noisy(), {"dropout": jax.random.key(0)})
    return f"seen: {', '.join(found)}" if found == ["dropout/Dropout_0"] else ""


def _user_context() -> str:
    found = _keys(nn.jit(_Noisy)(), {"dropout": jax.random.key(0)})
    return "a module under nn.jit is traced anew" if len(found) == 1 else ""


def _tag() -> str:
    jaxpr = jax.make_jaxpr(lambda key: tag(key, "a/b"))(jax.random.key(0))
    names = [tag_of(eqn) for eqn in jaxpr.eqns]
    return "the tag is found by its name" if "a/b" in names else ""


class _Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.drop(x)


class _Stack(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layers = nnx.split_rngs(splits=2)(nnx.vmap(_Layer))(rngs)

    def __call__(self, x: Array) -> Array:
        run = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return run(x, self.layers)


def _stream() -> str:
    port = Port(_Stack)
    keys = jax.random.split(jax.random.key(1), (2, 1))
    model: Any = port.fill({}, {"layers/drop/rngs": keys})
    due = X
    for key in keys[:, 0]:
        due = nnx.Dropout(0.5)(due, rngs=key)
    return "nnx.scan hands each layer its given key" if (model(X) == due).all() else ""


def _bound() -> str:
    module = _Noisy()
    variables = module.init(jax.random.key(0), X)
    rngs = {"dropout": jax.random.key(1)}
    bound = Bound(module, None, rngs, ["seen"])
    part = LinenPart(bound, _Noisy, variables)
    first, second = part(X), part(X)
    counted = part.calls.get_value() == 2  # type: ignore[attr-defined]
    alone = module.apply(variables, X, rngs=rngs, mutable=["seen"])[0]
    fits = counted and (first == alone).all() and not (first == second).all()
    return "two calls count on in one scope" if fits else ""


def _filter() -> str:
    filters = (True, "a", ["a"], nn.DenyList("b"))
    right = all(is_mutable("a", one) for one in filters) and not is_mutable("a", False)
    return "five filters act as Module.apply has them" if right else ""


def _trace_context() -> str:
    traces: list[int] = []
    count = jax.jit(lambda: traces.append(0))
    count()
    with probing():
        count()
    count()
    return "a probe is traced apart, and leaves the old trace in place" if len(traces) == 2 else ""


PRIVATE: tuple[Gap, ...] = tuple(
    Gap(name, probe, meaning, breaks=breaks)
    for name, probe, meaning, breaks in (
        (
            "a module's make_rng can be its instance's own",
            _make_rng,
            "the ladder sees each key that a Linen module draws",
            "keys.watching sees no draw: dropout of ports would have streams of its own",
        ),
        (
            "checkpoint_name leaves an equation `name`",
            _tag,
            "the ladder finds the keys of a Linen model in its jaxpr",
            "keys.tag_of finds no draw",
        ),
        (
            "jax.make_user_context is part of a trace's key",
            _trace_context,
            "what the ladder traces is not taken for what the program traces",
            "keys.probing must find another way to trace anew",
        ),
        (
            "nn.jit traces anew in another user context",
            _user_context,
            "draws under nn.jit are seen after an earlier call",
            "keys.watching would miss draws under nn.jit",
        ),
        (
            "an nnx.RngStream can change its class",
            _stream,
            "streams of a port are given their keys",
            "keys.Stream is not called, or does not go through nnx.scan",
        ),
        (
            "bridge.ToNNX applies whatever has `apply`",
            _bound,
            "a Linen part of an nnx root keeps its scope between calls",
            "roots.Bound is not called as it expects, and a part called twice draws the same twice",
        ),
        (
            "flax.core.scope.in_filter",
            _filter,
            "`mutable` means the same at every stage",
            "keys.is_mutable needs another home",
        ),
    )
)
"""The rows, in the order of the files that rely on them."""
