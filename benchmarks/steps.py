"""Times one training step of every stage against a floor and against the usual idioms.

    python -m benchmarks.steps [--rounds 15] [--sizes small lm large] [--json FILE] [--png FILE]

The floor is the same step with everything around it taken away: one jitted function over a flat
list of arrays, made of the `linen` stage's own jaxpr. The idioms are what one would write without
this template, for the same model, losses, clipping, optimizer and schedule: a `TrainState` under
`jax.jit`, and an `nnx.Optimizer` under `nnx.jit`, with and without `nnx.cached_partial`.
Every method starts from the same parameters, and the first losses are compared.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState

from benchmarks.rounds import interleave, ratios, save, summarise, table
from configs.schema import Config
from linen_nnx.book.tree import flatten, unflatten
from model import families
from model.stages import STAGES, Stage
from training import cli, data, datasets, optimizer, start
from training.state import Program

SIZES = {  # name: (overrides, steps in one measurement)
    "small": (["experiment=diabetes"], 300),
    "lm": (["experiment=lm"], 1),
    "large": (["experiment=lm", "model.width=256", "model.depth=6"], 1),
}
FLOOR = "floor"
DEEP = ["experiment=lm", "model.width=32", "model.depth=12", "data.length=32", "data.batch=4"]

Step = Callable[[], jax.Array]


def program(overrides: list[str], stage: str) -> tuple[Config, Program, dict[str, Any]]:
    """A run's program at a stage, and one batch of its data on the device."""
    cfg = cli.compose(*overrides, f"stage={stage}", checks={"model": families.create})
    dataset = datasets.load(datasets.create(cfg.data))
    batch = jax.tree.map(jnp.asarray, next(data.train_iterator(dataset)))
    family = families.create(cfg.model)
    rules = start.load_rules(cfg, family)
    return cfg, Program(cfg, Stage(cfg.stage, family, batch["inputs"]), rules), batch


def stage_step(made: Program, batch: dict[str, Any]) -> Step:
    """The template's own step; each call is one update and returns its loss."""
    state = made.init()

    def step() -> jax.Array:
        nonlocal state
        state, metrics = made.train_step(state, batch)
        return metrics["loss"]

    return step


def floor_step(made: Program, batch: dict[str, Any]) -> Step:
    """The jaxpr of the step as a function of a flat list of arrays."""
    state = made.init()
    leaves = jax.tree.leaves(state)
    outputs = jax.tree.structure(jax.eval_shape(made.train_step, state, batch))
    traced = jax.make_jaxpr(made.train_step)(state, batch)
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


class Linen(nn.Module):
    """The whole model as a Linen code base has it."""

    encoder: nn.Module
    head: nn.Module

    def __call__(self, inputs: jax.Array, key: jax.Array) -> jax.Array:
        features, shared = self.encoder(inputs, train=True, key=jax.random.fold_in(key, 0))
        return self.head(features, shared, train=True, key=jax.random.fold_in(key, 1))


def train_state_step(cfg: Config, made: Program, batch: dict[str, Any]) -> Step:
    """`TrainState` under `jax.jit`, donated."""
    family = made.stage.family
    twin = family.twin("linen")
    model = Linen(twin.Encoder(family.cfg), twin.Head(family.cfg))
    state = TrainState.create(
        apply_fn=model.apply,
        params=made.init().variables["params"],
        tx=usual_optimizer(cfg),
    )

    def update(state: TrainState, batch: dict[str, Any]) -> tuple[TrainState, jax.Array]:
        key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)

        def loss_fn(params: Any) -> jax.Array:
            outputs: Any = state.apply_fn({"params": params}, batch["inputs"], key)
            return family.losses(outputs, batch)["loss"].mean()

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

    def __init__(self, encoder: nnx.Module, head: nnx.Module) -> None:
        self.encoder, self.head = encoder, head

    def __call__(self, inputs: jax.Array, key: jax.Array) -> jax.Array:
        features, shared = self.encoder(inputs, train=True, key=jax.random.fold_in(key, 0))
        return self.head(features, shared, train=True, key=jax.random.fold_in(key, 1))


