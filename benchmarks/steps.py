"""Times one training step of every stage against a floor and against the usual idioms.

    python -m benchmarks.steps [--rounds 15] [--sizes small lm large] [--json FILE] [--png FILE]

The floor is the same step with everything around it taken away: one jitted function over a flat
list of arrays, made of the `linen` stage's own jaxpr. The idioms are what one would write without
this template, for the same model, losses, clipping, optimizer and schedule: a `TrainState` under
`jax.jit`, and an `nnx.Optimizer` under `nnx.jit`, with and without `nnx.cached_partial`.
Every method starts from the same parameters. Its loss is compared where dropout is off: an nnx
model draws other masks by itself than Linen does.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from linen_nnx.book.tree import flatten, unflatten
from linen_nnx.ladder.stage import STAGES

from benchmarks.rounds import interleave, ratios, save, summarise, table
from configs.schema import Config
from model import Family
from training import compose, optimizer
from training.assemble import Setup, prepare
from training.runtime.program import Program
from training.step import Step

# The windows and batches that the tables of the pages were made with.
LM = ["experiment=lm", "data.length=128", "data.batch=32"]
SIZES = {  # name: (overrides, steps in one measurement)
    "small": (["experiment=diabetes"], 300),
    "lm": (LM, 1),
    "large": ([*LM, "model.width=256", "model.depth=6"], 1),
}
FLOOR = "floor"
DEEP = ["experiment=lm", "model.width=32", "model.depth=12", "data.length=32", "data.batch=4"]

Timed = Callable[[], jax.Array]
"""One update; returns its loss."""


def prepared(overrides: list[str], stage: str) -> tuple[Setup, dict[str, Any]]:
    """A run's setup at a stage, and one batch of its data on the device."""
    setup = prepare(compose(*overrides, f"stage={stage}", "compile_cache=null"))
    return setup, jax.tree.map(jnp.asarray, setup.example)


def stage_step(setup: Setup, batch: dict[str, Any]) -> Timed:
    """The template's own step."""
    state = setup.program.init()

    def step() -> jax.Array:
        nonlocal state
        state, metrics = setup.program.train_step(state, batch)
        return metrics["loss"]

    return step


def floor_step(setup: Setup, batch: dict[str, Any]) -> Timed:
    """The jaxpr of the step as a function of a flat list of arrays."""
    state, train_step = setup.program.init(), setup.program.train_step
    leaves = jax.tree.leaves(state)
    outputs = jax.tree.structure(jax.eval_shape(train_step, state, batch))
    traced = jax.make_jaxpr(train_step)(state, batch)
    inner = traced.jaxpr.eqns[-1].params["jaxpr"]  # within the jit of `train_step`
    call = jax.extend.core.jaxpr_as_fun(inner)
    flat = jax.jit(lambda *arrays: call(*arrays), donate_argnums=range(len(leaves)))
    inputs = jax.tree.leaves(batch)
    loss = outputs.unflatten(range(outputs.num_leaves))[1]["loss"]

    def step() -> jax.Array:
        nonlocal leaves
        results = flat(*leaves, *inputs)
        leaves = results[: len(leaves)]
        return results[loss]

    return step


def usual_optimizer(cfg: Config) -> optax.GradientTransformation:
    """The same mathematics as the configured AdamW, as one would write it by hand."""
    opt = cfg.optimizer
    assert opt.clip_norm is not None and opt.chain is not None
    decays = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # noqa: E731
    return optax.chain(
        optax.clip_by_global_norm(opt.clip_norm),
        optax.adamw(
            optimizer.schedule(opt, cfg.steps),
            **opt.chain[0]["scale_by_adam"],
            weight_decay=opt.weight_decay,
            mask=decays,
        ),
    )


class Applied:
    """What a family's loss is given as `model`: here the model itself."""

    train = True

    def __init__(self, model: Callable[..., jax.Array]) -> None:
        self._model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model(*args, **kwargs)


