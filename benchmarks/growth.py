"""Shows how cost grows: of a step with depth, width and devices, of `suggest` with leaves.

    python -m benchmarks.growth [--json FILE] [--png FILE]

Each point is a process of its own, so that memory is its own too: the seconds of a step (median of
ten and more) and of compiling it, the peak memory of the process, the bytes of parameters and
optimizer state on one device; for `suggest` the call alone.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.rounds import Curves, report

ROOT = Path(__file__).parent.parent

BASE = [
    "experiment=lm", "model.width=64", "model.depth=4", "data.length=128", "data.batch=16",
    "compile_cache=null",
]  # fmt: skip
STEPS = {
    "depth": [1, 2, 4, 8, 16],
    "width": [32, 64, 128, 256, 512],
    "devices": [1, 2, 4, 8],
}
SUGGESTED = [4, 16, 64]  # blocks of 14 leaves


def step(axis: str, value: int) -> dict[str, float]:
    """One point: run in a process of its own."""
    import jax

    from training import compose
    from training.assemble import prepare

    change = f"mesh.fsdp={value}" if axis == "devices" else f"model.{axis}={value}"
    setup = prepare(compose(*BASE, change))
    program = setup.program
    batch, state = program.place(setup.example), program.init()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    times: list[float] = []
    while len(times) < 12 or sum(times[2:]) < 2:
        begin = time.perf_counter()
        state, _ = jax.block_until_ready(program.train_step(state, batch))
        times.append(time.perf_counter() - begin)
    seconds = statistics.median(times[2:])
    return {"seconds": seconds, "compile": times[0] - seconds, "state_mb": held / 1e6}


def suggestion(blocks: int) -> dict[str, float]:
    """One point: run in a process of its own."""
    import jax
    import jax.numpy as jnp
    from linen_nnx import Twin, suggest

    import model
    from training import compose

    family = model.create(compose(*BASE, f"model.depth={blocks}").model)
    encoder = family.module.parts(family.options)["encoder"]
    tokens = jnp.zeros((1, family.options.length), jnp.int32)
    twin = Twin(
        linen=encoder.linen,
        nnx=encoder.nnx,
        inputs=lambda: (tokens,),
        call_linen=lambda module, variables, x: module.apply(variables, x, train=False),
        call_nnx=lambda model, x: model(x, train=False),
        init_linen=lambda module, key, x: module.init(key, x, train=False),
    )
    variables = jax.eval_shape(
        lambda: encoder.module().init(jax.random.key(0), tokens, train=False)
    )
    leaves = len(jax.tree.leaves(variables))
    begin = time.perf_counter()
    book = suggest(twin)
    seconds = time.perf_counter() - begin
    return {"seconds": seconds, "leaves": leaves, "unassigned": len(book.unassigned)}


def child(kind: str, value: int) -> dict[str, float]:
    """Runs one point in a process of its own; adds its peak memory."""
    devices = value if kind == "devices" else 1
    flags = f"--xla_force_host_platform_device_count={devices}"
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.growth", "--point", kind, str(value)],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(result.stdout.splitlines()[-1])


def point(kind: str, value: int) -> None:
    found = suggestion(value) if kind == "suggest" else step(kind, value)
    found["memory_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps(found))


def measure() -> Curves:
    """`{curve: {x: figures}}`."""
    curves: Curves = {}
    for axis, values in STEPS.items():
        curves[f"step, by {axis}"] = {str(value): child(axis, value) for value in values}
    points = [child("suggest", blocks) for blocks in SUGGESTED]
    curves["suggest, by leaves"] = {str(int(found["leaves"])): found for found in points}
    return curves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--png", type=Path, help="where to draw them")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        point(options.point[0], int(options.point[1]))
    else:
        report(measure(), options.json, options.png)


if __name__ == "__main__":
    main()
