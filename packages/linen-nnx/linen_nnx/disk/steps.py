"""The steps that lie in a folder: their names, their groups, and which of them were finished.

A folder that a training loop has written to may hold:

    model-100/  model-200/  model_ema-100/  model_ema-200/  model-300.orbax-checkpoint-tmp-7/

That is one group of steps for each prefix: `model-` with the steps 100 and 200, and `model_ema-`
with the same. Nobody but the user knows which of the two is wanted, so they are never mixed. The
save of step 300 was never finished, and is no step.

`flax.training.checkpoints` takes a step of any number, and writes it as Python does:
`checkpoint_1.5`, `checkpoint_-2`, `checkpoint_1e-05`. A CheckpointManager counts in whole ones.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from linen_nnx.book.grammar import did_you_mean
from linen_nnx.book.reading import read_json
from linen_nnx.disk.checked import StoreError
from linen_nnx.disk.store import is_item

TEMPORARY = ".orbax-checkpoint-tmp"
COMMITTED = "commit_success.txt"
_HISTORY = "_CHECKPOINT_METADATA"
_NAME = re.compile(r"(|.*?[_-])(-?\d+(?:\.\d+)?(?:e[-+]\d\d)?)")  # the shortest prefix that fits
_ORBAX_NAME = re.compile(r"(?:.+_)?\d+")


class Step(NamedTuple):
    """One finished checkpoint of a series: `model-100` has the prefix `model-`."""

    prefix: str
    number: int | float
    path: Path

    @property
    def group(self) -> str:
        """What the prefix calls it, without the separator."""
        return self.prefix.rstrip("_-")

    @property
    def name(self) -> str:
        """A name under which a CheckpointManager finds it: `model-100` becomes `100`.

        One that it would not find under any name keeps its own, for `flax.training.checkpoints`.
        """
        kept = _ORBAX_NAME.fullmatch(self.path.name) or not self.is_counted
        return self.path.name if kept else str(self.number)

    @property
    def is_counted(self) -> bool:
        """Whether a CheckpointManager has such a number: a whole one from 0 on."""
        return isinstance(self.number, int) and self.number >= 0


class Choice(NamedTuple):
    """The steps that were chosen (several are parts of one state), and what to say of the rest."""

    steps: tuple[Step, ...]
    notes: tuple[str, ...]


def unfinished(folder: Path) -> str | None:
    """Why Orbax would not restore a save, if that is so: it was cut off before its commit.

    On a disk Orbax saves under a temporary name, and renames at the end. In a bucket it cannot
    rename: there it writes `commit_success.txt` last, into each item and into the step. Such a
    save that was copied to a disk is told by the two times in `_CHECKPOINT_METADATA`: begun, and
    not committed. A missing `commit_success.txt` alone says nothing, as Orbax up to 0.11 wrote
    none on disks.
    """
    if TEMPORARY in folder.name or TEMPORARY in folder.resolve().name:
        return f"its name holds `{TEMPORARY}`, which Orbax takes away when a save is complete"
    if not folder.is_dir():
        return None
    names = [child.name for child in folder.iterdir() if TEMPORARY in child.name]
    # What was to become `6` is a step of a root, and says nothing of the folder that it lies in.
    items = [name for name in names if not _NAME.fullmatch(name.partition(TEMPORARY)[0])]
    if items:
        return f"it holds {sorted(items)}, whose save was cut off"
    if not (folder / COMMITTED).exists() and _begun_only(folder / _HISTORY):
        return f"it has no `{COMMITTED}`, and {_HISTORY} says that it was begun and not committed"
    return None


def _begun_only(history: Path) -> bool:
    try:
        content = read_json(history)
    except (OSError, ValueError):
        return False
    if not isinstance(content, dict) or content.get("init_timestamp_nsecs") is None:
        return False
    return content.get("commit_timestamp_nsecs") is None


def refuse_unfinished(path: Path) -> None:
    """Raises `StoreError` if `path` is a save that was never finished."""
    if (reason := unfinished(path)) is not None:
        raise StoreError(f"{path} is a save that was never finished: {reason}. Name another step")


def pytrees(folder: Path) -> list[Path]:
    """The finished pytree items of a step's folder."""
    found = [child for child in folder.iterdir() if child.is_dir() and is_item(child)]
    return sorted(child for child in found if unfinished(child) is None)


def is_named_as_step(path: Path) -> bool:
    """Whether a name ends in a number, alone or behind `_` or `-`."""
    return _NAME.fullmatch(path.name) is not None


def number_in(text: str) -> int | float:
    """The step that a text is: `100`, or `1.5`. Raises `ValueError` for what is no number."""
    try:
        return int(text)
    except ValueError:
        return float(text)


