"""From the command line to a checked `Config`, and from an error to one message.

`run(main)` is the whole of an entry script: Hydra composes the configuration (with `--multirun`,
`--cfg job`, shell completion and all), `configs.build` checks it, and `main(config)` gets frozen
dataclasses. A usage error ends with exit code 2, any other `Refusal` with 1, both with a message
alone; any other exception is a bug and keeps its traceback. Nothing here imports jax.
"""

import os
import re
import shlex
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeVar

import yaml
from linen_nnx.errors import Refusal

from configs.build import ConfigError, build, did_you_mean, paths, show
from training.runtime.environment import program

T = TypeVar("T")

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
VERSIONS = ("linen-nnx", "jax", "flax", "optax", "orbax-checkpoint")  # that --version tells
# By group of the configuration: raises `ConfigError` for what is wrong with that mapping.
Checks = Mapping[str, Callable[[Mapping[str, Any]], object]]

USAGE = """\
usage: python train.py [experiment=NAME] [stage=STAGE] [run_dir=DIR] [steps=N]
                       [stop_at=K] [seed=N] [log_every=N] [resume=HOW]
                       [init_from=PATH] [key=value ...]

Trains the model of an experiment at one stage of the migration from Linen to
NNX. The same command again resumes the run. run_dir holds config.yaml,
metrics.jsonl, TensorBoard events, checkpoints/.

  python train.py                              the default experiment
  python train.py experiment=digits stage=nnx  another one, at another stage
  python train.py stop_at=300                  stop early; same schedules
  python train.py stage=nnx init_from=RUN      go on from RUN at another stage
  python train.py mode=eval                    how good the checkpoints are
  python train.py mode=export                  the model alone
  python train.py debug=one_step               the whole path once
  python train.py --cfg job                    show the configuration, no more
  python train.py --config-dir DIR ...         with a tree like configs/ in DIR
  python train.py --multirun stage=linen,nnx   several runs, one after another
  python train.py --version                    of the library, jax and others
  python train.py --hydra-help                 the flags of Hydra
"""


def run(
    main: Callable[[Any], float | None],
    schema: type,
    checks: Checks = MappingProxyType({}),
    results: Callable[[list[Path]], None] = lambda runs: None,
) -> None:
    """Composes the configuration that `sys.argv` asks for, checks it, and calls `main` with it.

    Args:
      main: the program; called once, or once per job of a `--multirun`. Sweepers minimise what it
        returns.
      checks: what else is to be looked at in the groups of the configuration (`model`, ...), so
        that it is reported together with everything else.
      results: shows the run directories of a `--multirun`, at its end.

    Raises:
      SystemExit: 2 for a usage error, 1 for any other `Refusal`, 130 for a Ctrl-C that nobody has
        dealt with; after a message on stderr.
    """
    # Hydra's own --help prints the composed configuration without a comment.
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_page())
        return
    if "--version" in sys.argv[1:]:
        print(", ".join(f"{name} {metadata.version(name)}" for name in VERSIONS))
        return
    import hydra

    from training.runtime import sweeps

    entered = False
    ran: list[Path] = []

    def job(composed: Any) -> float | None:
        nonlocal entered
        entered = True
        # Not raised further: Hydra would announce a failed job before the message.
        try:
            config = check(composed, schema, checks)
            sweeps.announce(config.run_dir)
            ran.append(Path(config.run_dir))
            return main(config)
        except ConfigError as error:
            _exit(error, 2)
        except Refusal as error:
            _exit(error, 1)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # let exceptions through, for us to report
    try:
        runs = sweeps.plan(_compose)
        hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name="config")(job)()
        # What a sweeper has chosen is known only now; jobs in other processes are not among them.
        if len(runs or ran) > 1:
            results(runs or ran)
    except ConfigError as error:
        _exit(error, 2)
    except Refusal as error:
        _exit(error, 1)
    except KeyboardInterrupt:
        _exit("Interrupted. The same command goes on from the last checkpoint.", 130)
    except Exception as error:
        if entered:
            raise
        _exit(_composition_error(error, schema, checks), 2)


