"""What a run is made of, built from its configuration: devices, data, model, compiled steps."""

import dataclasses
import warnings
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax import Array
from linen_nnx import RuleBook

import model
from configs.earlier import upgraded
from configs.schema import Config
from model import Metrics, Rngs
from training import data, datasets, losses
from training.datasets import Dataset
from training.runtime import homes, mesh, processes, start
from training.runtime.errors import Refused
from training.runtime.mesh import Layout, OneDevice
from training.runtime.program import Program, State
from training.runtime.view import View


class Setup:
    """Model, data and devices of one configuration, and what a training step needs of them.

    Attributes:
        cfg: the configuration.
        family: the model family with its options.
        rules: its rule book.
        layout: which device holds what.
        example: a batch of the data.
        stage: the model at its rung of the migration.
        view: its parameters, free of the names that a stage gives them.
        parts: the names of the parts that have parameters.
    """

    def __init__(
        self,
        cfg: Config,
        dataset: Dataset | None,
        example: Any,
        rules: RuleBook,
        layout: Layout | OneDevice,
    ) -> None:
        """Nothing is computed, and nothing written; `dataset` None does for a proof."""
        self.cfg, self.example, self.rules, self.layout = cfg, example, rules, layout
        self._dataset = dataset
        self.family = model.create(cfg.model)
        self.stage = self.family.ladder(self.example, self.rules, cfg.ported).at(cfg.stage)
        self.view = View(self.stage)
        self.parts = self.view.parts
        # Set here and not given to the layout: which leaves there are is known only now, and the
        # data that shapes the model had to know its devices.
        self.layout.ranks = self.view.ranks()
        self.layout.collections = self.stage.mutable

    @property
    def dataset(self) -> Dataset:
        """What there is to learn from."""
        assert self._dataset is not None
        return self._dataset

    @cached_property
    def steps(self) -> Any:
        """The training step and the evaluation step: the family's own, or `training/step.py`'s."""
        from training.step import Step  # late: it is handed this setup

        return getattr(self.family.module, "Step", Step)(self)

    @cached_property
    def program(self) -> Program:
        """The same, compiled."""
        return Program(self.steps, self.stage.abstract(), self.initial, self.layout)

    def initial(self) -> State:
        """Initial variables: the Linen model draws them, so that they are alike at every stage."""
        keys = self.keys(0) | {"params": jax.random.key(self.cfg.seed)}
        return self.stage.initial(keys)

    def keys(self, index: Any) -> dict[str, Array]:
        """The keys of training step `index`, by stream."""
        return losses.keys(self.cfg.seed, index, self.family.streams)

    def collections(self, state: State) -> State:
        """What a state holds beside the parameters that the model needs."""
        return {name: state[name] for name in self.stage.mutable}

    def model(self, variables: Mapping[str, Any], rngs: Rngs, train: bool) -> losses.Model:
        """The model with the variables at hand."""
        return losses.Model(self.stage, variables, rngs, train)

    def metrics(self, applied: losses.Model, batch: Any, rngs: Rngs) -> Metrics:
        """The family's loss of a batch, checked."""
        found = self.family.module.loss(applied, batch, rngs)
        return losses.check(found, data.rows_of(batch), self.parts)

    @property
    def own_optimizer(self) -> Any:
        """The family's own Optax transformation, if it has one."""
        return getattr(self.family.module, "optimizer", None)

    @cached_property
    def traced(self) -> Any:
        """The example batch, or its shapes, as the compiled step takes it."""
        return self.layout.shapes(self.example)

    @cached_property
    def run(self) -> start.Run:
        """What the runtime must know."""
        from training import moving  # late: it is handed this setup

        cfg = self.cfg
        return start.Run(
            run_dir=Path(cfg.run_dir),
            home=homes.home(cfg.run_dir, cfg.checkpoint.dir),
            config=dataclasses.asdict(cfg),
            stage=cfg.stage,
            forms=self.stage.forms,
            ported=cfg.ported,
            rules=self.rules,
            last=cfg.stop_at or cfg.steps,
            resume=cfg.resume,
            init_from=cfg.init_from,
            verify=cfg.checkpoint.verify,
            begins_anew=cfg.debug.mode != "none" and cfg.resume == "auto",
            upgraded=upgraded,
            foreign=lambda path: moving.found(self, path),
        )


def prepare(cfg: Config) -> Setup:
    """The setup of a run, after meeting the other processes, if there are any. Writes nothing.

    Raises:
        Refusal: for anything that cannot be done as asked.
        ConfigError: for model options that do not fit the data.
    """
    if cfg.compile_cache is not None:
        jax.config.update("jax_compilation_cache_dir", cfg.compile_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        # A cache that a full disk does not take costs the next start some seconds, and no more. Its
        # warning, one for each program, would bury the message that ends the run.
        warnings.filterwarnings("ignore", "Error writing persistent compilation cache", UserWarning)
    processes.join(dataclasses.asdict(cfg))
    with processes.together():
        options = datasets.create(cfg.data)
        layout = mesh.create(cfg.mesh.data, cfg.mesh.fsdp, options.batch)
        dataset = datasets.load(options)
        family = model.create(cfg.model)
        rules = load_rules(family)
        example = data.first_batch(dataset)
        family.check_data(example, dataset.classes)
        setup = Setup(cfg, dataset, example, rules, layout)
        _ = setup.program  # traced here, so that what does not fit is refused in every process
    return setup


def share() -> tuple[int, int]:
    """Which part of each batch this process reads, of how many."""
    return jax.process_index(), jax.process_count()


def load_rules(family: model.Family) -> RuleBook:
    """The family's rule book.

    Raises:
        Refused: when there is none, or one that does not lead back.
    """
    path = family.rules_path
    if not path.exists():
        raise Refused(
            f"There is no rule book {path}, which says which Linen leaf is which nnx leaf. Let "
            f"`python convert.py suggest training.twins:EXPERIMENT -o {path}` find it (EXPERIMENT: "
            f"one of model {family.name}), or write it (model/mlp/rules.yaml is the smallest)."
        )
    book = RuleBook.load(path)
    if not book.invertible:
        raise Refused(
            f"{path} has rules that lose or change values (drop, init, scale); a family's stages "
            "need rules that lead back bit for bit."
        )
    return book
