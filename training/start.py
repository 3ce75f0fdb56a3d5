"""Where a run starts: the one place that decides between resume, init_from and scratch.

    1. its own run directory holds a checkpoint: go on from it (resume=auto or must), unless it is
       a debug run that has come to its last step, which begins anew (resume=auto);
    2. else `init_from`: take the whole state of another run, at whatever stage, and go on from it;
    3. else scratch.

Nothing is written before every check has passed.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import yaml

from configs.earlier import upgraded
from configs.schema import Config
from linen_nnx import RuleBook
from model import families
from model.stages import Stage, check
from training import checkpoints, metrics, numerics, processes, reading, vouching
from training.data import TrainIterator
from training.errors import Refused
from training.leaves import named
from training.state import Program, State, translate_state
from training.terminal import say

CONFIG_PART = "config.yaml.part"  # config.yaml while it is being written


def load_rules(cfg: Config, family: families.Family) -> RuleBook | None:
    """The family's rule book; None where it has none and the run needs none."""
    if not family.rules_path.exists():
        if (cfg.stage, cfg.init) == ("nnx", "native"):
            return None
        raise Refused(
            f"There is no rule book {family.rules_path}, which stage={cfg.stage} init={cfg.init} "
            "needs to tell which Linen leaf is which nnx leaf. Write it (configs/rules/mlp.yaml is "
            "the smallest), or train with stage=nnx init=native, which needs none."
        )
    book = RuleBook.load(family.rules_path)
    if not book.invertible:
        raise Refused(
            f"{family.rules_path} has rules that lose or change values (drop, init, scale); a "
            "family's stages need rules that lead back bit for bit."
        )
    return book


def find(cfg: Config, rules: RuleBook | None) -> checkpoints.Saved | None:
    """The checkpoint that the run goes on from; None to start from scratch.

    Args:
        cfg: the run.
        rules: the family's rule book.

    Raises:
        Refused: when the run directory belongs to another run, or what was asked for is missing or
            damaged.
    """
    with processes.together():
        saved = _own(cfg, Path(cfg.run_dir), rules)
        if saved is None and cfg.init_from is not None:
            saved = _foreign(cfg, Path(cfg.init_from))
        return saved


def begin(
    cfg: Config, program: Program, batches: TrainIterator, saved: checkpoints.Saved | None
) -> State:
    """The state the run starts from, with the data iterator moved to the same step.

    Raises:
        Refused, VariablesError, RuleError: when `saved` does not fit the run.
    """
    if saved is None:
        return program.init()
    own = saved.path.parent == Path(cfg.run_dir).absolute() / "checkpoints"
    state = saved.restore(program.abstract) if own else _translated(cfg, program, saved)
    if cfg.debug.mode != "overfit":  # which stays at the first batch
        try:
            batches.set_state(saved.data)
        except Refused as error:
            raise Refused(f"{saved.path / 'data'}: {error}") from None
    return state


def run_item(cfg: Config, rules: RuleBook | None) -> dict[str, Any]:
    """What a checkpoint says of its run, in plain values: config, stage, rules, and with which
    settings of JAX and where it is computed."""
    return {
        "config": dataclasses.asdict(cfg),
        "stage": cfg.stage,
        "rules": None if rules is None else rules.to_dict(),
        **numerics.recorded(),
    }


def write_run(cfg: Config, rules: RuleBook | None) -> None:
    """Writes `config.yaml` and `rules.yaml` into the run directory, or brings them up to date.

    Args:
        cfg, rules: what is written.
    """
    if not processes.first():
        return
    run_dir = Path(cfg.run_dir)
    content = vouching.config_of(run_item(cfg, rules))
    part = run_dir / CONFIG_PART
    part.write_text(yaml.safe_dump(content, sort_keys=False))
    part.replace(run_dir / vouching.CONFIG)
    if rules is not None:
        rules.save(run_dir / vouching.RULES)


def _own(cfg: Config, run_dir: Path, rules: RuleBook | None) -> checkpoints.Saved | None:
    """The newest checkpoint of the run directory, if the run may go on from it."""
    # A run that was killed while it wrote its first file has begun nothing.
    if {entry.name for entry in run_dir.iterdir()} <= {CONFIG_PART}:
        if cfg.resume == "must":
            raise Refused(f"resume=must, but there is no run in {run_dir}.")
        return None
    if cfg.resume == "never":
        raise Refused(
            f"resume=never, but {run_dir} already holds a run. Nothing is overwritten here: choose "
            "another run_dir, or remove that folder yourself."
        )
    saved = checkpoints.latest(run_dir / "checkpoints")
    if saved is not None:
        _verify(cfg, saved, None if rules is None else rules.to_dict())
        before = vouching.config_of(saved.run)
    else:
        before = _config_file(run_dir)
    _compare_runs(upgraded(before), {**dataclasses.asdict(cfg), **numerics.recorded()}, run_dir)
    if saved is None and cfg.resume == "must":
        raise Refused(f"resume=must, but the run in {run_dir} has not saved a checkpoint yet.")
    if saved is not None and _begins_anew(cfg, saved.step):
        say(f"debug={cfg.debug.mode}: the run in {run_dir} has ended, and begins anew.")
        return None
    return saved


