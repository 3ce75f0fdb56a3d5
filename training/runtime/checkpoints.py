"""Checkpoints of a run: the latest few under `checkpoints/`, the best one under `best/`.

Both lie in the run's home (`homes.py`), on a disk or at gs://. Each step directory is
self-sufficient: the item `state` is the state as it is, `data` the position of the data iterator,
and `run` the resolved configuration (its stage included) with the rule book, so that a checkpoint
alone suffices to change stage. `digests.json` beside them holds a hash of every file, for Orbax
restores a flipped bit as a wrong value.
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath
from linen_nnx.disk import digests
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.remote import Remote, as_path
from linen_nnx.errors import Refusal
from linen_nnx.ladder.forms import check
from linen_nnx.ladder.load import Checkpoint

from training.runtime import folders, homes, processes, reading, vouching
from training.runtime.errors import Refused
from training.runtime.names import named
from training.runtime.terminal import say

State = dict[str, Any]

REASON = 300  # characters of an error of Orbax's that a message repeats


@dataclass(frozen=True)
class Saved:
    """A checkpoint found on disk, its arrays unread."""

    path: Path
    step: int
    data: dict[str, Any]
    run: dict[str, Any]
    foreign: Checkpoint | None = None
    """Where it is none of this template's: how it is read."""
    run_dir: Path | None = None
    """The run directory that it belongs to; None where no file of one is known."""

    def verify(self) -> bool:
        """Compares every file with its digest; False if there are none to compare with.

        Raises:
            Refused: when a file is missing, foreign or altered, naming each.
        """
        try:
            return self.path.is_dir() and digests.check(self.path)
        except digests.DigestError as error:
            # Which step to fall back to is the first thing that somebody asks who reads this.
            others = [step for step in steps_of(self.path.parent) if step != self.step]
            raise Refused(
                f"{error}\nRemove {self.path} to go on from an earlier step "
                f"({', '.join(map(str, others)) or 'there is none'})."
            ) from None

    def intact(self, rules: dict[str, Any] | None = None) -> None:
        """Compares everything with its digests: this checkpoint, and what lies beside it in its run
        directory; says what has none.

        Args:
            rules: a rule book that `rules.yaml` may be, beside the checkpoint's own.

        Raises:
            Refused: naming everything that differs.
        """
        if not self.verify():
            say(f"{self.path} has no digests to verify it with; its arrays are taken as they are.")
        if self.run_dir is None:
            say(f"{self.path} lies alone: no configuration and no rows to compare with it.")
        elif not vouching.check(self.run_dir, self.step, self.run, rules):
            say(f"{self.path} vouches for no metrics.jsonl: its rows are taken as they are.")

    def restore(self, like: State) -> State:
        """The saved state, laid out as `like` (shapes, dtypes and shardings).

        Raises:
            VariablesError: when shapes, dtypes or names differ, naming each. Orbax would cast.
            Refused: when it cannot be read.
        """
        with _readable(self.path / "state"):
            # Names and shapes come from the metadata, before any array is read, for Orbax casts
            # what has another dtype.
            handler: Any = ocp.PyTreeCheckpointHandler()  # pyrefly: ignore
            state = epath.Path(folders.for_orbax(self.path / "state"))
            found = named(handler.metadata(state).tree)
        check(found, named(like), f"the state in {self.path}")
        with _readable(self.path / "state"), ocp.StandardCheckpointer() as reader:
            state = reader.restore(folders.for_orbax(self.path / "state"), like)
        # The folder says the step to everybody but the state itself, by which the schedule goes.
        if int(state["step"]) != self.step:
            raise Refused(
                f"{self.path} holds the state after step {int(state['step'])}: its folder was "
                f"renamed. Call it {int(state['step'])} again."
            )
        return state


def latest(root: Path, run_dir: Path | None = None) -> Saved | None:
    """The newest checkpoint below a checkpoint root; None where there is none.

    Args:
        root: the folder of steps.
        run_dir: the run directory that it belongs to.

    Raises:
        Refused: when it is there and cannot be read.
    """
    steps = steps_of(root)
    return _saved(root / str(steps[-1]), run_dir) if steps else None


