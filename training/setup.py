"""What a run is made of, built from its configuration: devices, data, model, compiled steps."""

from dataclasses import dataclass
from typing import Any

import jax

from configs.schema import Config
from linen_nnx import RuleBook
from model import families
from model.stages import Stage
from training import datasets, mesh, processes, start
from training.state import Program


@dataclass(frozen=True)
class Setup:
    """Attributes:
    layout: of several devices; None for one.
    rules: the family's rule book; None where there is none and none is needed.
    example: one batch, or its shapes.
    """

    layout: mesh.Layout | None
    dataset: datasets.Dataset
    rules: RuleBook | None
    program: Program
    example: dict[str, Any]


def prepare(cfg: Config) -> Setup:
    """Builds it all, and writes nothing.

    Raises:
        Refused: for anything that cannot be done as asked.
        ConfigError: for model options that do not fit the data.
    """
    if cfg.compile_cache is not None:
        jax.config.update("jax_compilation_cache_dir", cfg.compile_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    processes.join(cfg)
    with processes.together():
        layout = mesh.create(cfg.mesh, cfg.data.batch)
        dataset = datasets.load(cfg.data)
        family = families.create(cfg.model)
        rules = start.load_rules(cfg, family)
        example = dataset.example_batch(cfg.data.batch)
        family.check_data(example, dataset.classes)
        program = Program(cfg, Stage(cfg.stage, family, example["inputs"]), rules, layout)
    return Setup(
        layout, dataset, rules, program, example if layout is None else layout.shapes(example)
    )


def share() -> tuple[int, int]:
    """Which part of each batch this process reads, of how many."""
    return jax.process_index(), jax.process_count()