def step_of(path: Path) -> Step:
    """The step that a path is by its name, which must end in a number."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return Step(match[1], number_in(match[2]), path)


def choose(
    root: Path,
    wanted: float | None,
    prefixes: Sequence[str],
    is_file: Callable[[Path], bool],
) -> Choice | None:
    """The step of a folder: the wanted number, else the latest. None if there is no step at all.

    `prefixes` choose one group, or several whose steps of one number make up one state. `is_file`
    tells which files are checkpoints. Raises `StoreError` where the choice is not clear.
    """
    cut_off: list[str] = []
    steps: list[Step] = []
    for path in sorted(root.iterdir()):
        if not is_named_as_step(path) and TEMPORARY not in path.name:
            continue
        if unfinished(path) is not None:
            cut_off.append(path.name)
        elif _holds_checkpoint(path, is_file):
            steps.append(step_of(path))
    notes = [f"{name} was never finished, and is left aside" for name in cut_off]
    if not steps:
        if cut_off:
            raise StoreError(
                f"{root} holds {sorted(cut_off)}, which were never finished, and no other save"
            )
        return None
    groups = _groups(root, steps)
    names = _named(root, groups, prefixes) if prefixes else _only(root, groups, wanted)
    number = _number(root, [groups[name] for name in names], wanted)
    newer = sorted({n for name in names for n in groups[name] if n > number})
    if newer and wanted is None:
        notes.append(f"the steps {newer} are not in all of {names}: step {number} is the latest")
    chosen = tuple(groups[name][number] for name in names)
    if not chosen[0].is_counted:
        notes.append(
            f"{chosen[0].path.name} is found by flax.training.checkpoints, and so is the result; a "
            "CheckpointManager counts steps in whole numbers from 0 on"
        )
    return Choice(chosen, tuple(notes))


def _holds_checkpoint(path: Path, is_file: Callable[[Path], bool]) -> bool:
    if path.is_dir():
        return is_item(path) or bool(pytrees(path))
    return is_file(path)


def _groups(root: Path, steps: Iterable[Step]) -> dict[str, dict[float, Step]]:
    """The steps by prefix and number."""
    groups: dict[str, dict[float, Step]] = {}
    for step in steps:
        other = groups.setdefault(step.prefix, {}).setdefault(step.number, step)
        if other is not step:
            raise StoreError(
                f"{root} holds step {step.number} twice, as `{other.path.name}` and as "
                f"`{step.path.name}`: name the one that is meant"
            )
    return groups


def _named(root: Path, groups: dict[str, dict[float, Step]], prefixes: Sequence[str]) -> list[str]:
    """The groups with the given prefixes, which may lack the separator at their end."""
    names: list[str] = []
    for prefix in prefixes:
        found = [name for name in groups if prefix in (name, name.rstrip("_-"))]
        if len(found) != 1:
            near = did_you_mean(prefix, list(groups))
            raise StoreError(f"{root} has no steps `{prefix}N`, only {_shown(groups)}{near}")
        names += found
    if len(set(names)) < len(names):
        raise StoreError(f"the prefixes {list(prefixes)} name one group twice")
    return names


def _only(root: Path, groups: dict[str, dict[float, Step]], wanted: float | None) -> list[str]:
    """The one group that may be meant where no prefix is given."""
    meant = [name for name, steps in groups.items() if wanted is None or wanted in steps]
    if len(meant) > 1:
        raise StoreError(
            f"{root} holds several series of steps, {_shown(groups)}, and which one is meant is "
            f"not clear: choose with --prefix {meant[0] or repr('')}; several, such as a model "
            "and its optimizer, are taken as one state by a --prefix for each"
        )
    if not meant and len(groups) > 1:
        raise StoreError(f"{root} has no step {wanted}, only {_shown(groups)}")
    return meant or list(groups)


def _number(root: Path, groups: Sequence[dict[float, Step]], wanted: float | None) -> float:
    common = set.intersection(*map(set, groups))
    if wanted is None and common:
        return max(common)
    if wanted in common:
        return wanted
    known = sorted({number for group in groups for number in group})
    if wanted is None:
        raise StoreError(f"{root}: no step is in all of the groups chosen, which have {known}")
    lacking = "" if wanted not in known else " in all of the groups chosen"
    raise StoreError(f"{root} has no step {wanted}{lacking}, only {sorted(common) or known}")


def _shown(groups: dict[str, dict[float, Step]]) -> str:
    texts = [f"`{name}N` ({', '.join(map(str, sorted(steps)))})" for name, steps in groups.items()]
    return " and ".join(texts)