def loss_of(family: Family, model: Callable[..., jax.Array], batch: dict[str, Any]) -> jax.Array:
    """The mean loss of a batch."""
    return family.module.loss(Applied(model), batch, {})["loss"].mean()


class Linen(nn.Module):
    """The whole model as a Linen code base has it."""

    encoder: nn.Module
    head: nn.Module
    forward: Callable[..., jax.Array]

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return self.forward(self, *args, **kwargs)


def train_state_step(setup: Setup, batch: dict[str, Any]) -> Timed:
    """`TrainState` under `jax.jit`, donated."""
    cfg, family = setup.cfg, setup.family
    halves = family.module.parts(family.options)
    model = Linen(halves["encoder"].module(), halves["head"].module(), family.module.forward)
    state = TrainState.create(
        apply_fn=model.apply,
        params=setup.program.init()["params"],
        tx=usual_optimizer(cfg),
    )

    def update(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, jax.Array]:
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)

        def loss_fn(params: Any) -> jax.Array:
            model = partial(state.apply_fn, {"params": params}, rngs={"dropout": key})
            return loss_of(family, model, batch)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    compiled = jax.jit(update, donate_argnums=0)

    def step() -> jax.Array:
        nonlocal state
        state, loss = compiled(state, batch)
        return loss

    return step


class Nnx(nnx.Module):
    """The whole model as an nnx code base has it."""

    def __init__(self, family: Family, rngs: nnx.Rngs) -> None:
        halves = family.module.parts(family.options)
        self.encoder, self.head = halves["encoder"].nnx(rngs), halves["head"].nnx(rngs)
        self.forward = family.module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        return self.forward(self, *args, **kwargs)


def nnx_step(setup: Setup, batch: dict[str, Any], cached: bool) -> Timed:
    """`nnx.Optimizer` under `nnx.jit`; `cached`: with `nnx.cached_partial`."""
    family = setup.family
    model = Nnx(family, nnx.Rngs(0, dropout=setup.cfg.seed))
    leaves = flatten(setup.program.init()["params"])
    pure = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(pure, _integers(unflatten(leaves)))
    nnx.update(model, pure)
    held = nnx.Optimizer(model, usual_optimizer(setup.cfg), wrt=nnx.Param)

    def update(model: Nnx, held: Any, batch: dict[str, Any]) -> jax.Array:
        loss, grads = nnx.value_and_grad(lambda model: loss_of(family, model, batch))(model)
        held.update(model, grads)
        return loss

    compiled = nnx.jit(update, donate_argnums=(0, 1))
    if cached:
        again = nnx.cached_partial(compiled, model, held)
        return lambda: again(batch)
    return lambda: compiled(model, held, batch)


