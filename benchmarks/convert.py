"""Times the converter against copying files, and against restoring and saving with Orbax.

    python benchmarks/convert.py [--folder DIR] [--repeats 5] [--json FILE]

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
from collections.abc import Callable
from functools import partial
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
# As users have it: Python keeps the bytecode of what it has compiled.
PLAIN = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
SHAPES = {  # name: (leaves, shape)
    "0.5 GB": (50, (1024, 2560)),
    "2 GB": (200, (1024, 2560)),
    "1000 leaves": (1000, (256, 512)),
    "5000 leaves": (5000, (1024,)),
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


def measure(
    methods: dict[str, Callable[[], tuple[float, float]]], repeats: int
) -> dict[str, dict[str, float]]:
    """Median seconds and largest memory of each method, in interleaved rounds."""
    rounds: dict[str, list[tuple[float, float]]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, method in methods.items():
            rounds[name].append(method())
    return {
        name: {
            "seconds": statistics.median(seconds for seconds, _ in results),
            "memory_mb": max(memory for _, memory in results),
        }
        for name, results in rounds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = benchmark(Path(folder), options.repeats)
    for name, methods in results.items():
        print(f"\n{name}")
        for method, figures in methods.items():
            memory = f"{figures['memory_mb']:8.0f} MB" if figures["memory_mb"] else ""
            print(f"  {method:28}{figures['seconds']:8.3f} s{memory}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def benchmark(folder: Path, repeats: int) -> dict[str, dict[str, dict[str, float]]]:
    """All figures by checkpoint and method."""
    python, out = sys.executable, folder / "out"
    rules = {}
    for name, rule in (("rename", RENAME), ("transpose", TRANSPOSE)):
        rules[name] = str(folder / f"{name}.yaml")
        Path(rules[name]).write_text(yaml.safe_dump({"version": 1, "rules": [rule]}))
    results = {}
    for name, (count, shape) in SHAPES.items():
        source = folder / name.replace(" ", "_")
        print(f"making {name}", file=sys.stderr)
        make = [python, "-c", MAKE, str(source), str(count), str(shape)]
        subprocess.run(make, check=True, stderr=subprocess.DEVNULL)

        def convert(*more: str, source: Path = source, rule: str = "rename") -> list[str]:
            command = [python, "convert.py", "run", str(source), str(out), "--to", "nnx"]
            return [*command, "--rules", rules[rule], *more]

        def other(code: str, source: Path = source) -> list[str]:
            return [python, "-W", "ignore", "-c", code, str(source), str(out)]

        methods = {
            "cp -r, fsync": partial(copy, source, out),
            "convert": partial(run, convert(), out),
            "convert --link": partial(run, convert("--link"), out),
            "restore, rename, save": partial(run, other(ORBAX), out),
        }
        if name == "0.5 GB":
            methods["convert, transposing"] = partial(run, convert(rule="transpose"), out)
            methods["tensorstore read, write"] = partial(run, other(TENSORSTORE), out)
        if name == "5000 leaves":
            inspect = [python, "convert.py", "inspect", str(source)]
            methods["inspect"] = partial(run, inspect, out)
            methods["--help"] = partial(run, [python, "convert.py", "--help"], out)
        results[name] = measure(methods, repeats)
        shutil.rmtree(source)
    return results


if __name__ == "__main__":
    main()