def own(path: Path) -> Saved | None:
    """The newest checkpoint of a run directory, a home or a checkpoint root, or the step directory
    itself.

    None where there is none of this template's.

    Raises:
        Refused: when it is there and cannot be read; when there is nothing at all.
    """
    path = folders.fresh(path)
    if not path.exists():
        raise Refused(f"There is no checkpoint at {path}: no such file or directory.")
    # A run directory first: its folder `checkpoints` may hold a step that is called as the run is.
    root = homes.known(path) / "checkpoints"
    if steps := steps_of(root):
        return _own(root / str(steps[-1]), path if vouching.has_files(path) else None)
    if steps := steps_of(path):
        path = path / str(steps[-1])
    return _own(path, None)


def _own(path: Path, run_dir: Path | None) -> Saved | None:
    """The checkpoint in a step directory, if it is one of this template's."""
    if not (path.name.isdigit() and (path / "run").is_dir() and (path / "state").is_dir()):
        return None
    above = path.parent.parent
    if run_dir is None and path.parent.name in homes.ROOTS and vouching.has_files(above):
        run_dir = above
    return _saved(path, run_dir)


def find(path: Path) -> Saved:
    """The same, where there must be one.

    Raises:
        Refused: when there is none, saying what was found instead.
    """
    if saved := own(path):
        return saved
    entries = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    elsewhere = homes.known(path)
    more = "" if elsewhere == path else f"; nor is there one in {elsewhere}, where it keeps them"
    raise Refused(
        f"There is no checkpoint of this template at {path}. Expected a run directory (with "
        f"checkpoints/<step>/), a checkpoint root or a step directory; found {entries}{more}."
    )


def of_run(run_dir: Path, home: Path) -> tuple[Saved, Saved | None]:
    """The newest checkpoint of a run, and the best if it keeps one.

    Raises:
        Refused: when there is none, or the run keeps them elsewhere.
    """
    homes.check(run_dir, home)
    beside = run_dir if vouching.has_files(run_dir) else None
    last = latest(home / "checkpoints", beside)
    if last is None and home != run_dir:
        raise Refused(f"There is no checkpoint of this template in {home}.")
    return last or find(run_dir), latest(home / "best", beside)


