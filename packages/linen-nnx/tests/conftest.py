"""What all tests share: eight simulated CPU devices, and a cache of compiled programs."""

import os
from collections.abc import Iterable
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

STAGES = ("linen", "nnx_in_linen", "linen_in_nnx", "nnx")


def sampled(cases: Iterable[Any], every: int) -> list[Any]:
    """Parameters of a test: one in `every` is always run, the others are long.

    For cases of one kind, each as dear as the others: a few show that the kind holds.
    """
    return [
        case if number % every == 0 else pytest.param(case, marks=pytest.mark.long)
        for number, case in enumerate(cases)
    ]
