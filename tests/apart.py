"""Run Python code in a separate process with eight CPU devices."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import ROOT


def on_eight_devices(code: str, **environment: str) -> None:
    """Run the code from the root of the repository; fail with its output unless it succeeds."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu", **environment}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
