"""Trains the smallest model with everything on; prints what the process holds at each evaluation.

python growth.py RUN_DIR STEPS [key=value ...]
"""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    import jax

    from training import compose, loop
    from training.assemble import Setup

    compilations = 0
    found: list[dict[str, int]] = []
    evaluate = loop.evaluate

    def count(event: str, seconds: float, **_: Any) -> None:
        global compilations
        compilations += event == "/jax/core/compile/backend_compile_duration"

    def measured(setup: Setup, state: dict[str, Any]) -> dict[str, float]:
        values = evaluate(setup, state)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what has been freed does not count
        status = Path("/proc/self/status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in status)
        found.append(
            {
                "step": int(state["step"]),
                "kilobytes": int(fields["VmRSS"].split()[0]),
                "files": len(os.listdir("/proc/self/fd")),
                "compilations": compilations,
            }
        )
        return values

    jax.monitoring.register_event_duration_secs_listener(count)
    loop.evaluate = measured
    run_dir, steps, *more = sys.argv[1:]
    overrides = (
        "experiment=diabetes", f"run_dir={run_dir}", f"steps={steps}", "log_every=1",
        "log.progress=false", "log.histograms_every=100", *more,
    )  # fmt: skip
    loop.train(compose(*overrides))
    print(json.dumps(found))