def _config_file(run_dir: Path) -> dict[str, Any]:
    """The configuration of a run that has saved nothing yet."""
    file = run_dir / vouching.CONFIG
    if not file.exists():
        raise Refused(
            f"{run_dir} is not empty and holds no run (no config.yaml). Choose another run_dir."
        )
    with reading.named(file, "No checkpoint was saved: remove the file, and the run begins anew."):
        content = reading.yaml_mapping(file)
        vouching.check_recorded(content)
        return content


def _verify(cfg: Config, saved: checkpoints.Saved, rules: dict[str, Any] | None) -> None:
    """Compares the checkpoint of this run, and the files beside it, with their digests."""
    if not cfg.checkpoint.verify:
        say(f"checkpoint.verify=false: {saved.path} and {metrics.FILE} are taken as they are.")
    elif processes.first():  # which reads every byte, for all of them
        saved.intact(rules)


def _begins_anew(cfg: Config, step: int) -> bool:
    """Whether the run is for debugging alone, and has come to its end with this step."""
    is_debug = cfg.debug.mode != "none" and cfg.resume == "auto"
    return is_debug and step == (cfg.stop_at or cfg.steps)


def _foreign(cfg: Config, path: Path) -> checkpoints.Saved:
    """The checkpoint that `init_from` names, if something is left to train."""
    saved, last = checkpoints.find(path), cfg.stop_at or cfg.steps
    if saved.step >= last:
        raise Refused(
            f"init_from {saved.path} is at step {saved.step}, and this run ends at step {last}: "
            "nothing is left to train. Give more steps, or translate it as it is: convert.py run."
        )
    if cfg.checkpoint.verify and processes.first():
        saved.verify()
    if changed := numerics.changes_since(saved.run):
        say("\n".join([f"{saved.path} was trained otherwise; from here on:", *changed]))
    return saved


def _compare_runs(before: dict[str, Any], now: dict[str, Any], run_dir: Path) -> None:
    """Says what has changed since the run began; refuses what would bend its curve."""
    own = [name for name in {*before, *now} if name not in vouching.RECORDED]
    changed = vouching.changes(
        {name: before[name] for name in own if name in before},
        {name: now[name] for name in own if name in now},
    )
    words = {key: f"  {key}: was {was}, is {is_}" for key, (was, is_) in changed.items()}
    bending = [text for key, text in words.items() if not vouching.is_free(key)]
    settings = before.get("numerics", {}), now["numerics"]
    bending += numerics.differences(*settings)
    if bending:
        back = numerics.restored(*settings)
        raise Refused(
            f"{run_dir} belongs to another run:\n"
            + "\n".join(bending)
            + "\nGoing on would bend its curve. Choose another run_dir (and init_from="
            f"{run_dir}, to start from its state), or set these back"
            + (f" (in the environment: {back})." if back else ".")
        )
    if "numerics" not in before:
        say(f"{run_dir} does not say under which settings of JAX it began: none are compared.")
    lines = list(words.values())
    lines += numerics.differences(before.get("surroundings", {}), now["surroundings"])
    if lines:
        say("Changed since the run was last started:\n" + "\n".join(lines))


def _translated(cfg: Config, program: Program, saved: checkpoints.Saved) -> State:
    source_cfg = saved.config()
    was, now = source_cfg.model["family"], cfg.model["family"]
    if was != now:
        raise Refused(
            f"init_from {saved.path} is a run of the model `{was}`, and this run's is `{now}`: "
            "its state fits no other. Choose a run of the same model."
        )
    with reading.named(saved.path / "run"):  # the options of the model, too
        family = families.create(source_cfg.model)
    stage = Stage(source_cfg.stage, family, program.stage.inputs)
    book = saved.run["rules"]
    source_rules = None if book is None else RuleBook.from_dict(book, f"the rules in {saved.path}")
    source = Program(source_cfg, stage, source_rules, program.layout)
    state = saved.restore(source.abstract)
    # By way of nnx, since the two runs may store their Linen layers differently (loop and scan).
    for rules, here, there in (
        (source_rules, source_cfg.stage, "nnx"),
        (program.rules, "nnx", cfg.stage),
    ):
        if here != there:
            if rules is None:
                raise Refused(f"To go from stage {here} to {there} takes a rule book; none found.")
            state = translate_state(state, rules, here, there)
    expected = program.abstract
    where = f"this run, translated from {saved.path}"
    check(named(state.tree()), named(expected.tree()), where)
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, expected))
