"""What commands know by name and import when they run: a twin, its rule book, a code's own runs."""

import gc
import sys
from importlib import import_module
from typing import Any

from linen_nnx.cli.output import progress


def loaded(twin: str) -> Any:
    """The twin of a name."""
    from linen_nnx.infer.twin import Twin

    # Tracing models leaves cycles, for which `program` has the collector switched off.
    gc.enable()
    return Twin.load(twin)


def suggested(twin: str) -> Any:
    """The rule book of a twin of a name."""
    from linen_nnx.ladder.suggest import suggest

    with progress() as tell:
        # The models' own code imports jax, which alone takes seconds.
        tell(f"importing {twin}")
        return suggest(loaded(twin), lambda text: print(text, file=sys.stderr), tell)


def rules_of(twin: str | None, to: str, rules: str | None) -> dict[str, Any]:
    """What `plan` and `run` are to go by, as arguments of `plan_conversion`.

    A twin beside a rule book adds the shapes of the target, which fill what only that side has.
    """
    if twin is None:
        return {"rules": rules}
    if rules is None:
        return {"rules": suggested(twin)}
    from linen_nnx.infer.trace import trace_linen, trace_nnx

    trace = trace_linen if to == "linen" else trace_nnx
    return {"rules": rules, "specs": trace(loaded(twin)).leaves}


def runs_named(name: str | None) -> Any:
    """What a training code says of its runs, if one has given the name of that."""
    from linen_nnx.disk.runs import NO_RUNS

    return NO_RUNS if name is None else named(name)


def named(name: str) -> Any:
    """What is called `module:NAME`.

    Example:
      >>> named("math:tau") > 6
      True
    """
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
