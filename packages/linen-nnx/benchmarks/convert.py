"""Times the converter against copying files, and against restoring and saving with Orbax.

    python -m benchmarks.convert [--folder DIR] [--rounds 5] [--json FILE]

Every figure is a whole process (start-up included), in interleaved rounds, of which the median
counts. Peak memory is that of the process. Needs about 10 GB of disk; takes about 10 minutes.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.rounds import interleave, save, table

ROOT = Path(__file__).parent.parent
# As users have it: Python keeps the bytecode of what it has compiled.
PLAIN = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
SHAPES = {  # name: (leaves, shape)
    "0.5 GB": (50, (1024, 2560)),
    "2 GB": (200, (1024, 2560)),
    "1000 leaves": (1000, (256, 512)),
    "5000 leaves": (5000, (1024,)),
    "50000 leaves": (50_000, (4,)),
}
RENAME = {"linen": "params/Block_{i}/Dense_0/kernel", "nnx": "blocks/{i}/up/kernel"}
TRANSPOSE = {**RENAME, "ops": [{"op": "transpose", "perm": [1, 0]}]}

MAKE = """
import sys, numpy as np, orbax.checkpoint as ocp
path, count, shape = sys.argv[1], int(sys.argv[2]), eval(sys.argv[3])
rng = np.random.default_rng(0)
leaf = lambda: {"Dense_0": {"kernel": rng.standard_normal(shape, np.float32)}}
with ocp.StandardCheckpointer() as c:
    c.save(path, {"params": {f"Block_{i}": leaf() for i in range(count)}})
"""
ORBAX = """
import sys, orbax.checkpoint as ocp
with ocp.StandardCheckpointer() as c:
    blocks = c.restore(sys.argv[1])["params"]
    tree = {"blocks": {k[6:]: {"up": {"kernel": {"value": v["Dense_0"]["kernel"]}}}
                       for k, v in blocks.items()}}
    c.save(sys.argv[2], tree)
"""
TENSORSTORE = """
import sys, tensorstore as ts
old, new = ({"driver": "ocdbt", "base": f"file://{p}/"} for p in sys.argv[1:3])
context = ts.Context()
kv = ts.KvStore.open(old, context=context).result()
names = [k[: -len("/.zarray")].decode() for k in kv.list().result() if k.endswith(b"/.zarray")]
for name in names:
    open_ = lambda kv, **more: ts.open(
        {"driver": "zarr", "kvstore": {**kv, "path": name + "/"}, **more}, context=context).result()
    array = open_(old)
    metadata = array.spec().to_json()["metadata"]
    array = array.read().result()
    open_(new, create=True, metadata=metadata).write(array).result()
"""


def make(path: Path, count: int, shape: tuple[int, ...]) -> None:
    """A checkpoint of `count` random float32 leaves of one shape."""
    path.parent.mkdir(exist_ok=True)
    command = [sys.executable, "-c", MAKE, str(path), str(count), str(shape)]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


def conversion(source: Path, out: Path, rule: dict[str, Any], *more: str) -> list[str]:
    """The command that converts what `make` has made."""
    book = source.parent / ("transpose.yaml" if "ops" in rule else "rename.yaml")
    book.write_text(json.dumps({"version": 1, "rules": [rule]}))
    command = [sys.executable, "-m", "linen_nnx", "run", str(source), str(out), "--to", "nnx"]
    return [*command, "--rules", str(book), *more]


def run(command: list[str], out: Path) -> tuple[float, float]:
    """Wall time in seconds and peak memory in MB of one process that writes `out`."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, env=PLAIN, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {command}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def copy(source: Path, out: Path) -> tuple[float, float]:
    """`cp -r`, and every file and directory synced to disk."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, out], check=True)
    for folder, _, names in os.walk(out):
        for path in [folder, *(os.path.join(folder, name) for name in names)]:
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return time.perf_counter() - start, 0.0


def benchmark(folder: Path, rounds: int) -> dict[str, dict[str, dict[str, float]]]:
    """Median seconds and largest memory by checkpoint and method."""
    out, found = folder / "out", {}
    for name, (count, shape) in SHAPES.items():
        source = folder / name.replace(" ", "_") / "source"
        print(f"making {name}", file=sys.stderr)
        make(source, count, shape)

        def convert(*more: str, rule: dict[str, Any] = RENAME, source: Path = source) -> Any:
            return partial(run, conversion(source, out, rule, *more), out)

        def other(*arguments: str, source: Path = source) -> Any:
            return partial(run, [sys.executable, *arguments, str(source), str(out)], out)

        methods = {
            "cp -r, fsync": partial(copy, source, out),
            "convert": convert(),
            "convert --link": convert("--link"),
            "restore, rename, save": other("-W", "ignore", "-c", ORBAX),
        }
        if name == "0.5 GB":
            methods["convert, transposing"] = convert(rule=TRANSPOSE)
            methods["tensorstore read, write"] = other("-W", "ignore", "-c", TENSORSTORE)
        if name == "5000 leaves":
            own = [sys.executable, "-m", "linen_nnx"]
            methods["inspect"] = partial(run, [*own, "inspect", str(source)], out)
            methods["--help"] = partial(run, [*own, "--help"], out)
        if name == "50000 leaves":
            done = source.with_name("done")
            run(conversion(source, done, RENAME), done)
            verify = [sys.executable, "-m", "linen_nnx", "verify", str(source), str(done)]
            methods = {"convert": convert(), "verify": partial(run, verify, out)}
        found[name] = {
            method: {
                "seconds": statistics.median(seconds for seconds, _ in results),
                "memory_mb": max(memory for _, memory in results),
            }
            for method, results in interleave(methods, rounds).items()
        }
        shutil.rmtree(source.parent)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = benchmark(Path(folder), options.rounds)
    for name, methods in results.items():
        rows = [["", "seconds", "memory, MB"]]
        for method, figures in methods.items():
            memory = f"{figures['memory_mb']:.0f}" if figures["memory_mb"] else ""
            rows.append([method, f"{figures['seconds']:.3f}", memory])
        table(name, rows)
    save(options.json, results)


if __name__ == "__main__":
    main()
