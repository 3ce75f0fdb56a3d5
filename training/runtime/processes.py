"""Several processes that compute one run together: how they meet, agree and stop.

Each runs the same program, on its own part of every batch. The first one alone writes: metrics,
TensorBoard, config, digests, the terminal. What one process finds wrong while a run is being set
up ends all of them with its message; one that dies later takes the others down with it, for they
would wait for it in the next step. For a run of one process everything here does nothing.
"""

import difflib
import hashlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from training.runtime import numerics, signals
from training.runtime.errors import Refused
from training.runtime.terminal import CONSOLE

MESSAGE = 2000  # bytes of an error that the other processes are told
PLATFORMS = ("cpu", "cuda", "gpu", "rocm", "tpu")  # that JAX_PLATFORMS may name

Stop = Callable[[int], int | None]
"""The signal for which to stop after step k, if there was one; to be asked after every step."""


def join(config: Mapping[str, Any]) -> None:
    """Meets the other processes of the run, if there are any; before anything else asks for jax.

    Who they are: the group `distributed` of the configuration, else what `srun` or `mpirun` has put
    into the environment. A process joins once, whatever the number of its runs.

    Raises:
        Refused: when what is known does not suffice, configurations differ, or there is no device
            of the kind that JAX_PLATFORMS asks for.
    """
    own = config["distributed"]
    launched = any(int(os.environ.get(name, 1)) > 1 for name in _launchers())
    # A sweep runs several jobs in one process, of which the first has met the others already.
    if (own["coordinator"] is not None or launched) and not jax.distributed.is_initialized():
        # Several programs in flight, each waiting for the other processes in threads of one small
        # pool, can wait for ever. Devices other than CPUs do not look at this.
        jax.config.update("jax_cpu_enable_async_dispatch", False)
        try:
            jax.distributed.initialize(own["coordinator"], own["num_processes"], own["process_id"])
        except ValueError as error:
            raise Refused(
                f"distributed.coordinator is {own['coordinator']}, and {str(error).rstrip('.')}. "
                "Give distributed.num_processes and distributed.process_id too."
            ) from None
        CONSOLE.quiet = not first()
        sys.excepthook = _leave
    _find_devices()
    if jax.process_count() == 1:
        return
    # Two processes with other seeds would train on without an error, each on its own idea of the
    # state.
    shared = {key: value for key, value in config.items() if key != "distributed"}
    text = repr((shared, numerics.recorded()))
    digest = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    digests = multihost_utils.process_allgather(digest)
    others = [index for index, other in enumerate(digests) if (other != digests[0]).any()]
    if others:
        raise Refused(
            f"Process {others[0]} of {len(digests)} was started with another configuration than "
            "process 0. Give all of them the same keys, of which distributed.process_id alone may "
            "differ, and the same settings of JAX in the environment."
        )


def first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


@contextmanager
def together() -> Iterator[None]:
    """All processes leave the block, or none does: an error in one is an error in all.

    Nothing in the block may wait for another process.

    Raises:
        Refused: when another process has failed, with its message.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        # Of one length in each, for all processes gather arrays of one shape; zeros say that all is
        # well.
        text = np.zeros(MESSAGE, np.uint8)
        if failure is not None:
            told = f"{failure} ".encode()[:MESSAGE]
            text[: len(told)] = np.frombuffer(told, np.uint8)
        for index, other in enumerate(multihost_utils.process_allgather(text)):
            # A process with an error of its own tells that one: it knows more about it than the
            # others.
            if failure is None and (told := bytes(other[other > 0]).decode(errors="replace")):
                failure = Refused(f"Process {index} of {jax.process_count()}: {told.strip()}")
    if failure is not None:
        raise failure


@contextmanager
def interrupts() -> Iterator[Stop]:
    """SIGTERM and Ctrl-C end the run after the step at hand, in every process after the same one;
    in a run of one process, a second signal ends it at once.
    """
    if jax.process_count() == 1:
        with signals.counted() as received:
            yield lambda step: received[0] if received else None
        return

    def stop(step: int) -> int | None:
        # jax listens to SIGTERM itself, and settles with the other processes where to stop.
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else None

    with signals.handled({signal.SIGINT: lambda *_: signal.raise_signal(signal.SIGTERM)}):
        yield stop


def _find_devices() -> None:
    """Has JAX look for its devices, which it does once; refuses what it cannot find."""
    try:
        jax.devices()
    except Exception as error:  # RuntimeError; AssertionError for cuda without JAX's package for it
        asked = numerics.setting("jax_platforms")
        reason = str(error).partition("(set JAX_PLATFORMS")[0].strip() or "there is none"
        close = difflib.get_close_matches(str(asked), PLATFORMS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close and close[0] != asked else ""
        raise Refused(
            f"JAX_PLATFORMS={asked} asks for a device that JAX cannot use here: {reason}.{hint} "
            "Leave JAX_PLATFORMS out to take what there is, or give JAX_PLATFORMS=cpu."
        ) from None


def _launchers() -> Iterator[str]:
    """The environment variables that count the processes which a launcher has started."""
    if "SLURM_STEP_NODELIST" in os.environ:  # by srun: a batch script alone is no step
        yield "SLURM_NTASKS"
    yield "OMPI_COMM_WORLD_SIZE"


def abandon(error: Exception) -> None:
    """Ends this process at once for an error that the others of its run do not have, and does
    nothing in a run of one process."""
    if jax.process_count() > 1:
        print(error, file=sys.stderr, flush=True)
        os._exit(1)


def _leave(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Ends a process that failed. An orderly exit would wait for others, which wait for it."""
    sys.__excepthook__(kind, error, trace)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
