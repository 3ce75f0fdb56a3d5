"""The debug modes: what a deliberately unusual run does beside training (`debug=...`).

one_step   a few steps, an evaluation, a save: see configs/debug/one_step.yaml
overfit    every step reads the first batch
nans       the first operation that gives a NaN or an infinity raises
profile    steps 6 to 15 are recorded, and the compiled step is written as text
"""

import shlex
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax

from configs.schema import Config
from training.assemble import Setup
from training.runtime import processes
from training.runtime.environment import installation, program
from training.runtime.errors import Refused
from training.runtime.program import State
from training.runtime.terminal import show

PROFILED = range(5, 15)  # steps after the first that debug=profile records


@contextmanager
def checks(cfg: Config) -> Iterator[None]:
    """debug=nans: the first operation that gives a NaN or an infinity raises FloatingPointError.

    As contexts, since some library code turns the global flags off for its thread and on again.
    What JAX_DEBUG_NANS and JAX_DEBUG_INFS have turned on stays on.
    """
    on = cfg.debug.mode == "nans"
    with (
        jax.debug_nans(on or jax.debug_nans.value),
        jax.debug_infs(on or jax.debug_infs.value),
    ):
        yield


def batches(cfg: Config, drawn: Any) -> Iterator[Any]:
    """The batches of training; debug=overfit repeats the first."""
    first = next(drawn)
    while True:
        yield first
        if cfg.debug.mode != "overfit":
            first = next(drawn)


class Profile:
    """debug=profile: a hook of the loop, to be called before each step."""

    def __init__(self, setup: Setup, first: int) -> None:
        """Raises `Refused` if the run is too short to be profiled."""
        self._setup, self._first = setup, first
        self._recording, self._step = ExitStack(), ExitStack()
        last = setup.cfg.stop_at or setup.cfg.steps
        self._on = setup.cfg.debug.mode == "profile"
        if self._on and last - first <= PROFILED.start:
            raise Refused(
                f"debug=profile records what follows the first {PROFILED.start} steps; this run "
                f"would go from step {first} to {last}. Give more steps, or another run_dir."
            )

    def before(self, step: int, state: State) -> None:
        """Begins or ends the recording where it is due; `step` steps are done."""
        done = step - self._first
        if not self._on:
            return
        if done == PROFILED.start and processes.first():
            run_dir = Path(self._setup.cfg.run_dir)
            program = self._setup.program
            compiled = program.train_step.lower(state, self._setup.traced).compile()
            (run_dir / "train_step.hlo.txt").write_text(compiled.as_text() or "")
            self._recording.callback(lambda: show(where(run_dir)))
            self._recording.enter_context(jax.profiler.trace(run_dir))
        self._step.close()
        if done in PROFILED and processes.first():
            # Without such marks a profile knows of no steps, and shows no time of one.
            self._step.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))
        # Steps run on after they are dispatched: without the wait the last ones would be cut off.
        if done == PROFILED.stop:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Ends a recording that goes on."""
        self._step.close()
        self._recording.close()


def where(run_dir: Path) -> str:
    """Where the profile is, and what opens it."""
    traces = sorted(run_dir.glob("plugins/profile/*/*.trace.json.gz"))
    lines = [f"The profile is in {run_dir / 'plugins'}. To look at it, in the tab PROFILE:"]
    if find_spec("xprof") is None:  # which brings that tab
        lines.append(f"  {installation('xprof')}")
    lines.append(f"  {program('tensorboard')} --logdir {shlex.quote(str(run_dir))}")
    for trace in traces[-1:]:
        lines += ["Or open this file at https://ui.perfetto.dev:", f"  {trace}"]
    return "\n".join(lines)
