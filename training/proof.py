"""What `convert.py verify` runs to prove a run's conversion: its model, a batch, a training step.

`python convert.py verify RUN OUT` imports this for runs of this template, from their saved
configuration; the comparison itself is `linen_nnx/proof/prove.py`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs.build import build
from configs.earlier import upgraded
from configs.schema import Config
from linen_nnx import RuleBook
from linen_nnx.book.tree import flatten, unflatten
from linen_nnx.disk.state import Id
from linen_nnx.infer.trace import Leaf, Trace
from linen_nnx.proof.subject import Arrays, Subject
from model import families
from model.stages import Stage
from training import data, datasets
from training.leaves import named
from training.state import Program, State

_ROWS = 8  # of a batch, at most


def subject(run: Mapping[str, Any]) -> Subject:
    """The model of a run at its stage, and its training step.

    The example inputs are a batch of the run's data, or the one that its data set makes without
    files, since a proof should not depend on files that may have moved. The outputs are those of
    evaluation and of training.

    Args:
        run: what the run's checkpoint says of it: `config`, `stage`, `rules`.

    Raises:
        ConfigError: for a configuration that this version of the template does not have.
    """
    cfg = build(Config, {**upgraded(run["config"]), "stage": run["stage"]})
    rows = min(cfg.data["batch"], _ROWS)
    batch = data.example(datasets.create({**cfg.data, "batch": rows}))
    family = families.create(cfg.model)
    stage = Stage(cfg.stage, family, family.inputs(batch))
    rules = None if run["rules"] is None else RuleBook.from_dict(run["rules"])
    program = Program(cfg, stage, rules)
    updated: list[str] = []

    def forward(leaves: list[jax.Array], inputs: jax.Array) -> list[jax.Array]:
        variables = unflatten(dict(zip(stage.abstract, leaves, strict=True)))
        evaluated, _ = stage.apply(variables, inputs, train=False)
        key = jax.random.key(cfg.seed)
        trained, updates = stage.apply(variables, inputs, train=True, key=key)
        news = flatten(updates)
        updated[:] = news
        return [evaluated, trained, *news.values()]

    def step(state: Arrays, gradients: Mapping[Any, Any], fresh: bool) -> Arrays:
        """As many batches as one update takes, each this one; `gradients` are the run's own."""
        keys = {"/".join(key) if isinstance(key, Id) else key: key for key in state}
        like = named(program.abstract.tree())
        leaves = [jnp.array(state[keys[path]]) for path in like]
        shape = jax.tree.structure(program.abstract.tree())
        now = State.from_tree(jax.tree.unflatten(shape, leaves))
        if fresh:
            start = jax.jit(program.optimizer.init)(now.variables["params"])
            now = dataclasses.replace(now, opt_state=start)
        for _ in range(cfg.optimizer.accumulate):
            now, _ = program.train_step(now, batch)
        return {keys[path]: np.asarray(leaf) for path, leaf in named(now.tree()).items()}

    jaxpr = jax.make_jaxpr(forward)(list(stage.abstract.values()), family.inputs(batch))
    leaves = {
        path: Leaf(spec.shape, spec.dtype, path.split("/")[0])
        for path, spec in stage.abstract.items()
    }
    inputs = (jnp.asarray(family.inputs(batch)),)
    trace = Trace("linen", jaxpr, leaves, inputs, tuple(updated), {})
    return Subject(trace, flat=True, step=step, exact=True)
