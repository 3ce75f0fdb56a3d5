"""How to call the programs of the environment that a run is in, and how to add to it.

Who has typed `make train` has no environment activated, and no `tensorboard` on the path: what a
run tells people to type has to work there as it stands.
"""

import os
import shlex
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def program(name: str) -> str:
    """What to type for a program of this environment: its name, or its path where a shell would
    find none or another one by the name.

    Example:
      >>> program("tensorboard").endswith("tensorboard")
      True
    """
    # Not resolved: the interpreter of an environment is a link to one outside of it.
    own = Path(sys.executable)
    if name != "python":
        own = own.with_name(name)
    found = shutil.which(name)
    if found is not None and Path(found).parent.samefile(own.parent):
        return name
    near = os.path.relpath(own)
    return shlex.quote(str(own) if near.startswith("..") else near)


def installation(what: str) -> str:
    """The command that adds a package, or an extra of this project, in the versions of the others.

    Args:
        what: as pip takes it: `xprof`, `-e '.[wandb]'`.

    Example:
      >>> installation("xprof").endswith("xprof")
      True
    """
    # As the Makefile chooses it: each Python has the versions that were tested with it.
    pins = f"constraints-py{311 if sys.version_info < (3, 12) else 312}.txt"
    pinned = f"-c {pins} " if (ROOT / pins).exists() else ""
    return f"{program('python')} -m pip install {pinned}{what}"
