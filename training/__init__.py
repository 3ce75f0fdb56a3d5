"""How a run goes: the loop, the step, data, optimizer, evaluation. Yours to change.

What makes a run exact, and is not yours to change, is in `training/runtime/`.
"""

from training.config import compose

__all__ = ["compose"]
