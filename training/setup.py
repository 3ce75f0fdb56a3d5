"""What a run is made of, built from its configuration: devices, data, model, compiled steps."""

import warnings
from typing import Any

import jax

from configs.schema import Config
from model import families
from model.stages import Stage
from training import data, datasets, mesh, processes, start
from training.state import Program


def prepare(cfg: Config) -> tuple[datasets.Dataset, Program, dict[str, Any]]:
    """Builds it all, and writes nothing.

    Returns:
        The data, the program, and a batch or its shapes, for the program to be traced with.

    Raises:
        Refused: for anything that cannot be done as asked.
        ConfigError: for model options that do not fit the data.
    """
    if cfg.compile_cache is not None:
        jax.config.update("jax_compilation_cache_dir", cfg.compile_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        # A cache that a full disk does not take costs the next start some seconds, and no more. Its
        # warning, one for each program, would bury the message that ends the run.
        warnings.filterwarnings("ignore", "Error writing persistent compilation cache", UserWarning)
    processes.join(cfg)
    with processes.together():
        options = datasets.create(cfg.data)
        layout = mesh.create(cfg.mesh, options.batch)
        dataset = datasets.load(options)
        family = families.create(cfg.model)
        rules = start.load_rules(cfg, family)
        example = data.first_batch(dataset)
        family.check_data(example, dataset.classes)
        program = Program(cfg, Stage(cfg.stage, family, family.inputs(example)), rules, layout)
    return dataset, program, example if layout is None else layout.shapes(example)


def share() -> tuple[int, int]:
    """Which part of each batch this process reads, of how many."""
    return jax.process_index(), jax.process_count()
