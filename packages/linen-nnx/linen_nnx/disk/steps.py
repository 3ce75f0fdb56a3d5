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
from linen_nnx.disk.item import is_item
from linen_nnx.disk.remote import Remote

TEMPORARY = ".orbax-checkpoint-tmp"
COMMITTED = "commit_success.txt"
_HISTORY = "_CHECKPOINT_METADATA"
# The shortest prefix that fits, so that `model_1.5e-05` is one number and not a longer prefix.
_NAME = re.compile(r"(|.*?[_-])(-?\d+(?:\.\d+)?(?:e[-+]\d\d)?)")
_ORBAX_NAME = re.compile(r"(?:.+_)?\d+")


class SavedStep(NamedTuple):
    """One finished checkpoint of a series: `model-100` has the prefix `model-`.

    Example:
      >>> step = step_of(Path("model_ema-100"))
      >>> step.prefix, step.number, step.group, step.name
      ('model_ema-', 100, 'model_ema', '100')
      >>> step_of(Path("checkpoint_1.5")).name
      'checkpoint_1.5'
    """

    prefix: str
    number: int | float
    path: Path

    @property
    def group(self) -> str:
        """The prefix without the separator at its end."""
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


_Groups = dict[str, dict[float, SavedStep]]
"""The steps of a folder by prefix and number."""


class Choice(NamedTuple):
    """The steps that were chosen (several are parts of one state), and notes of the others."""

    steps: tuple[SavedStep, ...]
    notes: tuple[str, ...]


def unfinished(folder: Path) -> str | None:
    """Why Orbax would not restore a save, if that is so: it was cut off before its commit.

    On a disk Orbax saves under a temporary name, and renames at the end. In a bucket it cannot
    rename: there it writes `commit_success.txt` last, into each item and into the step. Such a
    save that was copied to a disk is told by the two times in `_CHECKPOINT_METADATA`: begun, and
    not committed. A missing `commit_success.txt` alone says nothing, as Orbax up to 0.11 wrote
    none on disks.
    """
    # A link `latest` may lead to a save that is still being written.
    if TEMPORARY in folder.name or TEMPORARY in folder.resolve().name:
        return f"its name holds `{TEMPORARY}`, which Orbax takes away when a save is complete"
    if not folder.is_dir():
        return None
    if isinstance(folder, Remote):
        return _unfinished_in_bucket(folder)
    items = []
    for child in folder.iterdir():
        name, mark, _ = child.name.partition(TEMPORARY)
        # What was to become `6` is a step of a root, and says nothing of the folder around it.
        if mark and not _NAME.fullmatch(name):
            items.append(child.name)
    if items:
        return f"it holds {sorted(items)}, whose save was cut off"
    if not (folder / COMMITTED).exists() and _begun_only(folder / _HISTORY):
        return f"it has no `{COMMITTED}`, and {_HISTORY} says that it was begun and not committed"
    return None


def _unfinished_in_bucket(folder: Remote) -> str | None:
    """The same of a folder in a bucket, where the mark is what says that it is complete.

    Orbax writes it to gs:// and asks for it there. To s3:// it cannot write, so what lies there was
    copied, perhaps from a disk, where older saves have no mark; or a conversion has written it.
    """
    looks_whole = (folder / "_METADATA").is_file() or (folder / _HISTORY).is_file()
    if not looks_whole or (folder / COMMITTED).is_file():
        return None
    if folder.scheme == "gs":
        return (
            f"it has no `{COMMITTED}`, which is written last in a bucket (if it is a copy of a "
            "save that was complete on a disk, put an empty object of that name there)"
        )
    from linen_nnx.disk.claims import claim_of

    for one in (folder, folder.parent):
        if one.key and claim_of(one).exists():
            return f"by {claim_of(one)}, a conversion writes it now, or was killed"
    return None


def _begun_only(history: Path) -> bool:
    try:
        content = read_json(history)
    except (OSError, ValueError):
        return False
    # Without the first time the file says nothing of the second.
    if not isinstance(content, dict) or content.get("init_timestamp_nsecs") is None:
        return False
    return content.get("commit_timestamp_nsecs") is None


def refuse_unfinished(path: Path) -> None:
    """Raises `StoreError` if `path` is a save that was never finished."""
    if (reason := unfinished(path)) is not None:
        raise StoreError(f"{path} is a save that was never finished: {reason}. Name another step")


