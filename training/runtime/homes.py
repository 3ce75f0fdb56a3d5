"""Where the checkpoints of a run lie: in its run directory, or in another folder or a bucket.

    python train.py run_dir=runs/a                              runs/a/checkpoints/600/
                                                                runs/a/best/500/
    python train.py run_dir=runs/a checkpoint.dir=gs://team/a   gs://team/a/checkpoints/600/
                                                                gs://team/a/best/500/

The folder that has `checkpoints/` and `best/` is the run's home. All else of a run stays in its
run directory, and `config.yaml` there says where home is: by that file, everything that is given a
run directory finds the checkpoints. Nothing here imports jax.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from socket import gethostname
from typing import Any
from uuid import uuid4

from linen_nnx.disk.remote import Remote, as_path

from configs.earlier import upgraded
from training.runtime import reading, vouching
from training.runtime.errors import Refused

ROOTS = ("checkpoints", "best")  # of a home
OWNER = "home.json"  # says whose a home in a bucket is
OWNER_PART = "home.part"  # the same while it is being written
OWNER_SHOWN = 300  # characters of it


def home(run_dir: str | Path, asked: str | None) -> Path:
    """The home of a run that was asked for with this `checkpoint.dir`.

    Example:
      >>> home("runs/a", None), str(home("runs/a", "gs://team/a"))
      (PosixPath('runs/a'), 'gs://team/a')
    """
    return as_path(run_dir if asked is None else asked)


def noted(run_dir: Path) -> Path | None:
    """The home that a run's `config.yaml` says; None where there is none that can be read."""
    file = run_dir / vouching.CONFIG
    if not file.is_file():
        return None
    try:
        config = upgraded(reading.yaml_mapping(file))
    except (OSError, ValueError):  # which is told where the file is compared or needed
        return None
    return home(run_dir, _dir_in(config))


def known(path: Path) -> Path:
    """The home of a run directory, by its `config.yaml`; any other path is its own."""
    return noted(path) or path


def check(run_dir: Path, asked: Path) -> None:
    """Refuses another home than the one that a run already has.

    Raises:
        Refused: the run would begin anew beside its own checkpoints.
    """
    has = noted(run_dir)
    if has is None or has.absolute() == asked.absolute():
        return
    key = "checkpoint.dir left out" if has == run_dir else f"checkpoint.dir={has}"
    raise Refused(
        f"The checkpoints of {run_dir} are in {has}, and {asked} was asked for: give {key}. If you "
        f"have moved them, say so in {run_dir / vouching.CONFIG}, under `checkpoint`."
    )


def claim(run_dir: Path, home: Path) -> None:
    """Makes a home in a bucket this run's own: Orbax would replace another's steps there.

    A disk has locks. Here an object says whose the home is, put only where there is none, and a
    file with the same bytes in the run directory says that it is this run's.

    Raises:
        Refused: when it is another run's.
    """
    if not isinstance(home, Remote):
        return
    ours, theirs = run_dir / OWNER, home / OWNER
    is_new = not ours.exists()
    if is_new:
        who = {"run_dir": str(run_dir.absolute()), "machine": gethostname(), "id": uuid4().hex}
        part = run_dir / OWNER_PART
        part.write_text(json.dumps(who))
        part.replace(ours)
    content = ours.read_bytes()
    with suppress(FileExistsError):
        theirs.bucket.create(theirs.key, content)
        return
    found = theirs.bucket.read(theirs.key)
    if found != content:
        if is_new:
            ours.unlink()  # a run that is refused leaves nothing
        named = found[:OWNER_SHOWN].decode(errors="replace")
        raise Refused(
            f"{home} holds the checkpoints of another run, by {theirs}: {named}. Choose another "
            "checkpoint.dir; or remove that object, if that run is no more."
        )


def moved_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration of a run whose checkpoints have come into its run directory."""
    if _dir_in(config) is None:
        return dict(config)
    return {**config, "checkpoint": {**config["checkpoint"], "dir": None}}


def is_inside(path: Path, run_dir: Path) -> bool:
    """Whether a home lies below a run directory, on its disk."""
    return not isinstance(path, Remote) and run_dir.absolute() in path.absolute().parents


def _dir_in(config: Mapping[str, Any]) -> str | None:
    section = config.get("checkpoint")
    found = section.get("dir") if isinstance(section, Mapping) else None
    return found if isinstance(found, str) else None
