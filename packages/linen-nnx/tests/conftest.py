"""What all tests share: eight simulated CPU devices, and a cache of compiled programs."""

import gc
import os
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

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

STAGES = ("linen", "nnx_in_linen", "linen_in_nnx", "nnx")


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
