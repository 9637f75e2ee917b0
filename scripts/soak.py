"""Kill a training run (SIGKILL) at random moments and resume it, again and again.

python scripts/soak.py [--kills 25] [--seed 0] [--model DIR] [--data FILE]

In the end, metrics.jsonl (except times) and the adapter must equal those of an uninterrupted run. A kill happens while
the program starts, while it trains, or while it writes a checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMES = ("tokens_per_second", "step_seconds")
MOMENTS = ("start", "step", "save")
PARTIAL = "orbax-checkpoint-tmp"


def train(arguments: Sequence[str], *, resume: bool) -> subprocess.Popen[str]:
    """Start a run."""
    words = [sys.executable, str(ROOT / "train.py"), *arguments, *(["--resume"] if resume else [])]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)


def kill(
    arguments: Sequence[str], output: Path, moment: str, dice: random.Random, start_seconds: float
) -> str:
    """Start or resume a run, kill it at a random moment, and return when that was."""
    begun, goal = time.monotonic(), max(saved(output), default=0) + dice.randint(1, 20)
    older = half_written(output)
    process = train(arguments, resume=True)
    if moment == "start":
        wait(lambda: False, process, dice.uniform(0, start_seconds))
    elif moment == "step":
        wait(lambda: logged(output) >= goal, process)
        time.sleep(dice.uniform(0, 0.05))
    elif moment == "save":
        wait(lambda: max(saved(output), default=0) >= goal - 10 and half_written(output) - older, process)
        time.sleep(dice.uniform(0, 0.02))
    else:
        wait(lambda: any(output.glob(".adapter.*")), process)
    partial = half_written(output) - older
    process.kill()
    text, _ = process.communicate()
    if process.returncode not in (-9, 0):
        raise SystemExit(f"the run failed with {process.returncode}:\n{text}")
    how = "had finished" if process.returncode == 0 else f"killed ({moment})"
    during = ", a checkpoint half written" if partial else ""
    return f"{how} after {time.monotonic() - begun:.2f} s at step {logged(output)}{during}; saved: {saved(output)}"


def wait(until: Callable[[], object], process: subprocess.Popen[str], seconds: float = 600) -> None:
    """Wait until a condition holds or the run ends, but at most `seconds`."""
    end = time.monotonic() + seconds
    while not until() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)


def logged(output: Path) -> int:
    """Return the last step in metrics.jsonl."""
    lines = (output / "metrics.jsonl").read_text().splitlines() if (output / "metrics.jsonl").exists() else []
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except json.JSONDecodeError:
            continue
    return 0


def half_written(output: Path) -> set[int]:
    """Return the inodes of partial checkpoints."""
    folder = output / "checkpoints"
    return (
        {entry.inode() for entry in os.scandir(folder) if PARTIAL in entry.name} if folder.exists() else set()
    )


def saved(output: Path) -> list[int]:
    """Return the steps of the checkpoints."""
    return sorted(int(path.name) for path in (output / "checkpoints").glob("*") if path.name.isdecimal())


def results(output: Path) -> tuple[list[dict[str, object]], dict[str, bytes]]:
    """Return the lines of metrics.jsonl without times, and the adapter's files."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    timeless = [{name: value for name, value in line.items() if name not in TIMES} for line in lines]
    return timeless, {path.name: path.read_bytes() for path in (output / "adapter").iterdir()}


def finish(arguments: Sequence[str], *, resume: bool) -> None:
    """Run to the end."""
    process = train(arguments, resume=resume)
    text, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed with {process.returncode}:\n{text}")


def soak(
    arguments: Sequence[str], output: Path, kills: int, seed: int, start_seconds: float
) -> Iterator[str]:
    """Kill a run `kills` times, the last time while it exports, then let it finish; yield what was done."""
    dice = random.Random(seed)
    moments = [*(dice.choice(MOMENTS) for _ in range(kills - 1)), "export"]
    for number, moment in enumerate(moments, 1):
        yield f"{number}: {kill(arguments, output, moment, dice, start_seconds)}"
    finish(arguments, resume=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=ROOT / "examples" / "fennel-2m")
    parser.add_argument("--data", type=Path, default=ROOT / "examples" / "captain.train.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lora_jax-soak-") as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        steps = 12 * options.kills
        common = [
            *("--model.path", str(options.model), "--data.path", str(options.data)),
            *("--data.eval_fraction", "0.05", "--data.max_length", "72", "--lora.r", "4"),
            *("--train.per_device_train_batch_size", "4", "--train.gradient_accumulation_steps", "2"),
            *("--train.max_steps", str(steps), "--train.logging_steps", "3"),
            *("--train.save_steps", "4", "--train.eval_steps", "20"),
        ]
        begun = time.monotonic()
        finish([*common, "--output_dir", str(alone)], resume=False)
        seconds = time.monotonic() - begun
        print(f"left alone: {steps} steps in {seconds:.1f} s", flush=True)
        arguments = [*common, "--output_dir", str(killed)]
        for said in soak(arguments, killed, options.kills, options.seed, min(20.0, seconds)):
            print(said, flush=True)
        (lines, files), (lines_alone, files_alone) = results(killed), results(alone)
        left = sorted(path.name for path in killed.iterdir())
    if lines != lines_alone or files != files_alone:
        raise SystemExit("FAILED: the resumed run's results differ from those of the run left alone")
    print(
        f"{options.kills} kills: {len(lines)} lines of metrics and {len(files)} files of the adapter are equal"
    )
    print(f"left in the folder: {', '.join(left)}")


if __name__ == "__main__":
    main()
