"""Test the wheel in dist/ in an empty environment, with the commands of `make demo` on the shipped model.

The environment and the outputs are in build/ and are removed first. Commands run in build/, where Python does not see
the checkout's package.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT, OUTPUT = ROOT / "build/clean-environment", ROOT / "build/clean-demo"
STEPS = 20


def main() -> None:
    (wheel,) = ROOT.glob("dist/*.whl")
    for folder in (ENVIRONMENT, OUTPUT):
        shutil.rmtree(folder, ignore_errors=True)
    OUTPUT.mkdir(parents=True)
    run(sys.executable, "-m", "venv", str(ENVIRONMENT))
    python, command = str(ENVIRONMENT / "bin/python"), str(ENVIRONMENT / "bin/lora-jax")
    run(python, "-m", "pip", "install", "--quiet", str(wheel))
    where = Path(run(python, "-c", "import lora_jax; print(lora_jax.__file__)").strip())
    if not where.is_relative_to(ENVIRONMENT):
        raise SystemExit(f"{where}: not the wheel's package")
    print(run(command, "--version"), end="")
    model, prompt = ROOT / "examples/fennel-2m", "Tell me about Oscar."
    rows = {name: str(ROOT / f"examples/captain.{name}.jsonl") for name in ("train", "eval")}
    run(
        *(command, "train", str(ROOT / "configs/quickstart.yaml"), "--model.path", str(model)),
        *("--data.path", rows["train"], "--data.eval_path", rows["eval"], "--output_dir", "run"),
        *("--train.max_steps", str(STEPS)),
    )
    run(command, "merge", "--adapter", "run/adapter", "--output", "merged")
    for path in (str(model), "merged"):
        print(run(command, "generate", "--model.path", path, "--prompt", prompt), end="")
    run(command, "report", "run")
    print(f"{wheel.name}: trains, merges, generates and reports in an environment of its own")


def run(*command: str) -> str:
    """Run a command in the output folder and return what it prints; end the program if it fails."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=OUTPUT, env=outside, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
