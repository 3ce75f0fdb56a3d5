"""How Linen and nnx modules come by their random keys, watched and replaced.

Everything here leans on names of Flax or jax that are public by their spelling alone, or on how
they act. Each has a row in `make parity`, which fails when an installed version differs.
"""

from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from threading import Thread
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from flax.core.scope import in_filter
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from linen_nnx.errors import Refusal

Value = TypeVar("Value")
_TAG = "linen_nnx.draw:"
# A part of the key of every cache of traces. `nn.jit` and `nnx.jit` keep what they traced: without
# a value of its own, a probe would find the trace of an earlier plain call and see no draw in it,
# and a later plain call would find the probe's.
_PROBE = jax.make_user_context(None)


class DrawError(Refusal):
    """Random keys that cannot be given as Linen would give them; the message says which and why."""


class Undrawn(Exception):
    """A stream was drawn from of which nothing is known yet."""


def tag(key: Array, name: str) -> Array:
    """The key, recorded under a name in any jaxpr that it is traced into."""
    return checkpoint_name(key, _TAG + name)


def tag_of(eqn: Any) -> str | None:
    """The name that `tag` gave to an equation of a jaxpr, if it is one of `tag`."""
    if eqn.primitive.name != "name":
        return None
    # A model may name values for its own purposes, too (for `jax.checkpoint`).
    name = eqn.params.get("name")
    if isinstance(name, str) and name.startswith(_TAG):
        return name.removeprefix(_TAG)
    return None


@contextmanager
def watching(swap: Callable[[str, Array], Array]) -> Iterator[None]:
    """A context inside which each key that a Linen module draws is replaced.

    What is drawn instead is `swap("stream/path", key)`, say for "dropout/block_0/Dropout_0".

    Flax has an interceptor of methods, but `make_rng` does not pass through it; so the interceptor
    gives each module that is entered a `make_rng` of its own. Key and stream are those that Linen
    found: under `nn.scan`, say, `key` is a tracer of the loop's body.
    """
    touched: list[nn.Module] = []

    def enter(call_next: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if "make_rng" not in vars(module):
            original = module.make_rng

            def make_rng(name: str = "params") -> Array:
                return swap("/".join([name, *module.scope.path]), original(name))

            # Past the module's own `__setattr__`: a Linen module is frozen once it is set up.
            object.__setattr__(module, "make_rng", make_rng)
            touched.append(module)
        return call_next(*args, **kwargs)

    try:
        with _PROBE(object()), nn.intercept_methods(enter):
            yield
    finally:
        for module in touched:
            vars(module).pop("make_rng", None)


class Stream(nnx.RngStream):
    """A stream that may have been given its keys.

    Plain, its `key` and its `count` have one shape, `lanes` (empty but for stacked layers), and it
    draws as nnx does. Given keys, `key` is `(*lanes, draws)`, and draw number n is `key[..., n]`.
    Both are Variables of the types that nnx expects, so that `nnx.scan`, `nnx.remat` and the like
    split, carry and merge them as ever.
    """

    path = ""
    mode = "plain"
    """`tag`: keys are tagged with the path. `mute`: to draw is to raise `Undrawn`. `same`: each
    draw gives the stream's own key, without counting."""

    def __call__(self) -> Array:
        if self.mode == "mute":
            raise Undrawn(self.path)
        if self.mode == "same":
            return self.key[...]
        # A plain stream has a key a lane, a stream that was given keys one a draw.
        if self.key.ndim == self.count.ndim:
            key = super().__call__()
        else:
            number = self.count[...]
            self.count[...] = number + 1
            key = self.key[...][number]
        return tag(key, self.path) if self.mode == "tag" else key


def adopt(model: nnx.Module, part: str = "") -> None:
    """Makes each stream of a part a `Stream` that knows its path in the whole model.

    In place, as modules share streams and hold them in attributes, lists and `nnx.Rngs` alike.

    Args:
      model: the model of the part.
      part: the name of the part, which begins the paths; empty for a whole model.

    Example:
        >>> model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        >>> adopt(model, "head")
        >>> model.rngs.path
        'head/rngs'
    """
    for path, node in nnx.iter_graph(model):
        if type(node) is nnx.RngStream:
            object.__setattr__(node, "__class__", Stream)
            whole = [part, *path] if part else path
            vars(node)["path"] = "/".join(map(str, whole))


def set_mode(model: nnx.Module, mode: str, streams: Collection[str] | None = None) -> None:
    """Sets the `mode` of some streams of a model by their paths, or of all."""
    for path, node in nnx.iter_graph(model):
        if isinstance(node, Stream) and (streams is None or "/".join(map(str, path)) in streams):
            node.mode = mode


def probing() -> Any:
    """A context whose traces are kept apart.

    Inside, jax finds no trace that was made outside, and outside none that was made inside.
    """
    return _PROBE(object())


def aside(compute: Callable[[], Value]) -> Value:
    """What a function gives when it is called outside of any trace that is going on.

    In a thread of its own, as the state of tracing is a thread's. `jax.ensure_compile_time_eval`
    would do too, but runs each constant of the inner traces by itself: 49 s instead of 5.
    """
    outcome: Future[Value] = Future()

    def run() -> None:
        try:
            outcome.set_result(compute())
        except BaseException as error:  # raised again by `result`, in the thread that asked
            outcome.set_exception(error)

    # A daemon, which no executor's threads are: Ctrl-C need not wait for a compilation to end.
    Thread(target=run, daemon=True).start()
    return outcome.result()


def typed(key: Array) -> Array:
    """A typed key of a typed or a raw one; nnx streams hold no others."""
    is_typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key if is_typed else jax.random.wrap_key_data(key)


def is_mutable(collection: str, mutable: Any) -> bool:
    """Whether Linen's filter `mutable` (bool, name, names or DenyList) takes in a collection."""
    return in_filter(mutable, collection)
