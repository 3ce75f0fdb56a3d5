"""`init_from`: the whole state of another checkpoint as this run's, at whatever stage that was."""

from linen_nnx.disk.load import load
from training.assemble import Setup
from training.data import TrainIterator
from training.runtime import checkpoints
from training.runtime.errors import Refused
from training.runtime.program import State


def moved(setup: Setup, saved: checkpoints.Saved) -> State:
    """The state of another run as this run has it: step, parameters, optimizer, averages.

    Raises:
        Refusal: naming everything that does not fit.
    """
    arrays = load(saved.path, to=setup.cfg.stage)
    return setup.program.filled(arrays, f"this run, translated from {saved.path}")


def set_position(drawn: TrainIterator, saved: checkpoints.Saved) -> None:
    """Moves the data to where a checkpoint stopped. Raises `Refused` for a position in others."""
    try:
        drawn.set_state(saved.data)
    except Refused as error:
        raise Refused(f"{saved.path / 'data'}: {error}") from None
