"""The state of a run as one pytree, and the two compiled steps that act on it.

Step semantics: `step` counts the batches consumed. The k-th batch (k from 1) is drawn when `step`
is k - 1; its loss is taken before update k; afterwards `step` is k. With accumulation an update
happens every `accumulate` batches, and the batches between only add to the gradient.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from configs.schema import Config
from linen_nnx import RuleBook
from linen_nnx.book.tree import flatten, unflatten
from model.stages import HALVES, Stage, Variables, translate
from training import optimizer
from training.datasets import Batch
from training.errors import Refused
from training.leaves import View
from training.mesh import Layout

OWN = {"step", "split", "lr", "weight", *(f"grad_norm_{half}" for half in HALVES)}  # metrics' names
RUN_STATE = {"step", "opt_state", "ema"}  # beside the collections in the tree that is saved


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Everything that training changes.

    Attributes:
        step: int32 scalar, batches consumed.
        variables: `{collection: {half: ...}}`, see `model.stages`.
        opt_state: of the one Optax transformation over both halves.
        ema: exponential moving average of the parameters, or None.
    """

    step: Array
    variables: Variables
    opt_state: Any
    ema: Variables | None

    def tree(self) -> dict[str, Any]:
        """The plain tree that is saved: step, each collection, opt_state and, if kept, ema."""
        tree = {"step": self.step, **self.variables, "opt_state": self.opt_state}
        return tree if self.ema is None else tree | {"ema": self.ema}

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> "State":
        """The inverse of `tree`."""
        rest = dict(tree)
        step, opt_state, ema = rest.pop("step"), rest.pop("opt_state"), rest.pop("ema", None)
        return cls(step, rest, opt_state, ema)


