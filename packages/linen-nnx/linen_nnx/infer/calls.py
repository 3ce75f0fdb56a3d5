"""How a twin's models are called where it does not say so: in evaluation, both of them.

Linen modules are told by an argument of the call (`train=False`, `deterministic=True`), nnx modules
start in train mode and are switched by `model.eval()`. A twin without `call_*` is called so:

    class Net(nn.Module):                        class Net(nnx.Module):
        def __call__(self, x, train): ...            def __call__(self, x): ...

    module.apply(variables, x, train=False)      model.eval()(x), on a copy of the model

A model may draw in evaluation, too (a latent sample, say). Then each draw of the Linen model is
given one key, and `trace.py` gives the same one to each draw of nnx: what they draw is alike.
"""

import dataclasses
import inspect
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.errors import InvalidRngError

from linen_nnx.infer.keys import watching
from linen_nnx.infer.twin import Twin

# The arguments that say to a model whether it trains, as public models call them, in evaluation.
EVALUATION = {
    "deterministic": True,
    "train": False,
    "training": False,
    "is_training": False,
    "is_train": False,
}
_SWITCHES = ("deterministic", "use_running_average")


def complete(twin: Twin, trains: bool = False) -> Twin:
    """The twin with all three calls; one that it leaves out becomes the usual one in evaluation.

    Args:
      twin: the twin, whose `call_linen`, `call_nnx` and `init_linen` may be None.
      trains: whether the twin's own Linen call trains: then nnx stays in train mode, too.

    Example:
        >>> from linen_nnx.infer.example import two_layers
        >>> complete(two_layers()).init_linen is None
        False
    """

    def init_linen(module: Any, key: Any, *inputs: Any) -> Any:
        return init(module, key, *inputs, **_flags(module, inputs))

    def call_nnx(model: Any, *inputs: Any) -> Any:
        if trains:
            return model(*inputs)
        if isinstance(model, nnx.Module):
            model.eval()
        return model(*inputs, **_flags(model, inputs))

    return dataclasses.replace(
        twin,
        call_linen=twin.call_linen or _LinenCall(),
        init_linen=twin.init_linen or init_linen,
        call_nnx=twin.call_nnx or call_nnx,
    )


def init(module: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
    """`Module.init` of a Linen module.

    A class may have an `init` of its own for its own script: `init(self, rng)`, say, which makes
    the tokens itself. Where that takes other arguments than these, it is passed by.
    """
    of_class = type(module).init
    try:
        inspect.signature(of_class).bind(module, rngs, *args, **kwargs)
    except TypeError:
        of_class = nn.Module.init
    return of_class(module, rngs, *args, **kwargs)


class _LinenCall:
    """The usual call of a Linen module.

    Attributes:
      draws: whether the module has drawn in it.
    """

    draws = False

    def __call__(self, module: Any, variables: Any, *inputs: Any) -> Any:
        flags, key = _flags(module, inputs), jax.random.key(0)
        # Without keys first, to see whether it draws.
        try:
            return module.apply(variables, *inputs, **flags)
        except InvalidRngError:
            self.draws = True
        with watching(lambda _, drawn: key):
            return module.apply(variables, *inputs, rngs=key, **flags)


def of_linen(twin: Twin, module: Any, inputs: tuple[Any, ...], draws: bool) -> tuple[str, ...]:
    """What was chosen for the Linen side, a sentence each; nothing where there was no choice.

    Args:
      draws: whether the model draws in its call.
    """
    if twin.call_linen:
        return ()
    flags, said = _flags(module, inputs), []
    if flags:
        said.append(f"Linen is called with {_text(flags)}, which the twin leaves open")
    if draws:
        said.append("Linen draws random numbers in this call: each draw of both sides has one key")
    return tuple(said)


def of_nnx(twin: Twin, model: Any, inputs: tuple[Any, ...], trains: bool) -> tuple[str, ...]:
    """What was chosen for the nnx side, a sentence each; nothing where there was no choice.

    Args:
      trains: whether the model stays in train mode.
    """
    if twin.call_nnx is not None:
        return ()
    if trains:
        return ("nnx is called in train mode, as the twin's Linen call updates its statistics",)
    flags = _flags(model, inputs)
    chosen = [f"is called with {_text(flags)}"] if flags else []
    if _is_switched(model):
        chosen.insert(0, "is switched to evaluation by `model.eval()`")
    return (f"nnx {' and '.join(chosen)}, which the twin leaves open",) if chosen else ()


def _is_switched(model: Any) -> bool:
    """Whether some layer of a model acts otherwise after `model.eval()`."""
    for _, module in nnx.iter_modules(model):
        if any(hasattr(module, name) for name in _SWITCHES):
            return True
    return False


def _flags(model: Any, inputs: tuple[Any, ...]) -> dict[str, bool]:
    """The arguments of the model's call that say whether it trains, beside the inputs."""
    try:
        parameters = inspect.signature(type(model).__call__).parameters
    except (TypeError, ValueError):  # a callable of another kind: its default is its call
        return {}
    names = list(parameters)[1 + len(inputs) :]  # behind `self` and the inputs
    flags: dict[str, bool] = {}
    for name, value in EVALUATION.items():
        # Where the default says evaluation already, there is no choice to speak of.
        if name in names and parameters[name].default is not value:
            flags[name] = value
    return flags


def _text(flags: dict[str, bool]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in flags.items())
