"""Times a conversion inside a bucket against download, convert and upload.

    python -m benchmarks.buckets [--folder DIR] [--rounds 5] [--json FILE]

The bucket is a server of S3's protocol on this machine (`s3_server.py`), whose work counts, too:
the figures say how much work there is, and nothing of a network. Each is that of whole processes,
in interleaved rounds, of which the median counts. Before the rounds one conversion is watched: how
often it asked for a data file, and whether stock Orbax restores each leaf bit for bit. Needs 2 GB
of disk; takes two minutes.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import obstore

from benchmarks.convert import PLAIN, RENAME, ROOT, conversion, make
from benchmarks.rounds import interleave, save, table
from benchmarks.s3_server import S3Server

COUNT, SHAPE = 48, (1024, 1024)  # 201 MB in kernels of 4 MB
SMALL = 1 << 20  # bytes of a file that holds no arrays but a tree

TRANSFER = """
import os, sys, obstore
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from obstore.store import S3Store
store = S3Store("bkt", endpoint=os.environ["AWS_ENDPOINT_URL"], client_options={"allow_http": True})
way, folder, prefix = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
def down(key):
    path = folder / key.removeprefix(prefix + "/")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for block in obstore.get(store, key).stream(min_chunk_size=1 << 20):
            file.write(block)
def up(path):
    obstore.put(store, f"{prefix}/{path.relative_to(folder)}", path)
if way == "down":
    jobs = [one["path"] for some in obstore.list(store, prefix) for one in some]
else:
    jobs = [path for path in folder.rglob("*") if path.is_file()]
with ThreadPoolExecutor(8) as pool:
    list(pool.map(down if way == "down" else up, jobs))
"""
RESTORED = """
import sys, numpy as np, orbax.checkpoint as ocp
old, new = (ocp.StandardCheckpointer().restore(path) for path in sys.argv[1:])
for number in range(len(old["params"])):
    one = old["params"][f"Block_{number}"]["Dense_0"]["kernel"]
    other = new["blocks"][str(number)]["up"]["kernel"]["value"]
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), number
"""


class Ways:
    """The ways from a checkpoint in the bucket to its other form in the bucket."""

    def __init__(self, folder: Path, server: S3Server) -> None:
        self._folder, self._server, self._count = folder, server, 0

    def inside(self) -> tuple[float, float]:
        """The server copies; what is new is put."""
        return self._timed(self._convert("s3://bkt/old", f"s3://bkt/{self._name()}"))

    def around(self) -> tuple[float, float]:
        """All of it comes here and goes back, eight files at a time."""
        here, out = self._folder / self._name(), self._folder / self._name()
        return self._timed(
            self.transfer("down", here, "old"),
            self._convert(str(here), str(out)),
            self.transfer("up", out, out.name),
        )

    def down(self) -> tuple[float, float]:
        return self._timed(self._convert("s3://bkt/old", str(self._folder / self._name())))

    def up(self) -> tuple[float, float]:
        old = str(self._folder / "old")
        return self._timed(self._convert(old, f"s3://bkt/{self._name()}"))

    def watched(self) -> dict[str, float]:
        """The requests of one conversion inside the bucket, by kind."""
        self._server.requests()
        name = self._name()
        command = self._convert("s3://bkt/old", f"s3://bkt/{name}")
        environment = {**PLAIN, **self._server.environment()}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        requests = self._server.requests()
        entries = [one for some in obstore.list(self._server.store("bkt"), "old") for one in some]
        data = {f"/bkt/{one['path']}" for one in entries if one["size"] > SMALL}
        reads = [request for request in requests if request.startswith("GET")]
        subprocess.run(
            self.transfer("down", self._folder / name, name), env=self.direct, check=True
        )
        paths = [str(self._folder / "old"), str(self._folder / name)]
        command = [sys.executable, "-c", RESTORED, *paths]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        return {
            "requests": len(requests),
            "puts": sum(request.startswith("PUT") for request in requests),
            "data_files": len(data),
            "gets_of_data_files": sum(request.split()[1] in data for request in reads),
        }

    @property
    def direct(self) -> dict[str, str]:
        """The environment of a process that asks the server without the proxy between."""
        return {**PLAIN, **self._server.environment(log=False)}

    def _name(self) -> str:
        self._count += 1
        return f"out{self._count}"

    def _convert(self, old: str, new: str) -> list[str]:
        # `conversion` writes the rule book beside a source, which these have none of.
        command = conversion(self._folder / "old", Path("new"), RENAME)
        at = command.index("run") + 1
        return [*command[:at], old, new, *command[at + 2 :]]

    def transfer(self, way: str, folder: Path, prefix: str) -> list[str]:
        """The command that takes all files `down` from a prefix, or `up` to it."""
        return [sys.executable, "-c", TRANSFER, way, str(folder), prefix]

    def _timed(self, *commands: list[str]) -> tuple[float, float]:
        """Seconds of some processes, one after another, and the largest memory of one in MB."""
        start, largest = time.perf_counter(), 0.0
        for command in commands:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.direct, stdout=subprocess.DEVNULL
            )
            _, status, usage = os.wait4(process.pid, 0)
            if status:
                raise SystemExit(f"failed: {command}")
            largest = max(largest, usage.ru_maxrss / 1024)
        return time.perf_counter() - start, largest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary one)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make(folder / "old", COUNT, SHAPE)
        with S3Server(folder / "server") as server:
            ways = Ways(folder, server)
            upload = ways.transfer("up", folder / "old", "old")
            subprocess.run(upload, env=ways.direct, check=True)
            watched = ways.watched()
            methods = {
                "inside the bucket": ways.inside,
                "download, convert, upload": ways.around,
                "bucket to disk": ways.down,
                "disk to bucket": ways.up,
            }
            found = interleave(methods, options.rounds)
    rows = [["201 MB, 48 leaves", "seconds", "ratio", "memory, MB"]]
    content: dict[str, dict[str, float]] = {"requests": watched}
    floor = median(seconds for seconds, _ in found["download, convert, upload"])
    for method, results in found.items():
        seconds = median(seconds for seconds, _ in results)
        memory = max(memory for _, memory in results)
        content[method] = {"seconds": seconds, "ratio": seconds / floor, "memory_mb": memory}
        rows.append([method, f"{seconds:.2f}", f"{seconds / floor:.2f}", f"{memory:.0f}"])
    table("One checkpoint by Orbax on a server of S3's protocol", rows)
    print(", ".join(f"{count} {name.replace('_', ' ')}" for name, count in watched.items()))
    save(options.json, content)


if __name__ == "__main__":
    main()