class Program:
    """A stage, an optimizer and the two compiled steps: all that one run computes.

    Attributes:
        stage: the model at its stage.
        view: the stage-independent view of its parameters.
        rules: the family's rule book; None at stage `nnx` without a Linen twin.
        layout: where the arrays lie; None for one device.
        abstract: the state's shapes, dtypes and shardings.
        train_step: `(state, batch) -> (state, metrics)`, jitted, donating `state`; metrics are
            float32 scalars: the batch means of the family's losses, `lr`, and `grad_norm_<half>`.
        eval_step: `(state, batch, weight) -> {metric: sum, "weight": sum}`, jitted, with `weight`
            (rows,) float32; uses the average of the parameters if one is kept.
    """

    def __init__(
        self, cfg: Config, stage: Stage, rules: RuleBook | None, layout: Layout | None = None
    ) -> None:
        """Raises `Refused` for a model whose collections are named as the run's own state is."""
        if taken := sorted(RUN_STATE & set(stage.mutable)):
            raise Refused(
                f"The model has collections named {', '.join(taken)}, under which a checkpoint "
                "keeps the run's own. Rename them: in nnx, the name that the Variable's type is "
                "registered by."
            )
        self.stage, self.rules, self.layout, self._cfg = stage, rules, layout, cfg
        self.view = View(stage, rules)
        own = stage.family.optimizer
        self.optimizer = optimizer.create(cfg.optimizer, cfg.steps, self.view, own)
        self._schedule = optimizer.schedule(cfg.optimizer, cfg.steps)
        self.abstract = self._shapes()
        self._places = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        if layout is None:
            self.train_step = jax.jit(self._train_step, donate_argnums=0)
            self.eval_step = jax.jit(self._eval_step)
            return
        places = (self._places, layout.whole)
        self.train_step = jax.jit(self._train_step, donate_argnums=0, out_shardings=places)
        self.eval_step = jax.jit(self._eval_step, out_shardings=layout.whole)

    def init(self) -> State:
        """The state before the first batch; parameters as `init` says, alike at every stage."""

        def create() -> State:
            return self.start(initial_variables(self._cfg, self.stage, self.rules))

        if self.layout is None:
            return jax.device_put(create(), self._places)
        # On a mesh as one program, so that no device ever holds what it has no room for.
        return jax.jit(create, out_shardings=self._places)()

    def start(self, variables: Variables) -> State:
        """A state at step 0 with the given variables."""
        params = variables["params"]
        ema = None if self._cfg.optimizer.ema is None else jax.tree.map(jnp.copy, params)
        opt_state = jax.jit(self.optimizer.init)(params)
        return State(jnp.zeros((), jnp.int32), variables, opt_state, ema)

    def _shapes(self) -> State:
        shapes = jax.eval_shape(self.start, unflatten(self.stage.abstract))
        if self.layout is not None:
            return self.layout.state(shapes, self.view.ranks())
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes
        )

    def _train_step(self, state: State, batch: Batch) -> tuple[State, dict[str, Array]]:
        cfg = self._cfg.optimizer
        key = jax.random.fold_in(jax.random.key(self._cfg.seed), state.step)
        rest = {name: tree for name, tree in state.variables.items() if name != "params"}

        def loss_fn(params: Variables) -> tuple[Array, tuple[Variables, dict[str, Array]]]:
            variables = {"params": params, **rest}
            outputs, updates = self.stage.apply(
                variables, self.stage.family.inputs(batch), train=True, key=key
            )
            means = {name: v.mean() for name, v in self._losses(outputs, batch).items()}
            return means["loss"], (updates, means)

        params = whole = state.variables["params"]
        if self.layout is not None:
            whole = jax.lax.with_sharding_constraint(params, self.layout.whole)
        grads, (updates, metrics) = jax.grad(loss_fn, has_aux=True)(whole)
        if self.layout is not None:
            grads = jax.lax.with_sharding_constraint(grads, self._places.variables["params"])
        # Without it XLA fuses the end of the backward pass into the update, whose rounding would
        # then depend on how a stage stores the leaves: stacked, or cut out of a scan's stack.
        grads = jax.lax.optimization_barrier(grads)
        steps, opt_state = self.optimizer.update(
            grads, state.opt_state, params, value=metrics["loss"]
        )
        params = optax.apply_updates(params, steps)
        ema = state.ema
        if cfg.ema is not None and ema is not None:
            moved = optax.incremental_update(params, ema, 1 - cfg.ema)
            updated = (state.step + 1) % cfg.accumulate == 0
            ema = jax.tree.map(lambda new, old: jnp.where(updated, new, old), moved, ema)
        metrics |= {f"grad_norm_{half}": self.view.norm(grads, [half]) for half in HALVES}
        metrics["lr"] = jnp.asarray(self._schedule(state.step // cfg.accumulate), jnp.float32)
        state = State(state.step + 1, {"params": params, **rest, **updates}, opt_state, ema)
        return state, metrics

    def _eval_step(self, state: State, batch: Batch, weight: Array) -> dict[str, Array]:
        outputs, _ = self.stage.apply(
            self.evaluated(state), self.stage.family.inputs(batch), train=False
        )
        values = self._losses(outputs, batch)
        sums = {name: (value * weight).sum() for name, value in values.items()}
        return {**sums, "weight": weight.sum()}

    def _losses(self, outputs: Array, batch: Batch) -> dict[str, Array]:
        """The family's losses; refused while tracing, where (rows, 1) or so would broadcast."""
        values, rows = self.stage.family.losses(outputs, batch), len(jax.tree.leaves(batch)[0])
        wrong = [
            f"  {name}: got {value.dtype}{list(value.shape)}, expected float32[{rows}]"
            for name, value in values.items()
            if (value.shape, value.dtype) != ((rows,), jnp.float32)
        ]
        wrong += [f"  {name}: the run itself has a metric of that name" for name in OWN & {*values}]
        wrong += [] if "loss" in values else ["  loss: missing"]
        if wrong:
            raise Refused(
                f"losses() of the model family `{self.stage.family.name}` must give numbers by "
                "name, one for each example of a batch:\n" + "\n".join(sorted(wrong))
            )
        return values

    def place(self, batch: Any) -> Any:
        """Arrays of a batch as the steps take them: on a mesh, whole, from this process's rows."""
        return batch if self.layout is None else self.layout.batch(batch)

    def fetch(self, tree: Any) -> Any:
        """Arrays as numpy, whole, wherever their parts lie; every process has to ask for them."""
        return jax.device_get(tree) if self.layout is None else self.layout.fetch(tree)

    def evaluated(self, state: State) -> Variables:
        """The variables that evaluation uses: an average of the parameters, if one is kept."""
        params = state.ema
        if params is None:
            params = optimizer.evaluated(state.opt_state, state.variables["params"])
        return {**state.variables, "params": params}


def initial_variables(cfg: Config, stage: Stage, rules: RuleBook | None) -> Variables:
    """Fresh variables of a stage: `init: linen` draws them in the Linen twin and translates them,
    so that every stage starts from the same bits; `init: native` lets the stage draw its own."""
    key = jax.random.key(cfg.seed)
    if cfg.init == "native" or stage.name == "linen":
        return stage.init(key)
    assert rules is not None
    twin = Stage("linen", stage.family, stage.inputs)
    return unflatten(translate(flatten(twin.init(key)), rules, "linen", stage.name))


def translate_state(state: State, rules: RuleBook, source: str, target: str) -> State:
    """The state of a run at stage `source` as stage `target` would hold it.

    Every subtree that mirrors the parameters is translated, whichever Optax transformation made
    it; what does not (step, counts) stays as it is.

    Raises:
        linen_nnx.RuleError: when a subtree does not fit the rules (factored moments of a leaf that
            a rule reshapes, say).
    """

    own = rules.of_collection("params")

    def mirrors(node: Any) -> bool:
        return isinstance(node, dict) and set(node) == set(HALVES)

    def convert(node: Any) -> Any:
        if not mirrors(node):
            return node
        leaves = flatten({"params": {h: t for h, t in node.items() if isinstance(t, dict)}})
        params = unflatten(translate(leaves, own, source, target))["params"]
        return {half: params.get(half, node[half]) for half in HALVES}

    variables = unflatten(translate(flatten(state.variables), rules, source, target))
    opt_state = jax.tree.map(convert, state.opt_state, is_leaf=mirrors)
    return replace(state, variables=variables, opt_state=opt_state, ema=convert(state.ema))
