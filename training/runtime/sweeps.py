"""Several runs by one command (`--multirun`): how many there are, and where each one goes.

    python train.py -m optimizer.lr=1e-3,1e-2 'run_dir=runs/lr${optimizer.lr}'
    job 1 of 2: runs/lr0.001
    ...
    job 2 of 2: runs/lr0.01

A sweep whose jobs would share a run directory is refused before the first job: the second one would
only be told that the directory belongs to another run, when the first has been paid for. So is one
whose jobs would share a `checkpoint.dir`.
"""

import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from configs.build import ConfigError

BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
JOBS = "TRAIN_JOBS"  # in the environment, for jobs may run in processes of their own


def plan(compose: Callable[[Sequence[str], str | None], Any]) -> list[Path]:
    """The run directory of each job that the command line asks for; none where it asks for no
    `--multirun`, or a sweeper chooses the jobs as it goes.

    Args:
      compose: overrides and `--config-dir` -> the configuration.

    Raises:
      ConfigError: when two jobs would share a run directory, or a folder of checkpoints.
    """
    from hydra._internal.utils import get_args_parser
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    args = get_args_parser().parse_args()
    # --cfg shows a configuration, and runs nothing that could meet in a folder.
    if not args.multirun or args.cfg or args.info:
        return []
    parse = OverridesParser.create().parse_overrides
    try:
        overrides = parse(args.overrides)
        # The experiment may bring sweeps of its own, so it is composed before they can be counted.
        fixed = [x.input_line or "" for x in overrides if not x.is_sweep_override()]
        compose(fixed, args.config_dir)
        sweeper = HydraConfig.get().sweeper
        own = parse([f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()])
        given = {x.get_key_element() for x in overrides}
        swept = [x for x in own if x.get_key_element() not in given]
        swept += [x for x in overrides if x.is_sweep_override()]
        is_basic = sweeper["_target_"] == BASIC
        choices = [_values(x, is_basic) for x in swept]
        jobs = list(itertools.product(*choices))
        places: list[Path] = []
        homes: list[str | None] = []
        for job in jobs:
            # Asked at once: what a path interpolates is that of the job composed last.
            composed = compose([*fixed, *job], args.config_dir)
            places.append(Path(composed.run_dir))
            homes.append(composed.checkpoint.dir)
    except (HydraException, OmegaConfBaseException):
        # Hydra will meet the same and report it; or a folder is named after the job's number.
        return []
    keys = [x.get_key_element() for x in swept]
    _refuse_shared("run_dir", [str(place) for place in places], keys)
    _refuse_shared("checkpoint.dir", homes, keys)
    if not is_basic:
        if "n_trials" in sweeper:
            os.environ[JOBS] = str(sweeper["n_trials"])
        return []
    # Hydra tells a job its own number and not how many there are.
    os.environ[JOBS] = str(len(jobs))
    return places


def announce(run_dir: str) -> None:
    """Says which job of how many begins; nothing where there is only one."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return
    total = f" of {os.environ[JOBS]}" if JOBS in os.environ else ""
    print(f"job {HydraConfig.get().job.num + 1}{total}: {run_dir}", flush=True)


def _values(override: Any, is_basic: bool) -> list[str]:
    """The overrides that a sweep over one key stands for. Of what a sweeper chooses from, the two
    ends: where both lead to one run directory, so does all between them."""
    key, sweep = override.get_key_element(), override.value()
    if not override.is_sweep_override():
        return [f"{key}={override.get_value_element_as_str()}"]
    if override.is_interval_sweep():
        return [f"{key}={sweep.start}", f"{key}={sweep.end}"]
    values = [f"{key}={value}" for value in override.sweep_string_iterator()]
    return values if is_basic else [values[0], values[-1]]


def _refuse_shared(key: str, places: Sequence[str | None], keys: list[str]) -> None:
    shared = sorted({place for place in places if place is not None and places.count(place) > 1})
    if not shared:
        return
    first = shared[0]
    numbers = [str(number) for number, place in enumerate(places, 1) if place == first]
    varying = "-".join(f"{key.rpartition('.')[2]}${{{key}}}" for key in keys)
    raise ConfigError(
        {
            key: (
                f"got {first} for jobs {', '.join(numbers)} of {len(places)}; expected a folder "
                f"for each job: name what varies, as in '{key}=runs/sweep/{varying}'"
            )
        }
    )
