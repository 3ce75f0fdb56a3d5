"""The shape of a run's configuration: types, ranges, and the rules between keys.

What each key means and its value are in the YAML files beside this module; `configs.build` makes
these frozen dataclasses of what Hydra composed. Nothing here imports jax, so that a mistyped key is
answered at once.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from configs.build import (
    Count,
    Fraction,
    Natural,
    NonNegative,
    Positive,
    Range,
    Share,
    refuse,
    show,
)

# 0 is refused with a word of its own, for -1 stands beside it and means something.
Devices = Annotated[int, Range(low=-1)]
Stage = Literal["linen", "nnx_in_linen", "linen_in_nnx", "nnx"]


@dataclass(frozen=True)
class Part:
    """What the optimizer does differently for one part of the model."""

    lr_factor: Positive = 1.0
    freeze: bool = False


@dataclass(frozen=True)
class Optimizer:
    """The update rule, its schedule, and what is done to gradients before it.

    The entries of `chain` stay plain values: `training.chains` compares them with optax.
    """

    name: str
    chain: list[Any] | None
    lr: Positive
    weight_decay: NonNegative
    schedule: Literal["cosine", "linear", "constant"]
    warmup: Natural
    end_lr_factor: Share
    clip_norm: Positive | None
    accumulate: Count
    ema: Fraction | None
    parts: dict[str, Part]


@dataclass(frozen=True)
class Eval:
    """When the validation set is read, and when a run that no longer improves ends."""

    every: Count
    batches: Count | None
    patience: Count | None


@dataclass(frozen=True)
class Checkpoint:
    """When the state is saved, where, and what is kept of it."""

    dir: str | None
    every: Count
    keep: Count
    best: bool
    verify: bool

    def __post_init__(self) -> None:
        scheme, is_url, _ = (self.dir or "").partition("://")
        if is_url and scheme != "gs":
            # For s3:// Orbax 0.12 refuses the path itself, when training has begun: "Checkpoint
            # path should be absolute. Got s3:/..."
            refuse(
                {
                    "dir": f"got {show(self.dir)}; expected a folder on a disk or gs://, as Orbax, "
                    f"which saves, opens no {scheme}:// path (convert.py copies a checkpoint there)"
                }
            )


@dataclass(frozen=True)
class Log:
    """What is shown and written beside `metrics.jsonl`."""

    tensorboard: bool
    csv: bool
    wandb: str | None
    mlflow: str | None
    histograms_every: Count | None
    norms_every: Count | None
    progress: bool
    samples: Natural
    prompt: str | None


@dataclass(frozen=True)
class Mesh:
    """How many devices share each batch: with whole parameters, and with parts of them."""

    data: Devices
    fsdp: Devices

    def __post_init__(self) -> None:
        problems = {}
        for key in ("data", "fsdp"):
            if getattr(self, key) == 0:
                problems[key] = "got 0; expected a whole number, at least 1, or -1 for the rest"
        if self.data == self.fsdp == -1:
            problems["fsdp"] = "got -1, with data -1: only one of them can be the rest"
        refuse(problems)


@dataclass(frozen=True)
class Distributed:
    """The processes that compute the run together."""

    coordinator: str | None
    num_processes: Count | None
    process_id: Natural | None

    def __post_init__(self) -> None:
        problems = {}
        given = [key for key in ("num_processes", "process_id") if getattr(self, key) is not None]
        # One of the three alone is a mistake, which would otherwise train a run of one process.
        if given and self.coordinator is None:
            problems["coordinator"] = f"got null, with {given[0]}: expected host:port of process 0"
        if self.coordinator is not None and not self.coordinator.rpartition(":")[2].isdigit():
            problems["coordinator"] = f"got {show(self.coordinator)}; expected host:port"
        if len(given) == 1:
            other = {"num_processes": "process_id", "process_id": "num_processes"}[given[0]]
            problems[other] = f"got null, with {given[0]}: expected both or neither"
        # Else jax waits for minutes for a process that will never come.
        if self.num_processes and self.process_id and self.process_id >= self.num_processes:
            problems["process_id"] = (
                f"got {self.process_id}; expected 0 to {self.num_processes - 1}, for num_processes "
                f"is {self.num_processes}"
            )
        refuse(problems)


@dataclass(frozen=True)
class Debug:
    """A deliberately unusual run, to look at one thing."""

    mode: Literal["none", "one_step", "overfit", "nans", "profile"]


@dataclass(frozen=True)
class Config:
    """One run. `model` and `data` stay plain mappings: their family and data set check them."""

    name: str
    mode: Literal["train", "eval", "export"]
    stage: Stage
    ported: list[Any] | None
    run_dir: str
    steps: Count
    stop_at: Count | None
    seed: Natural
    log_every: Count
    resume: Literal["auto", "never", "must"]
    init_from: str | None
    init_rules: str | None
    init_optimizer: Literal["keep", "fresh"]
    model: dict[str, Any]
    data: dict[str, Any]
    optimizer: Optimizer
    eval: Eval
    checkpoint: Checkpoint
    log: Log
    mesh: Mesh
    distributed: Distributed
    compile_cache: str | None
    debug: Debug

    def __post_init__(self) -> None:
        problems = {}
        if self.stop_at is not None and self.stop_at > self.steps:
            problems["stop_at"] = f"got {self.stop_at}; expected at most steps, {self.steps}"
        if "://" in self.run_dir:
            # As a path it would be a folder `gs:` here, and the run would go on in it unseen.
            problems["run_dir"] = (
                f"got {show(self.run_dir)}; expected a folder on a disk, as a run locks it, "
                "appends to its metrics and links its best checkpoint, which no bucket can "
                "(init_from takes gs:// and s3://, and checkpoint.dir takes gs://)"
            )
        # Left in a script from an earlier run, it would be passed over in silence.
        if self.init_from is None and self.init_rules is not None:
            problems["init_rules"] = "it is for a checkpoint that init_from names, and that is null"
        if not isinstance(self.model.get("family"), str):
            problems["model.family"] = "missing; expected the name of a model family"
        if not isinstance(self.data.get("name"), str):
            problems["data.name"] = "missing; expected the name of a data set"
        refuse(problems)
