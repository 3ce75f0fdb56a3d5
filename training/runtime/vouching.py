"""What a checkpoint says of the files beside it in a run directory, and whether they still are so.

The item `run` of a checkpoint, covered by the checkpoint's own digests, holds the configuration and
the rule book, and the digests of every row of `metrics.jsonl` up to its step. So each checkpoint
vouches for `config.yaml`, `rules.yaml` and `metrics.jsonl`, and a row lost or a bit flipped is
found before a run goes on, is evaluated or converted. Nothing here imports jax.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from linen_nnx import RuleBook

from configs.earlier import upgraded
from training.runtime import metrics, reading, tally
from training.runtime.errors import Refused

CONFIG, RULES = "config.yaml", "rules.yaml"
RECORDED = ("numerics", "surroundings", "stages")  # there beside the keys of a configuration

# What may change when a run goes on; everything else would bend its curve.
FREE = (
    "stop_at", "log_every", "resume", "init_from", "init_rules", "init_optimizer", "run_dir",
    "eval", "checkpoint", "log", "mesh", "distributed", "compile_cache", "mode",
    "surroundings", "stages",
)  # fmt: skip


def runs_below(paths: Iterable[Path]) -> list[Path]:
    """The run directories at or below the paths, sorted, each once.

    Raises:
        Refused: when there is none.
    """
    runs = sorted({file.parent for path in paths for file in path.rglob(CONFIG)})
    if not runs:
        raise Refused(f"There is no run ({CONFIG}) below {', '.join(map(str, paths))}.")
    return runs


def has_files(path: Path) -> bool:
    """Whether a folder has any of the files that checkpoints vouch for.

    The home of a run has none, where it is not the run directory.
    """
    return any((path / name).is_file() for name in (CONFIG, RULES, metrics.FILE))


def check(
    run_dir: Path, step: int, run: Mapping[str, Any], rules: Mapping[str, Any] | None = None
) -> bool:
    """Compares the files of a run directory with what one of its checkpoints says of them.

    Args:
        run_dir: the directory.
        step: the checkpoint's step.
        run: its item `run`.
        rules: another rule book that `rules.yaml` may be: what the family has now, which a run
            writes when it goes on and a checkpoint knows a while later.

    Returns:
        False where the checkpoint says nothing of its metrics: it is older than that.

    Raises:
        Refused: naming every row and key that differs, and what to do.
    """
    with reading.named(run_dir / metrics.FILE):
        lost = [(metrics.FILE, text) for text in lost_rows(run_dir, step, run)]
    changed = [*_of_config(run_dir, run), *_of_rules(run_dir, run, rules)]
    if not lost and not changed:
        return "metrics" in run
    problems = [f"  {file}: {text}" for file, text in lost + changed]
    # The two kinds have other remedies: what the run writes itself can be removed, rows cannot.
    advice = []
    if changed:
        files = " and ".join(sorted({file for file, _ in changed}))
        advice.append(f"Remove {files}: when the run goes on, it writes that anew.")
    if lost:
        advice.append(
            f"Put {metrics.FILE} back from a copy; or go on from this state without its past, with "
            f"init_from={run_dir} and another run_dir; or take the rows as they are, with "
            "checkpoint.verify=false."
        )
    raise Refused(
        f"{run_dir} is not as its checkpoint of step {step} says:\n"
        + "\n".join([*problems, *advice])
    )


def config_of(run: Mapping[str, Any]) -> dict[str, Any]:
    """What `config.yaml` holds, as a checkpoint's item `run` has it."""
    return {**run["config"], **{name: run[name] for name in RECORDED if name in run}}


def check_item(run: Mapping[str, Any]) -> None:
    """Raises `ValueError` where the item `run` of a checkpoint is not what a run writes."""
    if not isinstance(run.get("config"), dict) or "stage" not in run or "rules" not in run:
        raise ValueError("it has no config, stage and rules")
    if run["rules"] is not None and not isinstance(run["rules"], dict):
        raise ValueError("its rules are no mapping")
    check_recorded(run)
    if "metrics" in run:
        tally.check(run["metrics"])


def check_recorded(content: Mapping[str, Any]) -> None:
    """The same of what an item `run` and `config.yaml` have in common."""
    for name in RECORDED:
        section = content.get(name, {})
        if not isinstance(section, dict) or any(isinstance(v, dict) for v in section.values()):
            raise ValueError(f"its {name} are no mapping of plain values")
    for step, stage in content.get("stages", {"0": ""}).items() or [("", "")]:
        if not str(step).isdecimal() or not isinstance(stage, str):
            raise ValueError("its stages are no mapping of steps to stages")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys in which two configurations differ, with both values; "absent" for a missing one.

    Example:
      >>> changes({"a": {"b": 1, "c": 2}}, {"a": {"b": 3, "c": 2}, "d": 4})
      {'a.b': (1, 3), 'd': ('absent', 4)}
    """
    old, new = flat(before), flat(now)
    # "absent" is no value of any key, where None is one.
    pairs = {key: (old.get(key, "absent"), new.get(key, "absent")) for key in sorted({*old, *new})}
    return {key: (was, is_) for key, (was, is_) in pairs.items() if was != is_}


def flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys."""
    values: dict[str, Any] = {}
    for name, value in mapping.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            values |= flat(value, f"{key}.")
        else:
            values[key] = value
    return values


def is_free(key: str) -> bool:
    """Whether this key, dotted, may change when a run goes on."""
    return key.split(".")[0] in FREE


def _of_config(run_dir: Path, run: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    path = run_dir / CONFIG
    if not path.exists():
        return
    try:
        found = reading.yaml_mapping(path)
    except (OSError, ValueError) as error:
        yield CONFIG, f"cannot be read: {error}"
        return
    for key, (said, is_) in changes(upgraded(config_of(run)), upgraded(found)).items():
        if not is_free(key):
            yield CONFIG, f"{key} is {is_}, and was {said}"


def _of_rules(
    run_dir: Path, run: Mapping[str, Any], other: Mapping[str, Any] | None
) -> Iterator[tuple[str, str]]:
    path = run_dir / RULES
    if run["rules"] is None or not path.exists():
        return
    try:
        found = RuleBook.load(path).to_dict()
    except (OSError, ValueError) as error:
        yield RULES, f"cannot be read: {error}"
        return
    if found not in (run["rules"], other):
        yield RULES, "is another rule book than the checkpoint's"


def lost_rows(run_dir: Path, step: int, run: Mapping[str, Any]) -> list[str]:
    """In which rows the metrics of a run are not as its checkpoint of this step says."""
    noted = run.get("metrics")
    if noted is None:
        return []
    path = run_dir / metrics.FILE
    if not path.exists():
        rows = noted["rows"]
        return [f"is missing; it had {rows} rows up to step {step}"] if rows else []
    found = [(line, metrics.step_of(line)) for line in reading.whole_lines(path)]
    # The rows after that step are another checkpoint's, or will be drawn again.
    within = [index for index, (_, at) in enumerate(found, 1) if at is None or at <= step]
    rows = [(line, at or 0) for line, at in found[: max(within, default=0)]]
    return tally.differences(noted, rows)