def compose(
    *overrides: str,
    schema: type[T],
    checks: Checks = MappingProxyType({}),
    config_dir: str | Path | None = None,
) -> T:
    """The configuration of `python train.py [--config-dir DIR] *overrides`, without a command line.

    Raises:
      ConfigError: for what `check` finds.
      hydra.errors.HydraException: for overrides that Hydra refuses.
    """
    return check(_compose(overrides, config_dir), schema, checks)


def check(composed: Any, schema: type[T], checks: Checks = MappingProxyType({})) -> T:
    """A composed DictConfig as a `schema`. Raises `ConfigError` with every problem found."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        mapping: Any = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError({str(error.full_key): _first_line(error)}) from None
    # A person corrects a command once: so the schema's findings and those of each group are told
    # together, though the first would suffice to refuse it.
    problems: dict[str, str] = {}
    config = None
    try:
        config = build(schema, mapping)
    except ConfigError as error:
        problems |= error.problems
    for group, check_group in checks.items():
        if isinstance(mapping.get(group), dict):
            try:
                check_group(mapping)
            except ConfigError as error:
                problems = error.problems | problems
    if config is None or problems:
        raise ConfigError(problems)
    return config


def help_page() -> str:
    """What `--help` prints: the usage, then the groups and keys as the files of `configs/` have
    them, comments included."""
    text = [USAGE, "Groups, each choice a file configs/GROUP/CHOICE.yaml:"]
    groups = _groups(CONFIGS)
    for group in sorted(groups, key=lambda group: group != "experiment"):
        for option in groups[group]:
            lines = (CONFIGS / group / f"{option}.yaml").read_text().splitlines()
            about = next(line for line in lines if not line.startswith("# @package"))
            text.append(f"  {group + '=' + option:<22} {about.removeprefix('# ')}")
    # A block of config.yaml that opens with a comment speaks of the file or of Hydra itself.
    blocks = (CONFIGS / "config.yaml").read_text().split("\n\n")
    keys = [block for block in blocks if not block.startswith(("#", "defaults:"))]
    text += ["\nKeys, as in configs/config.yaml:", textwrap.indent("\n".join(keys), "  ")]
    for group, option in _defaults().items():
        if group not in ("experiment", "debug"):
            lines = (CONFIGS / group / f"{option}.yaml").read_text().splitlines()[1:]
            text += [f"\nKeys of {group}={option}:", *(f"  {group}.{line}" for line in lines)]
    return "\n".join(_narrow(line) for line in "\n".join(text).split("\n"))


def _narrow(line: str) -> str:
    """A line of the help page in 80 columns: what does not fit goes on, further to the right."""
    aligned = re.match(r"\s*\S+\s{2,}", line)
    margin = " " * (aligned.end() if aligned else len(line) - len(line.lstrip()) + 6)
    return textwrap.fill(
        line, 80, subsequent_indent=margin, break_long_words=False, break_on_hyphens=False
    )


def command(*changes: str) -> str:
    """The command line of the run at hand, as a person would type it, with other overrides.

    Args:
      changes: `key=value` in place of what the run has for that key; `key=` takes it away.
    """
    from hydra.core.hydra_config import HydraConfig

    words = ["train.py"]
    changed: dict[str, str] = {}
    for change in changes:
        key, _, value = change.partition("=")
        changed[key] = value
    overrides: dict[str, str] = {}  # the last one for each key, as Hydra takes it
    if HydraConfig.initialized():
        composed = HydraConfig.get()
        overrides = {text.partition("=")[0]: text for text in composed.overrides.task}
        for source in composed.runtime.config_sources:
            if source.provider == "command-line":
                words += ["--config-dir", source.path.removeprefix("file://")]
    kept = [text for key, text in overrides.items() if key not in changed]
    words += [*kept, *(f"{key}={value}" for key, value in changed.items() if value)]
    return f"{program('python')} {shlex.join(words)}"


def _compose(overrides: Sequence[str], config_dir: str | Path | None) -> Any:
    """The DictConfig of these overrides, still with its interpolations."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict

    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3", job_name="train"):
        more = []
        if config_dir is not None:
            more.append(f"hydra.searchpath=['file://{Path(config_dir).resolve()}']")
        composed = hydra.compose("config", [*more, *overrides], return_hydra_config=True)
    HydraConfig.instance().set_config(composed)  # what ${hydra:...} reads
    with open_dict(composed):
        del composed["hydra"]
    return composed


