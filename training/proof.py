"""What `convert.py verify` runs to prove a run's conversion: its model, a batch, a training step.

`python convert.py verify RUN OUT` imports this for runs of this template, from their saved
configuration; the comparison itself is `linen_nnx.proof.prove`.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from linen_nnx import RuleBook
from linen_nnx.book.tree import flatten, unflatten
from linen_nnx.disk.state import Id
from linen_nnx.infer.trace import LeafSpec, Trace
from linen_nnx.proof.subject import Arrays, Subject

from configs.build import build
from configs.earlier import upgraded
from configs.schema import Config
from training import data
from training.assemble import Setup
from training.runtime.mesh import OneDevice
from training.runtime.names import named

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
    batch = data.example(cfg.data, _ROWS)
    setup = Setup(cfg, None, batch, RuleBook.from_dict(run["rules"]), OneDevice())
    program, abstract = setup.program, flatten(setup.stage.abstract())
    updated: list[str] = []

    def forward(leaves: list[jax.Array], batch: Any) -> list[Any]:
        # Leaf by leaf, since the proof replaces single ones by random or perturbed values.
        variables = unflatten(dict(zip(abstract, leaves, strict=True)))
        rngs = setup.keys(0)
        outputs: list[Any] = []
        for is_training in (False, True):
            model = setup.model(variables, rngs, train=is_training)
            setup.metrics(model, batch, rngs)
            outputs += jax.tree.leaves(model.outputs)
        news = flatten(model.collections)
        updated[:] = news
        return [*outputs, *news.values()]

    def step(state: Arrays, gradients: Mapping[Any, Any], fresh: bool) -> Arrays:
        """As many batches as one update takes, each this one; `gradients` are the run's own."""
        # The library calls leaves of an optimizer by where they stand in the tree, and those of the
        # model by their path. The program has one name for both.
        keys = {"/".join(key) if isinstance(key, Id) else key: key for key in state}
        leaves = [jnp.array(state[keys[path]]) for path in named(program.abstract)]
        now = jax.tree.unflatten(jax.tree.structure(program.abstract), leaves)
        if fresh:
            variables = {name: now[name] for name in setup.stage.abstract()}
            now["opt_state"] = jax.jit(setup.steps.start)(variables)["opt_state"]
        # A single batch would move nothing where gradients are averaged, and the step would prove
        # nothing.
        for _ in range(cfg.optimizer.accumulate):
            now, _ = program.train_step(now, batch)
        return {keys[path]: np.asarray(leaf) for path, leaf in named(now).items()}

    jaxpr = jax.make_jaxpr(forward)(list(abstract.values()), batch)
    leaves = {
        path: LeafSpec(spec.shape, spec.dtype, path.split("/")[0])
        for path, spec in abstract.items()
    }
    inputs = tuple(map(jnp.asarray, jax.tree.leaves(batch)))
    trace = Trace("linen", jaxpr, leaves, inputs, tuple(updated), {})
    return Subject(trace, flat=True, step=step, exact=True)
