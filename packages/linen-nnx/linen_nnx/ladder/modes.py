"""Train or evaluation: how an nnx model is told what a Linen call says by an argument.

model.apply(variables, x, train=True)     the Linen twin has `train`; the port may have

def __call__(self, x, train)              the same:          model(x, train=True)
def __call__(self, x, deterministic)      another word:      model(x, deterministic=False)
def __call__(self, x)                     none, as nnx has   model.train(); model(x)
                                          modes of its own:
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from linen_nnx.infer.calls import EVALUATION


def in_mode(
    model: Any, method: Callable[..., Any], linen: Callable[..., Any], args: Any, kwargs: Any
) -> Any:
    """Calls a method of an nnx model with the arguments of the Linen method.

    Args:
      model: the nnx model, which this call may switch: it is thrown away afterwards.
      method: its method, bound.
      linen: the Linen method, unbound.
      args, kwargs: the arguments of the Linen call.
    """
    trains = _trains(linen, args, kwargs)
    if trains is None:
        return method(*args, **kwargs)
    known = _parameters(method)
    bound = inspect.signature(linen).bind(None, *args, **kwargs)
    if not known & EVALUATION.keys():
        model.train() if trains else model.eval()
    foreign = [name for name in bound.arguments if name in EVALUATION and name not in known]
    if not foreign and known & EVALUATION.keys() <= _parameters(linen):
        return method(*args, **kwargs)
    for name in foreign:
        del bound.arguments[name]
    others = known & EVALUATION.keys() - _parameters(linen)
    flags = {name: EVALUATION[name] is not trains for name in others}
    return method(*bound.args[1:], **bound.kwargs, **flags)


def _trains(linen: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> bool | None:
    """Whether a Linen call trains; None where no argument says so."""
    try:
        bound = inspect.signature(linen).bind(None, *args, **kwargs)
    except (TypeError, ValueError):  # the model will say what is wrong
        return None
    bound.apply_defaults()
    flags = {name: value for name, value in bound.arguments.items() if name in EVALUATION}
    told = [value is not EVALUATION[name] for name, value in flags.items() if value is not None]
    return any(told) if told else None


def _parameters(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()