def _integers(tree: Any) -> Any:
    """Digits as integers, which is how nnx names the items of a list."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _integers(v) for k, v in tree.items()}


def methods(overrides: list[str], idioms: bool = True) -> tuple[dict[str, Timed], dict[str, Any]]:
    """Every step by name, and the compiled cost of the stages."""
    steps, costs = {}, {}
    for stage in STAGES:
        setup, batch = prepared(overrides, stage)
        program = setup.program
        compiled = program.train_step.lower(program.init(), batch).compile()
        cost: Any = compiled.cost_analysis()
        costs[stage] = {"flops": cost["flops"], "bytes": cost["bytes accessed"]}
        if stage == "linen":
            steps[FLOOR] = floor_step(setup, batch)
        steps[stage] = stage_step(setup, batch)
        if idioms and stage == "linen":
            steps["TrainState, jax.jit"] = train_state_step(setup, batch)
        if idioms and stage == "nnx":
            steps["nnx.Optimizer, nnx.jit"] = nnx_step(setup, batch, cached=False)
            steps["nnx.Optimizer, nnx.cached_partial"] = nnx_step(setup, batch, cached=True)
    return steps, costs


def timed(step: Timed, count: int) -> Callable[[], float]:
    """Seconds a step, over `count` of them, the last one waited for."""

    def measure() -> float:
        begin = time.perf_counter()
        for _ in range(count - 1):
            step()
        jax.block_until_ready(step())
        return (time.perf_counter() - begin) / count

    return measure


def check(overrides: list[str]) -> None:
    """Refuses to compare methods whose first losses differ, without dropout."""
    steps, _ = methods([*overrides, "model.dropout=0"])
    first = {name: float(step()) for name, step in steps.items()}
    base = first[FLOOR]
    wrong = {name: loss for name, loss in first.items() if abs(loss - base) > 1e-4 * abs(base)}
    if wrong:
        raise SystemExit(f"these methods compute something else: {wrong}, the floor {base}")


def step_cost(size: str, rounds: int) -> dict[str, Any]:
    """The figures of one size."""
    overrides, count = SIZES[size]
    check(overrides)
    steps, costs = methods(overrides)
    measures = {name: timed(step, count) for name, step in steps.items()}
    interleave(measures, 2)  # warm-up
    return {"steps": summarise(interleave(measures, rounds), FLOOR), "costs": costs}


def trace_cost(rounds: int) -> dict[str, Any]:
    """Seconds to trace and lower, and to compile, the step of each stage at 12 blocks."""

    def measure(stage: str, compiles: bool) -> Callable[[], float]:
        setup, batch = prepared(DEEP, stage)
        state, variables = setup.program.abstract, setup.stage.abstract()

        def run() -> float:
            # A function that jit has not seen.
            again = Program(Step(setup), variables, setup.initial, setup.layout)
            begin = time.perf_counter()
            lowered = again.train_step.lower(state, batch)
            if compiles:
                begin = time.perf_counter()
                lowered.compile()
            return time.perf_counter() - begin

        return run

    result = {}
    for name, compiles in (("trace and lower", False), ("compile", True)):
        measures = {stage: measure(stage, compiles) for stage in STAGES}
        interleave(measures, 1)
        result[name] = summarise(interleave(measures, max(3, rounds // 3)), "linen")
    return result


def plot(path: Path, sizes: dict[str, Any]) -> None:
    """Bars of each method's ratio to the floor, by size."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(sizes), figsize=(4.2 * len(sizes), 3.6), squeeze=False)
    for axis, (size, found) in zip(axes[0], sizes.items(), strict=True):
        names = [name for name in found["steps"] if name != FLOOR]
        values = [found["steps"][name]["ratio"] for name in names]
        colours = ["tab:blue" if name in STAGES else "tab:gray" for name in names]
        axis.barh(names[::-1], values[::-1], color=colours[::-1])
        axis.axvline(1, color="black", linewidth=0.8)
        floor = found["steps"][FLOOR]["seconds"] * 1e3
        axis.set_title(f"{size}: floor {floor:.3g} ms a step", fontsize=10)
        axis.set_xlabel("time / floor")
        for number, value in enumerate(values[::-1]):
            axis.text(value, number, f" {value:.2f}", va="center", fontsize=8)
        axis.set_xlim(0, max(values) * 1.18)
        if axis is not axes[0][0]:
            axis.set_yticklabels([])
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--png", type=Path, help="where to draw them")
    options = parser.parse_args()
    sizes = {size: step_cost(size, options.rounds) for size in options.sizes}
    for size, found in sizes.items():
        ratios(f"step, {size} ({' '.join(SIZES[size][0])})", found["steps"])
        rows = [["", "FLOPs", "bytes accessed"]]
        rows += [[s, f"{c['flops']:.6g}", f"{c['bytes']:.6g}"] for s, c in found["costs"].items()]
        table("compiled", rows)
    traces = trace_cost(options.rounds)
    for name, found in traces.items():
        ratios(f"{name}, 12 blocks", found)
    save(options.json, {"sizes": sizes, "traces": traces})
    if options.png:
        plot(options.png, sizes)


if __name__ == "__main__":
    main()