def nnx_step(cfg: Config, made: Program, batch: dict[str, Any], cached: bool) -> Step:
    """`nnx.Optimizer` under `nnx.jit`; `cached`: with `nnx.cached_partial`."""
    family = made.stage.family
    twin, rngs = family.twin("nnx"), nnx.Rngs(0)
    model = Nnx(twin.Encoder(family.cfg, rngs=rngs), twin.Head(family.cfg, rngs=rngs))
    leaves = flatten(made.init().variables["params"])
    pure = nnx.state(model, nnx.Param)
    nnx.replace_by_pure_dict(pure, _integers(unflatten(leaves)))
    nnx.update(model, pure)
    held = nnx.Optimizer(model, usual_optimizer(cfg), wrt=nnx.Param)

    def update(model: Nnx, held: Any, batch: dict[str, Any]) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(cfg.seed), held.step[...])

        def loss_fn(model: Nnx) -> jax.Array:
            return family.losses(model(batch["inputs"], key), batch)["loss"].mean()

        loss, grads = nnx.value_and_grad(loss_fn)(model)
        held.update(model, grads)
        return loss

    compiled = nnx.jit(update, donate_argnums=(0, 1))
    if cached:
        partial = nnx.cached_partial(compiled, model, held)
        return lambda: partial(batch)
    return lambda: compiled(model, held, batch)


def _integers(tree: Any) -> Any:
    """Digits as integers, which is how nnx names the items of a list."""
    if not isinstance(tree, dict):
        return tree
    return {int(k) if k.isdigit() else k: _integers(v) for k, v in tree.items()}


def methods(overrides: list[str], idioms: bool = True) -> tuple[dict[str, Step], dict[str, Any]]:
    """Every step by name, and the compiled cost of the stages."""
    steps, costs = {}, {}
    for stage in STAGES:
        cfg, made, batch = program(overrides, stage)
        compiled = made.train_step.lower(made.init(), batch).compile()
        cost: Any = compiled.cost_analysis()
        costs[stage] = {"flops": cost["flops"], "bytes": cost["bytes accessed"]}
        if stage == "linen":
            steps[FLOOR] = floor_step(made, batch)
        steps[stage] = stage_step(made, batch)
        if idioms and stage == "linen":
            steps["TrainState, jax.jit"] = train_state_step(cfg, made, batch)
        if idioms and stage == "nnx":
            steps["nnx.Optimizer, nnx.jit"] = nnx_step(cfg, made, batch, cached=False)
            steps["nnx.Optimizer, nnx.cached_partial"] = nnx_step(cfg, made, batch, cached=True)
    return steps, costs


def timed(step: Step, count: int) -> Callable[[], float]:
    """Seconds a step, over `count` of them, the last one waited for."""

    def measure() -> float:
        begin = time.perf_counter()
        for _ in range(count - 1):
            step()
        jax.block_until_ready(step())
        return (time.perf_counter() - begin) / count

    return measure


def step_cost(size: str, rounds: int) -> dict[str, Any]:
    """The figures of one size; refuses to compare methods whose first losses differ."""
    overrides, count = SIZES[size]
    steps, costs = methods(overrides)
    first = {name: float(step()) for name, step in steps.items()}
    base = first[FLOOR]
    wrong = {name: loss for name, loss in first.items() if abs(loss - base) > 1e-4 * abs(base)}
    if wrong:
        raise SystemExit(f"these methods compute something else: {wrong}, the floor {base}")
    measures = {name: timed(step, count) for name, step in steps.items()}
    interleave(measures, 2)  # warm-up
    return {"steps": summarise(interleave(measures, rounds), FLOOR), "costs": costs}


def trace_cost(rounds: int) -> dict[str, Any]:
    """Seconds to trace and lower, and to compile, the step of each stage at 12 blocks."""

    def measure(stage: str, compiles: bool) -> Callable[[], float]:
        cfg, made, batch = program(DEEP, stage)
        state = made.abstract

        def run() -> float:
            again = Program(cfg, made.stage, made.rules)  # a function that jit has not seen
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
