"""What all tests share: eight simulated CPU devices, and small runs of the three experiments."""

import os
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
).strip()
# Many tests run the same programs, some in processes of their own: each is compiled once.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache" / "jax")
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
SMALL = {
    "lm": (
        "experiment=lm", "model.width=32", "model.depth=2", "data.length=32", "data.batch=8",
        "eval.batches=2", "log.samples=0",
    ),
    "digits": ("experiment=digits", "model.width=8", "data.batch=16", "log.samples=0"),
    "diabetes": ("experiment=diabetes", "data.batch=16"),
}  # fmt: skip
# Older ones, which an environment not made by `make` may have, do not read pyproject.toml.
needs_setuptools = pytest.mark.skipif(
    int(version("setuptools").split(".")[0]) < 77, reason="needs make's setuptools"
)
QUIET = ("log.tensorboard=false", "log.progress=false", "log_every=1")


def sampled(cases: Iterable[Any], every: int) -> list[Any]:
    """Parameters of a test: one in `every` is always run, the others are long.

    For cases of one kind, each as dear as the others: a few show that the kind holds.
    """
    return [
        case if number % every == 0 else pytest.param(case, marks=pytest.mark.long)
        for number, case in enumerate(cases)
    ]


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
