"""Run `make demo` with the installed packages, and some steps of the 4-bit quickstart, on the device."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.gpu_sections.shared import DRY, ROOT, case, finish

LARGEST_LOSS = 0.35
"""Maximum loss in the demo's last evaluation; 0.285 on a CPU."""
FOUR_BIT_STEPS = 20 if DRY else 60


def environment_of(folder: Path) -> Path:
    """Write a virtual environment that `make` considers complete, with this Python."""
    python = shlex.quote(sys.executable)
    (folder / "bin").mkdir(parents=True)
    for name, command in {"python": python, "lora-jax": f"{python} -m lora_jax"}.items():
        file = folder / "bin" / name
        file.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        file.chmod(0o755)
    (folder / ".installed").touch()
    return folder


def run(*command: str) -> str:
    """Run a command in the repository and return its output."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def last(folder: Path, name: str) -> float:
    """Return the last value of a metric in a run."""
    return [line[name] for line in metrics(folder) if name in line][-1]


def main() -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    folder = Path(tempfile.mkdtemp())
    with case(run="make demo") as row:
        printed = run("make", "demo", f"VENV={environment_of(folder / 'environment')}")
        row["eval_loss"] = last(ROOT / "outputs/quickstart", "eval_loss")
        row["says"] = printed.rpartition("After:")[2].strip()
        row["ok"] = row["eval_loss"] < LARGEST_LOSS and bool(row["says"])
    with case(run="quickstart in 4 bits", steps=FOUR_BIT_STEPS) as row:
        given = ("--output_dir", str(folder / "run"), "--train.max_steps", str(FOUR_BIT_STEPS))
        run(sys.executable, "-m", "lora_jax", "train", "configs/quickstart_4bit.yaml", *given)
        losses = [line["loss"] for line in metrics(folder / "run") if "loss" in line]
        row |= {"first_loss": losses[0], "last_loss": losses[-1], "ok": losses[-1] < losses[0]}
    finish()


if __name__ == "__main__":
    main()