def _composition_error(error: Exception, schema: type, checks: Checks) -> ConfigError:
    """What Hydra could not compose, as our own error."""
    from hydra._internal.utils import get_args_parser
    from hydra.errors import MissingConfigException, OverrideParseException

    if isinstance(error, OverrideParseException):
        hint = "expected key=value, with text that holds any of =,:{}[]() in quotes: 'key=\"a=b\"'"
        key = repr(error.override)
        return ConfigError({key: f"cannot be read ({_first_line(error)}); {hint}"})
    # The exception says what could not be composed, and not which words asked for it.
    args = get_args_parser().parse_args()
    problems = {}
    if not (args.config_path or args.config_name):
        problems = _override_problems(args.overrides, args.config_dir, schema, checks)
    message = str(error).split("\n\n")[0].replace("\n", "\n    ")
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        message += did_you_mean(error.missing_cfg_file.rpartition("/")[2], error.options)
    return ConfigError(problems or {"configs": message})


def _override_problems(
    overrides: Sequence[str], config_dir: str | None, schema: type, checks: Checks
) -> dict[str, str]:
    """Which overrides name a choice or a key that does not exist, and what `check` says of the
    others; nothing, if the fault is not theirs."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    groups = _groups(CONFIGS, *([config_dir] if config_dir else []))
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    problems = {}
    for x in parsed:
        value = x.value()
        if x.key_or_group in groups and not x.is_delete():
            options = groups[x.key_or_group]
            if isinstance(value, (str, bool, int, float, type(None))) and value not in options:
                known = did_you_mean(str(value), options)
                problems[x.key_or_group] = f"got {show(value)}{known}"
    if problems:
        return problems  # which keys there are depends on the choices
    try:
        chosen = [x.input_line or "" for x in parsed if x.key_or_group in groups]
        # Unresolved, for an interpolation may fail because of the very override that is looked for.
        unresolved: Any = OmegaConf.to_container(_compose(chosen, config_dir))
        known = [*groups, *paths(unresolved)]
        for x in parsed:
            key = x.key_or_group
            if key not in known and not x.is_add() and not key.startswith("hydra"):
                problems[key] = "unknown key" + did_you_mean(key, known)
        right = [x.input_line or "" for x in parsed if x.key_or_group not in problems]
        check(_compose(right, config_dir), schema, checks)
    except ConfigError as error:
        problems |= error.problems
    except Exception:
        pass  # composing fails for a reason that the first exception has told
    return problems


def _defaults() -> dict[str, str]:
    """The config groups and the option of each that config.yaml chooses."""
    entries = yaml.safe_load((CONFIGS / "config.yaml").read_text())["defaults"]
    chosen = [pair for entry in entries if isinstance(entry, dict) for pair in entry.items()]
    return {group: option for group, option in chosen if not group.startswith("override ")}


def _groups(*folders: str | Path) -> dict[str, list[str]]:
    """The options of each config group, in some folders."""
    groups = {}
    for group in _defaults():
        files = [file for folder in folders for file in Path(folder, group).glob("*.yaml")]
        groups[group] = sorted(file.stem for file in files)
    return groups


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if not line.startswith("Error parsing")]
    return lines[0]


def _exit(error: Exception | str, code: int) -> NoReturn:
    from training.runtime.terminal import for_errors  # which takes time, and few commands need it

    print(for_errors(error), file=sys.stderr)
    if code == 2:
        print(f"Keys and what they mean: {program('python')} train.py --help", file=sys.stderr)
    raise SystemExit(code)
