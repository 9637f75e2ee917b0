"""Compare runs with and without offloading to host memory: equal losses, and a smaller peak on the device."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from scripts.gpu_sections.shared import DRY, ROW, WORKLOADS, Workload, case, finish, options, write_model

MODEL = "Qwen2.5-0.5B"
WORK = WORKLOADS[MODEL] if DRY else Workload(4, 1024, True)
METHODS = {
    "optimizer": ("--method", "full"),
    "activations": ("--train.learning_rate", "2e-4"),
}
"""What is offloaded, and the run that has most of it: a full fine-tune's optimizer state, or layer inputs."""
SMALLEST_GAIN = 0.9
LARGEST_DIFFERENCE = 1e-3
"""Maximum difference of a loss: transfers change no value, but another program may round differently."""


def steps(file: Path, what: str, *more: str) -> dict[str, Any]:
    """Return what `steps` reports for a run with these options."""
    command = [sys.executable, "-m", "scripts.gpu_sections.steps", "{}"]
    command += options(file, WORK, False, *METHODS[what], *more)
    done = subprocess.run(command, capture_output=True, text=True)
    rows = [json.loads(line.removeprefix(ROW)) for line in done.stdout.splitlines() if line.startswith(ROW)]
    if done.returncode or not rows:
        raise RuntimeError(rows[0].get("error", rows) if rows else done.stderr)
    return rows[0]


def main() -> None:
    file = write_model(MODEL, Path(tempfile.mkdtemp()))

    def one(what: str) -> None:
        with case(model=MODEL, offload=what) as row, ThreadPoolExecutor(2) as pool:
            pending = [pool.submit(steps, file, what, *more) for more in ((), ("--train.offload", what))]
            without, found = (future.result() for future in pending)
            pairs = zip(found["losses"], without["losses"], strict=True)
            row["loss_difference"] = max(abs(one / other - 1) for one, other in pairs)
            row |= {"peak_bytes": found["peak_bytes"], "peak_bytes_without": without["peak_bytes"]}
            row |= {"step_seconds": found["step_seconds"], "step_seconds_without": without["step_seconds"]}
            smaller = DRY or found["peak_bytes"] < SMALLEST_GAIN * without["peak_bytes"]
            row["ok"] = smaller and row["loss_difference"] < LARGEST_DIFFERENCE

    with ThreadPoolExecutor(1 if DRY else len(METHODS)) as pool:
        list(pool.map(one, METHODS))
    finish()


if __name__ == "__main__":
    main()