class Checkpoints:
    """Asynchronous saves of one run."""

    def __init__(self, home: Path, keep: int, best: bool, run: dict[str, Any]) -> None:
        """`keep` of the latest, and the best too; `run` is what the item of that name holds."""
        self._run, self._home = run, home
        with _written(home):
            if processes.first():
                folders.try_writing(home)
            self._latest = _manager(home / "checkpoints", keep)
            self._best = _manager(home / "best", None) if best else None
        # One thread: digests of one save are written before those of the next are begun.
        self._background = ThreadPoolExecutor(1, "digests")
        self._saving: Future[None] | None = None

    def save(
        self,
        state: State,
        data: dict[str, Any],
        metrics: dict[str, Any],
        *,
        latest: bool = True,
        best: bool = False,
    ) -> None:
        """Saves the state after its step; returns once its arrays are copied from the device.

        A checkpoint that is the latest and the best is written once, and linked.

        Args:
            state: what to save; it may be donated afterwards.
            data: the data iterator's position after this step.
            metrics: the digests of the rows up to this step, see `training.runtime.tally`.
            latest: keep it among the latest.
            best: keep it as the best so far, if the run keeps one.
        """
        # Not to be asked by the loop, which knows what is due, not what is kept.
        best = best and self._best is not None
        manager = self._latest if latest else self._best
        if manager is None or not (latest or best):
            return
        self._wait()
        step = int(state["step"])
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave(data),
            run=ocp.args.JsonSave(self._run | {"metrics": metrics}),
        )
        with _written(self._home):
            saved = manager.save(step, args=items)
        if not saved:
            raise Refused(
                f"Orbax did not save step {step}: {manager.directory} holds step "
                f"{manager.latest_step()} already."
            )
        # The next steps need not wait for the hashing.
        self._saving = self._background.submit(self._finish, manager, step, best)

    def _finish(self, manager: ocp.CheckpointManager, step: int, best: bool) -> None:
        """What follows a save, in the background: digests, and the folder of the best."""
        _digest(manager, step)
        if not best or not processes.first():
            return
        kept = self._home / "best" / str(step)
        if manager is self._latest:
            folders.double(_folder(manager, step), kept)
        # Only now that the new one is complete: a kill in between leaves two, and never none.
        for other in steps_of(kept.parent):
            if other != step:
                folders.remove(kept.parent / str(other))

    def forget_after(self, step: int) -> None:
        """Deletes checkpoints that the run, going on from `step`, will draw again: of the best, and
        of a debug run that begins anew."""
        for manager in filter(None, (self._latest, self._best)):
            for later in [saved for saved in manager.all_steps() if saved > step]:
                with _written(self._home):
                    manager.delete(later)

    def close(self) -> None:
        """Waits until every save is on disk, with its digests."""
        self._wait()
        self._background.shutdown()
        for manager in filter(None, (self._latest, self._best)):
            with _written(self._home):  # what went wrong with a save is told once more here
                manager.close()

    def _wait(self) -> None:
        """Waits for the save before: a later one may delete the directory that is being hashed.

        Raises:
            Exception: whatever has gone wrong with it, once.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            with _written(self._home):
                saving.result()


def save_aside(path: Path, state: State) -> None:
    """Writes a state that no run should resume from, to be looked at. Replaces an earlier one."""
    with processes.together():
        if processes.first():
            folders.remove(path)
    with ocp.StandardCheckpointer() as writer:
        writer.save(folders.for_orbax(path), state)


def _digest(manager: ocp.CheckpointManager, step: int) -> None:
    manager.wait_until_finished()
    if processes.first():
        path = _folder(manager, step)
        try:
            digests.write(path)
        except (OSError, StoreError):
            folders.remove(path)  # not one to go on from, for nothing vouches for it
            raise


def _folder(manager: ocp.CheckpointManager, step: int) -> Path:
    """Where a manager has put a step."""
    return as_path(str(manager.directory)) / str(step)


def _manager(root: Path, keep: int | None) -> ocp.CheckpointManager:
    # A kill while Orbax writes leaves a folder under a temporary name, or in a bucket one without
    # its mark, which else would stay for ever.
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
    return ocp.CheckpointManager(folders.for_orbax(root), options=options)


@contextmanager
def _written(home: Path) -> Iterator[None]:
    """Whatever Orbax and its libraries raise for a bucket, of many kinds, is refused; what a disk
    raises is the system's, and is told by `training.runtime.disk`."""
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        if not isinstance(home, Remote):
            raise
        reason = str(error) if isinstance(error, Refusal) else _reason(error)
        refused = Refused(
            f"{home} cannot be written: {reason}\nThe checkpoints before it are untouched: "
            "put that right, and the same command goes on from the last."
        )
        processes.abandon(refused)  # the others would wait for this one
        raise refused from error


def steps_of(root: Path) -> list[int]:
    """The committed steps below a checkpoint root."""
    root = folders.fresh(root)
    names = [name for name in folders.complete(root) if (root / name / "state").is_dir()]
    return sorted(int(name) for name in names if name.isdigit())


def _saved(path: Path, run_dir: Path | None) -> Saved:
    data, run = _item(path, "data"), _item(path, "run")
    with reading.named(path / "run" / "metadata"):
        vouching.check_item(run)
    return Saved(path.absolute(), int(path.name), data, run, run_dir=run_dir)


def _item(path: Path, item: str) -> dict[str, Any]:
    """A small item of a checkpoint, which is JSON."""
    hint = (
        f"The checkpoint {path} was not written by this template, or it is damaged. Remove it to "
        "go on from an earlier one."
    )
    file = path / item / "metadata"
    with reading.named(file, hint):
        return reading.json_mapping(file)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Whatever Orbax raises for damaged files, of which it has many kinds, is refused."""
    try:
        yield
    except Exception as error:
        raise Refused(
            f"{path} cannot be read: {_reason(error)}\nThe checkpoint is damaged, or of another "
            f"kind. Remove {path.parent} to go on from an earlier one."
        ) from error


def _reason(error: Exception) -> str:
    """The kind of an error and its first line, which may be long."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:REASON]}"
