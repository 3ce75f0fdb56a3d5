"""A kind of device that is not there is refused with one message, before anything is written."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import QUIET, SMALL

from training.runtime import numerics, processes
from training.runtime.errors import Refused

ROOT = Path(__file__).parent.parent


@pytest.mark.long
def test_a_mistyped_platform_is_one_message_and_its_remedy_works(tmp_path: Path) -> None:
    settings = [*SMALL["diabetes"], *QUIET, "steps=1", f"run_dir={tmp_path / 'run'}"]

    def trained(platform: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *settings],
            cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": platform}, capture_output=True, text=True,
        )  # fmt: skip

    done = trained("cup")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "JAX_PLATFORMS=cup asks for a device that JAX cannot use here" in done.stderr
    assert "Did you mean 'cpu'?" in done.stderr and "or give JAX_PLATFORMS=cpu" in done.stderr
    assert not (tmp_path / "run").exists()

    assert trained("cpu").returncode == 0


@pytest.mark.parametrize("error", [AssertionError(), RuntimeError("no such driver (set JAX_")])
def test_whatever_jax_raises_for_a_missing_device_is_refused(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def devices() -> Any:
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setattr(numerics, "setting", lambda name: "cuda")
    with pytest.raises(
        Refused, match=r"JAX_PLATFORMS=cuda asks for a device .*: (there is|no such)"
    ):
        processes._find_devices()
