"""Test the wheel in dist/ in an empty environment: the commands of `make demo`, the README's Python, and the example.

The environment and the outputs are in build/ and are removed first. Everything runs in build/, next to a copy of
examples/, where Python does not see the checkout's package.
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
STANDS_FOR = {
    "Qwen/Qwen2.5-0.5B-Instruct": "examples/fennel-2m",
    "rows.jsonl": "examples/captain.train.jsonl",
    "max_steps=100": "max_steps=5",
}
"""What the README's Python runs on here, for what it names."""


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
    shutil.copytree(ROOT / "examples", OUTPUT / "examples")
    check_commands(command)
    run(python, "-c", readme_python())
    run(python, "examples/train_loop.py")
    print(
        f"{wheel.name}: its commands, the README's Python and examples/train_loop.py run in a clean environment"
    )


def check_commands(command: str) -> None:
    """Train, merge, generate and write a report, as `make demo` does."""
    model, prompt = "examples/fennel-2m", "Tell me about Oscar."
    rows = {name: f"examples/captain.{name}.jsonl" for name in ("train", "eval")}
    run(
        *(command, "train", str(ROOT / "configs/quickstart.yaml"), "--model.path", model),
        *("--data.path", rows["train"], "--data.eval_path", rows["eval"], "--output_dir", "run"),
        *("--train.max_steps", str(STEPS)),
    )
    run(command, "merge", "--adapter", "run/adapter", "--output", "merged")
    for path in (model, "merged"):
        print(run(command, "generate", "--model.path", path, "--prompt", prompt), end="")
    run(command, "report", "run")


def readme_python() -> str:
    """Return the README's first block of Python, with what is at hand in place of what it names."""
    code = (ROOT / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    for named, here in STANDS_FOR.items():
        if code.count(named) != 1:
            raise SystemExit(f"README.md: {named} is not in its first block of Python; change STANDS_FOR")
        code = code.replace(named, here)
    return code.replace('"merged"', '"api-merged"')


def run(*command: str) -> str:
    """Run a command in the output folder and return what it prints; end the program if it fails."""
    outside = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=OUTPUT, env=outside, text=True, capture_output=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    main()
