"""What all tests share: eight simulated CPU devices, and small runs of the three experiments."""

import gc
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# Many tests run the same programs, some in processes of their own: each is compiled once.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache" / "jax")
# Two arrays of another rank that meet are more often a mistake than meant.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import pytest
from hypothesis import HealthCheck, settings

# A busy machine is no finding: no test depends on time. The same examples on every run.
settings.register_profile(
    "steady",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("steady")

Train = Callable[..., Path]

STAGES = ("linen", "nnx_in_linen", "linen_in_nnx", "nnx")

# Each experiment as it is, only smaller: dropout, clipping, weight decay, warm-up all stay on.
# To compile a step of the first two takes longer than a test's steps do, and `steps` and the rates
# are part of the program. So a test that does not care about them ends its run by `stop_at=`
# instead: then one compiled program serves many tests.
SMALL = {
    "lm": (
        "experiment=lm", "model.width=32", "model.depth=2", "data.length=32", "data.batch=8",
        "steps=150", "optimizer.lr=2e-3",
        "eval.batches=2", "log.samples=0",
    ),
    "digits": (
        "experiment=digits", "model.width=8", "data.batch=16",
        "steps=150", "optimizer.lr=5e-3",
        "log.samples=0",
    ),
    "diabetes": ("experiment=diabetes", "data.batch=16"),
}  # fmt: skip
# Older ones, which an environment not made by `make` may have, do not read pyproject.toml.
needs_setuptools = pytest.mark.skipif(
    int(version("setuptools").split(".")[0]) < 77, reason="needs make's setuptools"
)
QUIET = ("log.tensorboard=false", "log.progress=false", "log_every=1")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`@pytest.mark.sampled(2)`: two cases of a test are always run, the others are long.

    For cases of one kind, each as dear as the others: a few show that the kind holds. They are
    taken at even distances, the first among them. A case that is named alone is run.
    """
    cases = defaultdict(list)
    for item in items:
        if item.get_closest_marker("long") is None:
            cases[item.nodeid.partition("[")[0]].append(item)
    for group in cases.values():
        marker = group[0].get_closest_marker("sampled")
        if marker is None:
            continue
        (count,) = marker.args
        always = {number * len(group) // count for number in range(count)}
        for number, item in enumerate(group):
            if number not in always:
                item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Compiled programs of one file are of no use to the next, and take gigabytes together."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()


def bits(tree: Any) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every leaf of a tree by its path: dtype, shape and bytes."""
    import jax
    import numpy as np

    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        is_key = isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(
            leaf.dtype, jax.dtypes.prng_key
        )
        array = np.asarray(jax.random.key_data(leaf) if is_key else leaf)
        found[jax.tree_util.keystr(path)] = (str(leaf.dtype), array.shape, array.tobytes())
    return found


def restored(step: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every leaf of the state in a step directory, as stock Orbax restores it."""
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as reader:
        return bits(reader.restore(str(step / "state")))


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """Trains a small experiment in this process: `train("lm", "stage=nnx", "steps=5")`.

    Returns the run directory, a fresh one below `tmp_path` unless `run_dir=` is among the
    overrides; only what is asked for is evaluated, saved and shown.
    """
    from training import compose, loop

    runs = iter(range(1000))

    def call(experiment: str, *overrides: str) -> Path:
        given = [text.removeprefix("run_dir=") for text in overrides if text[:8] == "run_dir="]
        run_dir = Path(given[0]) if given else tmp_path / f"run{next(runs)}"
        settings = [*SMALL[experiment], *QUIET, "checkpoint.best=false", "checkpoint.every=100000"]
        loop.train(compose(*settings, f"run_dir={run_dir}", *overrides))
        return run_dir

    return call
