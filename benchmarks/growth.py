"""Shows how cost grows: steps with depth, width and devices; conversion with bytes and leaves.

    python -m benchmarks.growth [--json FILE] [--png FILE] [--folder DIR]

Each point is a process of its own, so that memory is its own too: the seconds of a step (median of
ten and more) and of compiling it, the peak memory of the process, the bytes of parameters and
optimizer state on one device; for conversions the whole process, median of three; for `suggest`
the call alone.
"""

import argparse
import json
import math
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.convert import RENAME, ROOT, conversion, make, run
from benchmarks.rounds import save, table

BASE = ["experiment=lm", "model.width=64", "model.depth=4", "data.batch=16", "compile_cache=null"]
STEPS = {
    "depth": [1, 2, 4, 8, 16],
    "width": [32, 64, 128, 256, 512],
    "devices": [1, 2, 4, 8],
}
BYTES = [(n, (1024, 1024)) for n in (16, 64, 256, 1024)]  # of 4 MB each
LEAVES = [(n, (256,)) for n in (100, 500, 2000, 10000)]
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

    import model
    from linen_nnx import Twin, suggest
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


def converted(folder: Path, count: int, shape: tuple[int, ...], *how: str) -> dict[str, float]:
    """Makes a checkpoint, and times the conversion of it."""
    source, out = folder / "source", folder / "out"
    shutil.rmtree(source, ignore_errors=True)
    make(source, count, shape)
    command = conversion(source, out, RENAME, *how)
    results = [run(command, out) for _ in range(3)]
    shutil.rmtree(out)
    return {
        "seconds": statistics.median(seconds for seconds, _ in results),
        "memory_mb": max(memory for _, memory in results),
    }


def measure(folder: Path) -> dict[str, dict[str, dict[str, float]]]:
    """`{curve: {x: figures}}`."""
    curves: dict[str, dict[str, dict[str, float]]] = {}
    for axis, values in STEPS.items():
        curves[f"step, by {axis}"] = {str(value): child(axis, value) for value in values}
    curves["copy, by MB"] = {
        str(count * 4): converted(folder, count, shape) for count, shape in BYTES
    }
    curves["--link, by leaves"] = {
        str(count): converted(folder, count, shape, "--link") for count, shape in LEAVES
    }
    points = [child("suggest", blocks) for blocks in SUGGESTED]
    curves["suggest, by leaves"] = {str(int(found["leaves"])): found for found in points}
    return curves


def plot(path: Path, curves: dict[str, dict[str, dict[str, float]]]) -> None:
    """Seconds and memory of every curve, on logarithmic axes."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4))
    for axis, (title, points) in zip(axes.flat, curves.items(), strict=True):
        x = [float(key) for key in points]
        seconds = [p["seconds"] for p in points.values()]
        axis.loglog(x, seconds, "o-")
        decades = math.floor(math.log10(min(seconds))), math.ceil(math.log10(max(seconds)))
        axis.set_ylim(10.0 ** decades[0], 10.0 ** decades[1])
        axis.set_ylabel("seconds")
        other = axis.twinx()
        memory = [p["memory_mb"] for p in points.values()]
        other.plot(x, memory, "s:", color="tab:gray")
        other.set_ylabel("peak memory, MB", color="tab:gray")
        other.set_ylim(0, 1.15 * max(memory))
        axis.set_title(title)
        axis.set_xticks(x, [f"{value:g}" for value in x])
        axis.minorticks_off()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--png", type=Path, help="where to draw them")
    parser.add_argument("--folder", type=Path, help="where checkpoints are made (about 9 GB)")
    parser.add_argument("--point", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        return point(options.point[0], int(options.point[1]))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        curves = measure(Path(folder))
    for title, points in curves.items():
        names = list(next(iter(points.values())))
        rows = [["", *names]]
        rows += [[x, *(f"{found[name]:.4g}" for name in names)] for x, found in points.items()]
        table(title, rows)
    save(options.json, curves)
    if options.png:
        plot(options.png, curves)
    return None


if __name__ == "__main__":
    main()
