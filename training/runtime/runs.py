"""What the converter must know of this template's runs; `convert.py` hands it over.

    RUN/config.yaml, rules.yaml      the configuration and the rule book, which a change of stage
                                     writes anew
    RUN/metrics.jsonl                the curve, which goes along as it is
    HOME/checkpoints/<step>/         the latest steps, each with its item `run`
    HOME/best/<step>/                the best one

`HOME` is the run directory, or what its `config.yaml` names as `checkpoint.dir`. A converted run
has all of them in its run directory. A home alone, without the files of a run, is converted to one.

Nothing here imports jax.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from linen_nnx import RuleBook
from linen_nnx.book.reading import read_text
from linen_nnx.book.stages import STAGES, forms_at
from linen_nnx.disk import checked, runs
from linen_nnx.disk.checked import StoreError

from configs.earlier import HALVES
from training.runtime import homes, metrics, vouching

# In the section `checkpoint` of `config.yaml`; a long name is folded by the writer.
HOME = re.compile(r"(?m)^(checkpoint:\n(?:  .*\n)*?  dir:).*(?:\n+    .*)*$")


class Runs(runs.Runs):
    """The run directories of this template, those of earlier versions too."""

    def forms(self, content: Mapping[str, Any]) -> Any:
        """As the item says; runs that do not say it have an encoder and a head."""
        if "config" in content:
            checked.mapping(content["config"])
            if "forms" not in content and checked.text(content["stage"]) in STAGES:
                return forms_at(content["stage"], HALVES, HALVES[:1])
        return content.get("forms")

    def roots(self, path: Path) -> tuple[str, ...]:
        """Those of a directory whose steps say of which run they are."""
        said = self.folder(path, homes.ROOTS[0]).glob(f"*/{runs.ITEM}/metadata")
        return homes.ROOTS if any(said) else ()

    def folder(self, path: Path, root: str) -> Path:
        """In the run's home."""
        return homes.known(path) / root

    def taken(self, path: Path) -> list[Path]:
        """The metrics."""
        file = path / metrics.FILE
        return [file] if file.is_file() else []

    def moved(self, content: Mapping[str, Any], stage: str) -> dict[str, Any]:
        """The configuration has the stage, too, and says that the checkpoints lie with the run."""
        if "config" not in content:
            return dict(content)
        return {**content, "config": homes.moved_in({**content["config"], "stage": stage})}

    def write(self, path: Path, out: Path, stage: str, book: RuleBook) -> None:
        """Configuration and rule book; nothing of a home alone, where its checkpoints say both."""
        if not vouching.has_files(path):
            return
        file = path / vouching.CONFIG
        try:
            text = read_text(file)
        except ValueError as error:
            raise StoreError(f"{file} cannot be read: {error}") from None
        # A substitution and no YAML written anew, so that the rest of the file stays as it is, byte
        # for byte.
        config, count = re.subn(r"(?m)^stage:.*$", f"stage: {stage}", text)
        if count != 1:
            raise StoreError(f"{file} has {count} lines `stage: ...`, expected one")
        (out / vouching.CONFIG).write_text(HOME.sub(r"\1 null", config))
        if (kept := homes.noted(out)) is not None and kept != out:
            raise StoreError(
                f"{file} says that the checkpoints are in {kept}, but not in a line `dir: ...` "
                "below `checkpoint:` as a run writes it"
            )
        book.save(out / vouching.RULES)

    def check(self, path: Path, step: int, content: Mapping[str, Any]) -> bool:
        """See `vouching.check`."""
        if "config" not in content or not vouching.has_files(path):
            return False
        return vouching.check(path, step, content)


RUNS = Runs()
