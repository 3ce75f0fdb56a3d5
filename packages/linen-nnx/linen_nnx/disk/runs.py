"""What a checkpoint says of itself, and what a training code says of its own runs.

A step may hold, beside the state, an item of JSON (Orbax's `JsonSave`) that is called `run`:

    {"stage": "nnx_in_linen", "forms": {"torso": "nnx", "critic": "linen"}, "rules": {...}}

It says in which form each part of the model is, and the rule book by which a part changes form. So
such a state is converted to every stage with no more said. `ported` may be in it, too: the parts
that are nnx at the hybrid stages, where the forms do not show it; by default the first.

What else belongs to a run (its folders, its configuration, its metrics) is known to the code that
writes it. That code gives a `Runs` of its own, which `linen_nnx.cli.program` and `convert` take.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from linen_nnx.book.reading import read_json
from linen_nnx.book.rules import RuleBook
from linen_nnx.book.stages import STAGES, Forms, forms_at
from linen_nnx.disk import checked
from linen_nnx.disk.checked import StoreError

ITEM = "run"
"""The name of the item in which a checkpoint says what it is."""


@dataclass(frozen=True)
class Said:
    """What a checkpoint says of itself.

    Attributes:
      stage: the stage that it was saved at.
      forms: the form of each part.
      rules: its rule book, in plain values.
      content: all that the item holds.
    """

    stage: str
    forms: Forms
    rules: Any
    content: dict[str, Any]

    def at(self, stage: str) -> Forms:
        """The form of each part when this checkpoint has come to a stage.

        Example:
          >>> said = Said("linen", {"torso": "linen", "critic": "linen"}, rules=None, content={})
          >>> said.at("nnx_in_linen")
          {'torso': 'nnx', 'critic': 'linen'}
        """
        if stage == self.stage:
            return self.forms
        ported = self.content.get("ported")
        if ported is None:
            # At a hybrid stage the forms show which parts are ported. Where all are of one form
            # they show nothing, and the first part is what a ladder ports first.
            ported = [part for part, side in self.forms.items() if side == "nnx"]
            if len(ported) in (0, len(self.forms)):
                ported = list(self.forms)[:1]
        return forms_at(stage, self.forms, ported)


class Runs:
    """How a training code keeps its runs on disk: this class knows no run directories.

    Derive from it where run directories are to be converted whole. Nothing here needs jax.

    Example:
      >>> class Mine(Runs):
      ...     def roots(self, path):
      ...         return ("states",) if (path / "states").is_dir() else ()
      ...     def taken(self, path):
      ...         return [path / "curve.csv"]
      >>> Mine().taken(Path("runs/1"))
      [PosixPath('runs/1/curve.csv')]

    With it, `convert("runs/1", "runs/2", "nnx", runs=Mine())` converts the latest step in
    `states`, and copies `curve.csv`.
    """

    def forms(self, content: Mapping[str, Any]) -> Any:
        """The form of each part, by the content of an item `run`; None if it says nothing of it.

        A code whose older checkpoints say it in other words derives it here.
        """
        return content.get("forms")

    def roots(self, path: Path) -> tuple[str, ...]:
        """The folders of a run directory that hold steps, that of the latest first.

        Empty if `path` is no run directory.
        """
        return ()

    def folder(self, path: Path, root: str) -> Path:
        """Where the steps of one of these lie; a run may keep them elsewhere."""
        return path / root

    def taken(self, path: Path) -> list[Path]:
        """The files of a run directory that go along as they are."""
        return []

    def moved(self, content: Mapping[str, Any], stage: str) -> dict[str, Any]:
        """The content of an item `run` for the same state at another stage.

        `stage`, `forms` and `rules` are seen to.
        """
        return dict(content)

    def write(self, path: Path, out: Path, stage: str, book: RuleBook) -> None:
        """Writes what else a run directory holds, for the same run at another stage.

        Raises:
          StoreError: for files that are not as this code writes them.
        """

    def check(self, path: Path, step: int, content: Mapping[str, Any]) -> bool:
        """Compares the files of a run directory with what a checkpoint of it says of them.

        Returns:
          Whether it says anything of them.

        Raises:
          Refusal: with everything that differs.
        """
        return False


NO_RUNS = Runs()
"""The runs of no training code: every folder is a checkpoint, or holds some."""


def said_in(folder: Path, runs: Runs) -> Said | None:
    """What the step in a folder says of itself, if it does.

    Raises:
      StoreError: for an item that cannot be read, or that says what cannot be.
    """
    file = folder / ITEM / "metadata"
    if not file.is_file():
        return None
    try:
        content = read_json(file)
        # Other programs may have an item of that name. What lacks these two is theirs, and is
        # taken along as any item is.
        if not isinstance(content, dict) or not content.keys() >= {"stage", "rules"}:
            return None
        checked.plain(content)
        forms = runs.forms(content)
        if forms is None:
            return None
        stage = checked.text(content["stage"])
        if stage not in STAGES:
            raise ValueError(f"there is no stage {checked.shown(stage)}")
        _check_forms(forms)
        if content.get("ported") is not None:
            for part in checked.sequence(content["ported"]):
                checked.text(part)
    except ValueError as error:
        raise StoreError(f"{file} cannot be read: {error}") from None
    return Said(stage, forms, content["rules"], content)


def _check_forms(forms: Any) -> None:
    """Raises `ValueError` for what does not say `linen` or `nnx` of at least one part."""
    if not checked.mapping(forms):
        raise ValueError("`forms` names no part")
    for part, side in forms.items():
        checked.text(part)
        if side not in ("linen", "nnx"):
            raise ValueError(f"`forms` has {checked.shown(side)} for part {checked.shown(part)}")
