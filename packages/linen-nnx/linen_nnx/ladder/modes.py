"""Train or evaluation: how an nnx model is told what a Linen call says by an argument.

model.apply(variables, x, train=True)     the Linen twin has `train`; the port may have

def __call__(self, x, train)              the same:          model(x, train=True)
def __call__(self, x, deterministic)      another word:      model(x, deterministic=False)
def __call__(self, x)                     none, as nnx has   model.train(); model(x)
                                          modes of its own:

    >>> from flax import nnx
    >>> class Port(nnx.Module):
    ...     def __call__(self, x, deterministic):
    ...         return "evaluates" if deterministic else "trains"
    >>> def linen(self, x, train=False): ...
    >>> port = Port()
    >>> in_mode(port, port, linen, (1.0,), {"train": True})
    'trains'
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
      args: positional arguments of the Linen call; `kwargs`: its named ones.
    """
    trains = _trains(linen, args, kwargs)
    if trains is None:
        return method(*args, **kwargs)
    known = _parameters(method)
    flags = known & EVALUATION.keys()
    if not flags:
        model.train() if trains else model.eval()
    bound = inspect.signature(linen).bind(None, *args, **kwargs)
    foreign = [name for name in bound.arguments if name in EVALUATION and name not in known]
    others = flags - _parameters(linen)
    # Both methods have the same words: the call is passed on as it was written.
    if not foreign and not others:
        return method(*args, **kwargs)
    for name in foreign:
        del bound.arguments[name]
    # `train=True` in the port's own word: `deterministic=False`.
    translated = {name: EVALUATION[name] is not trains for name in others}
    return method(*bound.args[1:], **bound.kwargs, **translated)


def _trains(linen: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> bool | None:
    """Whether a Linen call trains; None where no argument says so."""
    try:
        bound = inspect.signature(linen).bind(None, *args, **kwargs)
    except (TypeError, ValueError):  # the model will say what is wrong
        return None
    bound.apply_defaults()
    told: list[bool] = []
    for name, value in bound.arguments.items():
        # A flag that is None says nothing, as in `deterministic: bool | None = None`.
        if name in EVALUATION and value is not None:
            told.append(value is not EVALUATION[name])
    return any(told) if told else None


def _parameters(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()
