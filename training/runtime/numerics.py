"""What moves every bit of a run and stands in none of its keys: settings of JAX, flags of XLA.

    $ JAX_ENABLE_X64=1 python train.py         # or jax.config.update("jax_enable_x64", True)

Both ways set the same thing, so that JAX's own configuration is asked, not the environment. A run
records these in `config.yaml` and in each checkpoint, and a resume under others is refused as one
with another seed is. Where a run computes (versions, kind of device) moves its bits as well, but
people have to change it on the way: it is recorded, and a change is said.
"""

import os
import shlex
from collections.abc import Mapping
from enum import Enum
from importlib import import_module
from typing import Any

import jax

# By name in `jax.config`; those that the installed version does not have are left out.
SETTINGS = (
    "jax_enable_x64",
    "jax_explicit_x64_dtypes",
    "jax_default_dtype_bits",
    "jax_numpy_dtype_promotion",
    "jax_default_matmul_precision",
    "jax_allow_f16_reductions",
    "jax_softmax_custom_jvp",
    "jax_accurate_erf_inv",
    "jax_use_hlo_logistic_lowering",
    # random numbers
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_random_seed_offset",
    "jax_high_dynamic_range_gumbel",
    # what is compiled, and so how it is fused and rounded
    "jax_disable_jit",
    "jax_disable_most_optimizations",
    "jax_optimization_level",
    "jax_exec_time_optimization_effort",
    "jax_memory_fitting_level",
    "jax_memory_fitting_effort",
    "jax_compiler_enable_remat_pass",
    "jax_use_direct_linearize",
    "jax_custom_jvp3",
    "jax_remat_barrier_no_cotangents",
    "jax_use_shardy_partitioner",
    "jax_enable_pgle",
)

# Read by XLA and by CUDA's libraries themselves: these are in the environment alone.
VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")

# Flags of XLA that a run may change: what it prints, and the number of devices, as with `mesh`.
FREE_FLAGS = ("--xla_force_host_platform_device_count", "--xla_dump_", "--xla_hlo_profile")

PACKAGES = ("jax", "jaxlib", "flax", "optax")


def setting(name: str) -> Any:
    """A setting of JAX as it is now, in this thread; None where this version has none."""
    return getattr(jax.config, name, jax.config.values.get(name))


def recorded() -> dict[str, dict[str, Any]]:
    """All of it as plain values, as `config.yaml` and the checkpoints hold it: `numerics`, which
    must stay, and `surroundings`, which may change."""
    settings = {name: _plain(setting(name)) for name in SETTINGS if name in jax.config.values}
    variables = {name: _flags(os.environ.get(name, "")) for name in VARIABLES}
    packages = {name: import_module(name).__version__ for name in PACKAGES}
    return {
        "numerics": settings | variables,
        "surroundings": packages
        | {"device": jax.devices()[0].device_kind, "devices": jax.device_count()},
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed, a line each. What either side does not know is left out: another version
    of JAX has other settings.

    Example:
      >>> differences({"jax_enable_x64": True, "old": 1}, {"jax_enable_x64": False, "new": 2})
      ['  JAX_ENABLE_X64: was True, is False']
    """
    return [
        f"  {_variable(name)}: was {value}, is {now[name]}"
        for name, value in before.items()
        if name in now and now[name] != value
    ]


def changes_since(run: Mapping[str, Any]) -> list[str]:
    """How a checkpoint's run, by its item `run`, was computed otherwise than this process would."""
    now = recorded()
    return [
        line
        for section, values in now.items()
        for line in differences(run.get(section, {}), values)
    ]


def restored(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How to set again what has changed, in words of the shell.

    Example:
      >>> before = {"jax_enable_x64": True, "XLA_FLAGS": ""}
      >>> restored(before, {"jax_enable_x64": False, "XLA_FLAGS": "--a"})
      'JAX_ENABLE_X64=1, XLA_FLAGS left out'
    """
    words = []
    for name, value in before.items():
        if name not in now or now[name] == value:
            continue
        if value is None or value == "":
            words.append(f"{_variable(name)} left out")
        else:
            text = str(int(value)) if isinstance(value, bool) else str(value)
            words.append(f"{_variable(name)}={shlex.quote(text)}")
    return ", ".join(words)


def _variable(name: str) -> str:
    """The environment variable from which JAX takes a setting; another name as it is."""
    return name.upper() if name.startswith("jax_") else name


def _plain(value: Any) -> Any:
    """As JSON and YAML can hold it, and the environment: a member of an enumeration by its name."""
    if isinstance(value, Enum):
        return value.name.lower()
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _flags(text: str) -> str:
    """The flags that matter, sorted; the last of several for one name, which is the one in force.

    Example:
      >>> _flags("--b=1 --xla_dump_to=/tmp --a --b=2")
      '--a --b=2'
    """
    flags: dict[str, str] = {}
    for flag in text.split():
        if not flag.startswith(FREE_FLAGS):
            flags[flag.partition("=")[0]] = flag
    return " ".join(sorted(flags.values()))
