"""How a twin's models are called where it does not say so: in evaluation, both of them.

Linen modules are told by an argument of the call (`train=False`, `deterministic=True`), nnx modules
start in train mode and are switched by `model.eval()`. A twin without `call_*` is called so:

    class Net(nn.Module):                        class Net(nnx.Module):
        def __call__(self, x, train): ...            def __call__(self, x): ...

    module.apply(variables, x, train=False)      model.eval()(x), on a copy of the model
"""

import dataclasses
import inspect
from typing import Any

from flax import nnx

from linen_nnx.infer.twin import Twin

EVALUATION = {
    "deterministic": True,
    "train": False,
    "training": False,
    "is_training": False,
    "is_train": False,
}
_SWITCHES = ("deterministic", "use_running_average")


def complete(twin: Twin, trains: bool = False) -> Twin:
    """The twin with all its calls: those that it gives, and the usual ones in evaluation.

    `trains`: whether the twin's own Linen call trains: then nnx stays in train mode, too.
    """

    def call_linen(module: Any, variables: Any, *inputs: Any) -> Any:
        return module.apply(variables, *inputs, **_flags(module, inputs))

    def init_linen(module: Any, key: Any, *inputs: Any) -> Any:
        return module.init(key, *inputs, **_flags(module, inputs))

    def call_nnx(model: Any, *inputs: Any) -> Any:
        if trains:
            return model(*inputs)
        if isinstance(model, nnx.Module):
            model.eval()
        return model(*inputs, **_flags(model, inputs))

    return dataclasses.replace(
        twin,
        call_linen=twin.call_linen or call_linen,
        init_linen=twin.init_linen or init_linen,
        call_nnx=twin.call_nnx or call_nnx,
    )


def of_linen(twin: Twin, module: Any, inputs: tuple[Any, ...]) -> tuple[str, ...]:
    """What was chosen for the Linen side, in a sentence; nothing where there was no choice."""
    flags = {} if twin.call_linen else _flags(module, inputs)
    return (f"Linen is called with {_text(flags)}, which the twin leaves open",) if flags else ()


def of_nnx(twin: Twin, model: Any, inputs: tuple[Any, ...], trains: bool) -> tuple[str, ...]:
    """The same for the nnx side."""
    if twin.call_nnx is not None:
        return ()
    if trains:
        return ("nnx is called in train mode, as the twin's Linen call updates its statistics",)
    flags = _flags(model, inputs)
    chosen = [f"is called with {_text(flags)}"] if flags else []
    modules = [module for _, module in nnx.iter_modules(model)]
    if any(hasattr(module, name) for module in modules for name in _SWITCHES):
        chosen.insert(0, "is switched to evaluation by `model.eval()`")
    return (f"nnx {' and '.join(chosen)}, which the twin leaves open",) if chosen else ()


def _flags(model: Any, inputs: tuple[Any, ...]) -> dict[str, bool]:
    """The arguments of the model's call that say whether it trains, and are not among the inputs.

    Those whose default says evaluation already are left alone.
    """
    try:
        parameters = inspect.signature(type(model).__call__).parameters
    except (TypeError, ValueError):  # a callable of another kind: its default is its call
        return {}
    names = list(parameters)[1 + len(inputs) :]  # behind `self` and the inputs
    return {
        name: value
        for name, value in EVALUATION.items()
        if name in names and parameters[name].default is not value
    }


def _text(flags: dict[str, bool]) -> str:
    return ", ".join(f"`{name}={value}`" for name, value in flags.items())
