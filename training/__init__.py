"""How a run goes: the loop, the step, data, optimizer, evaluation. Yours to change.

What makes a run exact, and is not yours to change, is in `training/runtime/`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.config import compose

__all__ = ["compose"]


def __getattr__(name: str) -> Any:
    # `train.py` asks for `training.runtime.signals` before anything that takes time, and comes by
    # here: with the import at the top, a Ctrl-C in its first seconds ended in a traceback.
    if name == "compose":
        from training.config import compose

        return compose
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
