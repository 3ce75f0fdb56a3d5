"""`init_from`: the whole state of another checkpoint as this run's, at whatever stage that was.

The other checkpoint may be one of this template, or of a script of one's own: a `TrainState`, a
state of nnx, in any layout. Of such a one the entries are taken by name (`step`, `params`,
`opt_state`, collections, `ema`), and what it has beside them is named and left out.
"""

from pathlib import Path

from linen_nnx import RuleBook, RuleError
from linen_nnx.ladder.load import Checkpoint

from training.assemble import Setup
from training.data import TrainIterator
from training.runtime import checkpoints
from training.runtime.errors import Refused
from training.runtime.names import named
from training.runtime.program import State
from training.runtime.runs import RUNS
from training.runtime.terminal import say

ADVICE = """\
Names that differ need a rule book from its names to the model's: init_rules=FILE. An optimizer that
differs is described by optimizer.chain as its script has it (docs/optimizers.md), or begins anew
with init_optimizer=fresh. docs/migrate.md shows both."""


def found(setup: Setup, path: Path) -> checkpoints.Saved:
    """A checkpoint that no run of this template has written, its arrays unread.

    Raises:
        Refusal: when there is none at `path`, or its layout is not clear.
    """
    foreign = Checkpoint(setup.stage.ladder.book, path, _rules(setup))
    for note in foreign.notes:
        say(note)
    return checkpoints.Saved(foreign.path.absolute(), foreign.step, {}, {}, foreign)


def moved(setup: Setup, saved: checkpoints.Saved) -> State:
    """The state of another run as this run has it: step, parameters, optimizer, averages.

    Raises:
        Refusal: naming everything that does not fit.
    """
    cfg, program, stage = setup.cfg, setup.program, setup.stage
    other = saved.foreign or Checkpoint(stage.ladder.book, saved.path, _rules(setup), RUNS)
    fresh: list[str] = []
    if cfg.init_optimizer == "fresh":
        # What a fresh optimizer has nothing to do with: the parameters are what one came for.
        kept = {"step", "params", *stage.mutable}
        fresh = [entry for entry in program.abstract if entry not in kept | other.entries]
        fresh = ["opt_state", *(entry for entry in fresh if entry != "opt_state")]
        say(f"init_optimizer=fresh: {', '.join(fresh)} begin anew at step {saved.step}.")
    try:
        state = other.load(cfg.stage, stage.forms, program.abstract, fresh, say)
    except RuleError as error:
        raise Refused(_explained(setup, saved, str(error))) from None
    return program.filled(named(state), f"this run, translated from {saved.path}", fresh)


def _rules(setup: Setup) -> RuleBook | None:
    """The rule book that `init_rules` names."""
    file = setup.cfg.init_rules
    return None if file is None else RuleBook.load(file)


def _explained(setup: Setup, saved: checkpoints.Saved, text: str) -> str:
    """What a checkpoint lacks, with what can be done about it."""
    if saved.foreign is not None:
        return f"{text}\n{ADVICE}"
    # Of two models every leaf differs, which says less than their names: those stand at the end,
    # where one looks.
    was, now = saved.run["config"]["model"]["family"], setup.cfg.model["family"]
    if was != now:
        return f"{text}\n{saved.path} is a run of the model `{was}`, and this run's is `{now}`."
    return text


def set_position(drawn: TrainIterator, saved: checkpoints.Saved) -> None:
    """Moves the data to where a checkpoint stopped. Raises `Refused` for a position in others."""
    if saved.foreign is not None:
        say(
            f"{saved.path} has no position in the data of this run, which goes on with batch "
            f"{saved.step + 1}, as if it had read the {saved.step} before."
        )
        drawn.skip(saved.step)
        return
    try:
        drawn.set_state(saved.data)
    except Refused as error:
        raise Refused(f"{saved.path / 'data'}: {error}") from None
