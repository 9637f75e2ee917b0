"""Run `lora-jax plan` for the measured steps: the peak, compiled for a GPU that need not be present."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.gpu_sections.shared import DRY, WORKLOADS, case, finish, options, write_model

ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
"""The planner uses no GPU."""


def topology() -> str:
    """Return the target to plan for: the GPU's generation, or this machine in a dry run."""
    if DRY:
        return "cpu"
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    capability = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    return "h100" if float(capability) >= 9 else "a100"


def main() -> None:
    target, folder = topology(), Path(tempfile.mkdtemp())

    def one(model: str, method: str) -> None:
        with case(model=model, method=method, topology=target) as row:
            flags = options(write_model(model, folder), WORKLOADS[model], method == "QLoRA")
            command = [sys.executable, "-m", "lora_jax", "plan", *flags, "--topology", target, "--json"]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **ENVIRONMENT})
            if done.returncode not in (0, 3):  # 3 means that it does not fit
                raise RuntimeError(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            row |= {
                "peak_bytes": found["peak_hbm_bytes"],
                "fits": found["fits"],
                "flops": found["flops_per_step"],
            }

    with ThreadPoolExecutor(2 if DRY else 6) as pool:
        list(pool.map(one, *zip(*[(m, t) for m in WORKLOADS for t in ("LoRA", "QLoRA")], strict=True)))
    finish()


if __name__ == "__main__":
    main()
