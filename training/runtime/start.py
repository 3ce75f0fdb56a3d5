"""Where a run starts: the one place that decides between resume, init_from and scratch.

    1. its own run directory holds a checkpoint: go on from it (resume=auto or must), unless it is
       a debug run that has come to its last step, which begins anew (resume=auto);
    2. else `init_from`: take the whole state of another checkpoint, of this template at whatever
       stage or of a script of one's own, and go on from it;
    3. else scratch.

Nothing is written before every check has passed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from linen_nnx import RuleBook
from linen_nnx.disk.remote import as_path

from training.runtime import (
    checkpoints,
    homes,
    metrics,
    numerics,
    past,
    processes,
    reading,
    vouching,
)
from training.runtime.errors import Refused
from training.runtime.program import Program, State
from training.runtime.terminal import say

CONFIG_PART = "config.yaml.part"  # config.yaml while it is being written
BEGUN = (CONFIG_PART, homes.OWNER, homes.OWNER_PART)  # what is written before it


@dataclass(frozen=True)
class Run:
    """What the runtime must know of a run.

    Attributes:
        run_dir: its directory.
        home: the folder that has its `checkpoints/` and `best/`, see `homes`.
        config: its configuration as plain values, which `config.yaml` holds.
        stage: the rung of the migration.
        forms: `{part: "linen" or "nnx"}` at that stage.
        ported: the parts that are nnx at both hybrid stages; None for the first.
        rules: the rule book of its model.
        last: the step at which it ends.
        resume: whether it goes on from its own checkpoint: `auto`, `never`, `must`.
        init_from: a checkpoint to go on from where it has none of its own.
        verify: whether checkpoints are compared with their digests.
        begins_anew: whether it is a run for debugging, which begins anew after its last step.
        upgraded: brings the configuration of an earlier version up to date.
        foreign: reads a checkpoint that no run of this template has written.
    """

    run_dir: Path
    home: Path
    config: Mapping[str, Any]
    stage: str
    forms: Mapping[str, str]
    ported: list[str] | None
    rules: RuleBook | None
    last: int
    resume: str
    init_from: str | None
    verify: bool
    begins_anew: bool
    upgraded: Callable[[Mapping[str, Any]], dict[str, Any]]
    foreign: Callable[[Path], checkpoints.Saved]

    def owns(self, saved: checkpoints.Saved) -> bool:
        """Whether it is a checkpoint of this run."""
        return saved.path.parent == self.home.absolute() / "checkpoints"

    def item(self, saved: checkpoints.Saved | None) -> dict[str, Any]:
        """What a checkpoint says of its run, in plain values.

        Its configuration, the form of each part, the rule book, the stages that it went through
        with those of the checkpoint that it goes on from, and with which settings of JAX and where
        it is computed.
        """
        return {
            "config": dict(self.config),
            "stage": self.stage,
            "stages": past.stages(saved, self.stage),
            "forms": dict(self.forms),
            "ported": self.ported,
            "rules": None if self.rules is None else self.rules.to_dict(),
            **numerics.recorded(),
        }


def find(run: Run) -> checkpoints.Saved | None:
    """The checkpoint that the run goes on from; None to start from scratch.

    Raises:
        Refused: when the run directory belongs to another run, or what was asked for is missing or
            damaged.
    """
    with processes.together():
        saved = _own(run)
        if saved is None and run.init_from is not None:
            saved = given(run, as_path(run.init_from))
            # Training no step would leave a run directory that looks like a finished run of
            # another.
            if saved.step >= run.last:
                raise Refused(
                    f"init_from {saved.path} is at step {saved.step}, and this run ends at step "
                    f"{run.last}: nothing is left to train. Give more steps, or translate it as it "
                    "is: convert.py run."
                )
        return saved


def begin(
    run: Run,
    program: Program,
    saved: checkpoints.Saved | None,
    moved: Callable[[checkpoints.Saved], State],
) -> State:
    """The state that the run starts from.

    Args:
        run, program: the run.
        saved: what `find` found.
        moved: makes a state of this run of a checkpoint that is another's.

    Raises:
        Refusal: when `saved` does not fit the run.
    """
    if saved is None:
        return program.init()
    return saved.restore(program.abstract) if run.owns(saved) else moved(saved)


def write_run(run: Run, saved: checkpoints.Saved | None) -> None:
    """Writes `config.yaml` and `rules.yaml` into the run directory, or brings them up to date, and
    takes the rows along that lie behind it."""
    if not processes.first():
        return
    homes.claim(run.run_dir, run.home)
    if saved is not None and not run.owns(saved):
        before = {} if saved.foreign is not None else run.upgraded(saved.run["config"])
        past.take(saved, run.config, before, run.run_dir)
    part = run.run_dir / CONFIG_PART
    part.write_text(yaml.safe_dump(vouching.config_of(run.item(saved)), sort_keys=False))
    part.replace(run.run_dir / vouching.CONFIG)
    if run.rules is not None:
        run.rules.save(run.run_dir / vouching.RULES)


def _own(run: Run) -> checkpoints.Saved | None:
    """The newest checkpoint of the run directory, if the run may go on from it."""
    run_dir = run.run_dir
    homes.check(run_dir, run.home)
    saved = checkpoints.latest(run.home / "checkpoints", run_dir)
    # A run that was killed while it wrote its first files has begun nothing.
    if {entry.name for entry in run_dir.iterdir()} <= {*BEGUN, *_folders_of_home(run)}:
        if saved is not None:
            raise Refused(_without_run(run, saved))
        if run.resume == "must":
            raise Refused(f"resume=must, but there is no run in {run_dir}.")
        return None
    if run.resume == "never":
        raise Refused(
            f"resume=never, but {run_dir} already holds a run. Nothing is overwritten here: choose "
            "another run_dir, or remove that folder yourself."
        )
    if saved is not None:
        _verify(run, saved)
        before = vouching.config_of(saved.run)
    else:
        before = _config_file(run_dir, run.home)
    _compare_runs(run.upgraded(before), {**run.config, **numerics.recorded()}, run_dir)
    if saved is None and run.resume == "must":
        raise Refused(f"resume=must, but the run in {run_dir} has not saved a checkpoint yet.")
    # Whoever repeats debug=one_step wants to see it again, and not to hear that nothing is left.
    if saved is not None and run.begins_anew and saved.step == run.last:
        say(f"The run in {run_dir} is for debugging and has ended: it begins anew.")
        return None
    return saved


def _folders_of_home(run: Run) -> set[str]:
    """The name in the run directory that its home is, or lies below, if it lies in there."""
    if not homes.is_inside(run.home, run.run_dir):
        return set()
    return {run.home.absolute().relative_to(run.run_dir.absolute()).parts[0]}


def _without_run(run: Run, saved: checkpoints.Saved) -> str:
    """Why checkpoints are not gone on from that lie in the home of a run that has begun nothing."""
    return (
        f"{run.home} holds checkpoints, up to step {saved.step}, and {run.run_dir} holds no run. "
        "If they are another run's, choose another checkpoint.dir. If this run has lost its "
        f"files, put them back from a copy; or go on from this state without its past, with "
        f"init_from={run.home} and another checkpoint.dir."
    )


def _config_file(run_dir: Path, home: Path) -> dict[str, Any]:
    """The configuration of a run that has saved nothing yet."""
    file = run_dir / vouching.CONFIG
    if not file.exists():
        raise Refused(
            f"{run_dir} is not empty and holds no run (no config.yaml). Choose another run_dir."
        )
    hint = f"No checkpoint is in {home}: put the file back from a copy, or choose another run_dir."
    with reading.named(file, hint):
        content = reading.yaml_mapping(file)
        vouching.check_recorded(content)
        return content


def _verify(run: Run, saved: checkpoints.Saved) -> None:
    """Compares the checkpoint of this run, and the files beside it, with their digests."""
    if not run.verify:
        say(f"checkpoint.verify=false: {saved.path} and {metrics.FILE} are taken as they are.")
    elif processes.first():  # which reads every byte, for all of them
        saved.intact(None if run.rules is None else run.rules.to_dict())


def given(run: Run, path: Path) -> checkpoints.Saved:
    """The checkpoint that `init_from` names.

    Raises:
        Refusal: when there is none, or it is damaged.
    """
    saved = checkpoints.own(path) or run.foreign(path)
    if run.verify and processes.first():
        saved.verify()
    if saved.foreign is None and (changed := numerics.changes_since(saved.run)):
        say("\n".join([f"{saved.path} was trained otherwise; from here on:", *changed]))
    return saved


def _compare_runs(before: dict[str, Any], now: dict[str, Any], run_dir: Path) -> None:
    """Says what has changed since the run began; refuses what would bend its curve."""
    # What is recorded beside the keys has comparisons of its own, below.
    own = [name for name in {*before, *now} if name not in vouching.RECORDED]
    changed = vouching.changes(
        {name: before[name] for name in own if name in before},
        {name: now[name] for name in own if name in now},
    )
    words = {key: f"  {key}: was {was}, is {is_}" for key, (was, is_) in changed.items()}
    bending = [text for key, text in words.items() if not vouching.is_free(key)]
    settings = before.get("numerics", {}), now["numerics"]
    bending += numerics.differences(*settings)
    if bending:
        back = numerics.restored(*settings)
        raise Refused(
            f"{run_dir} belongs to another run:\n"
            + "\n".join(bending)
            + "\nGoing on would bend its curve. Choose another run_dir (and init_from="
            f"{run_dir}, to start from its state), or set these back"
            + (f" (in the environment: {back})." if back else ".")
        )
    if "numerics" not in before:
        say(f"{run_dir} does not say under which settings of JAX it began: none are compared.")
    lines = list(words.values())
    lines += numerics.differences(before.get("surroundings", {}), now["surroundings"])
    if lines:
        say("Changed since the run was last started:\n" + "\n".join(lines))
