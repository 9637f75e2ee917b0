"""Runs of the command line on a tiny model, and their outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from lora_jax.cli import main

ROWS = [{"prompt": f"{a}+{b}=", "completion": f"{a + b}."} for a in range(1, 6) for b in range(1, 5)]
TIMES = ("tokens_per_second", "step_seconds")


def write_rows(file: Path, rows: list[Any] = ROWS) -> Path:
    """Write rows as JSON Lines; return the file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def train_arguments(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    """Return the arguments of a short run: four steps of two micro-batches of two rows, two steps per epoch."""
    return [
        *("train", "--model.path", str(model), "--data.path", str(data), "--output_dir", str(output)),
        *("--data.split", "train[:8]", "--data.max_length", "16", "--lora.r", "2"),
        *("--train.per_device_train_batch_size", "2", "--train.gradient_accumulation_steps", "2"),
        *("--train.max_steps", "4", "--train.logging_steps", "1", "--train.learning_rate", "0.01"),
        *more,
    ]


def metrics(output: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def timeless(output: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in entry.items() if k not in TIMES} for entry in metrics(output)]


def without_progress(stderr: str) -> str:
    """Return what a program wrote to standard error, without progress messages."""
    return re.sub(r"^\[\d+:\d\d.*\n", "", stderr, flags=re.MULTILINE)


def tree(folder: Path) -> dict[str, bytes | None]:
    """Return every path below a folder, with the bytes of files."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def run(*arguments: str) -> None:
    """Run the command line; fail unless it succeeds."""
    assert main(arguments) == 0
