"""What all tests share: eight simulated CPU devices, and no test that depends on time."""

import os

from hypothesis import HealthCheck, settings

# Before anything imports jax; programs that the tests start inherit it.
os.environ["JAX_PLATFORMS"] = "cpu"
devices = "--xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()

settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")