def pytrees(folder: Path) -> list[Path]:
    """The finished pytree items of a step's folder."""
    found = []
    for child in sorted(folder.iterdir()):
        if child.is_dir() and is_item(child) and unfinished(child) is None:
            found.append(child)
    return found


def is_named_as_step(path: Path) -> bool:
    """Whether a name ends in a number, alone or behind `_` or `-`."""
    return _NAME.fullmatch(path.name) is not None


def number_in(text: str) -> int | float:
    """The step that a text is: `100`, or `1.5`. Raises `ValueError` for what is no number."""
    # An integer stays one: as a float, steps from 2**53 on would not all be told apart.
    try:
        return int(text)
    except ValueError:
        return float(text)


def step_of(path: Path) -> SavedStep:
    """The step that a path is by its name, which must end in a number."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return SavedStep(match[1], number_in(match[2]), path)


def choose(
    root: Path,
    wanted: float | None,
    prefixes: Sequence[str],
    is_file: Callable[[Path], bool],
) -> Choice | None:
    """The step of a folder: the wanted number, else the latest. None if there is no step at all.

    Args:
      root: the folder.
      wanted: the number of a step.
      prefixes: those of one group, or of several whose steps of one number make up one state.
      is_file: tells which files are checkpoints.

    Raises:
      StoreError: where the choice is not clear.
    """
    steps, cut_off = _steps_in(root, is_file)
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
    numbers = set().union(*[groups[name] for name in names])
    newer = sorted([n for n in numbers if n > number])
    # Of a model and its optimizer, saved one after the other, the second may be missing.
    if newer and wanted is None:
        notes.append(f"the steps {newer} are not in all of {names}: step {number} is the latest")
    chosen = tuple(groups[name][number] for name in names)
    if not chosen[0].is_counted:
        notes.append(
            f"{chosen[0].path.name} is found by flax.training.checkpoints, and so is the result; a "
            "CheckpointManager counts steps in whole numbers from 0 on"
        )
    return Choice(chosen, tuple(notes))


def _steps_in(root: Path, is_file: Callable[[Path], bool]) -> tuple[list[SavedStep], list[str]]:
    """The finished steps of a folder, and the names of the saves that were cut off."""
    steps: list[SavedStep] = []
    cut_off: list[str] = []
    for path in sorted(root.iterdir()):
        # `6.orbax-checkpoint-tmp-30` is not named as a step, and was to become one.
        if not is_named_as_step(path) and TEMPORARY not in path.name:
            continue
        if unfinished(path) is not None:
            cut_off.append(path.name)
        elif _holds_checkpoint(path, is_file):
            steps.append(step_of(path))
    return steps, cut_off


def _holds_checkpoint(path: Path, is_file: Callable[[Path], bool]) -> bool:
    if path.is_dir():
        return is_item(path) or bool(pytrees(path))
    return is_file(path)


def _groups(root: Path, steps: Iterable[SavedStep]) -> _Groups:
    """The steps by prefix and number."""
    groups: _Groups = {}
    for step in steps:
        # `model-7` and `model-07` are one number, and so are `1` and `1.0`.
        other = groups.setdefault(step.prefix, {}).setdefault(step.number, step)
        if other is not step:
            raise StoreError(
                f"{root} holds step {step.number} twice, as `{other.path.name}` and as "
                f"`{step.path.name}`: name the one that is meant"
            )
    return groups


def _named(root: Path, groups: _Groups, prefixes: Sequence[str]) -> list[str]:
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


def _only(root: Path, groups: _Groups, wanted: float | None) -> list[str]:
    """The one group that may be meant where no prefix is given."""
    # Of several groups, one alone may have the step that is wanted.
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


def _number(root: Path, groups: Sequence[dict[float, SavedStep]], wanted: float | None) -> float:
    """The wanted step, which has to be in all groups, or the latest that is."""
    common = set.intersection(*map(set, groups))
    if wanted is None and common:
        return max(common)
    if wanted in common:
        return wanted
    known = sorted(set().union(*groups))
    if wanted is None:
        raise StoreError(f"{root}: no step is in all of the groups chosen, which have {known}")
    lacking = "" if wanted not in known else " in all of the groups chosen"
    raise StoreError(f"{root} has no step {wanted}{lacking}, only {sorted(common) or known}")


def _shown(groups: _Groups) -> str:
    texts = []
    for name, steps in groups.items():
        numbers = ", ".join(map(str, sorted(steps)))
        texts.append(f"`{name}N` ({numbers})")
    return " and ".join(texts)
