"""A checkpoint read into memory in another form: the conversion that `convert` writes to disk."""

from pathlib import Path
from typing import Any

from linen_nnx.disk.planning import plan_conversion


def load(path: str | Path, to: str, **options: Any) -> dict[str, Any]:
    """The arrays of a checkpoint by name, as its conversion to `to` would hold them.

    Args:
      path, to, options: see `planning.plan_conversion`.

    Returns:
      `{"opt_state/0/mu/encoder/kernel": array}`, numpy arrays; empty nodes have none.

    Raises:
      StoreError, RuleError: as `plan_conversion` does.
    """
    conversion = plan_conversion(path, to, **options)
    arrays = {}
    for job in conversion.jobs:
        results = conversion.source.reader.read(job.change.sources) if job.targets else []
        for action in job.change.actions:
            results = action.run(results)
        for leaf, array in zip(job.targets, results, strict=True):
            arrays[leaf.path] = array
    return arrays
