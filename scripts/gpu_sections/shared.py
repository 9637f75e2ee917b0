"""Shared code of gpu_check's sections: reporting, and the models and batches that are measured.

A section is a program. It prints one line of JSON per case as soon as the case is done. A case that fails is reported
with its traceback, and the next one runs.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, NoReturn

from benchmarks.shapes import MODELS, linear_layers

DRY = bool(os.environ.get("GPU_CHECK_DRY_RUN"))
"""Whether this is a dry run: on the CPU, with tiny shapes and interpreted kernels."""
ROOT = Path(__file__).resolve().parents[2]
ROW = "row "
"""Prefix of the lines on standard output that are rows."""

_failed = 0
_printing = Lock()


class Workload(NamedTuple):
    """What a step is measured on: full rows of random tokens."""

    rows: int
    length: int
    checkpointing: bool


WORKLOADS = {
    "Qwen2.5-0.5B": Workload(8, 1024, False),
    "Llama-3-8B": Workload(4, 1024, True),
    "Llama-3.2-1B": Workload(8, 1024, False),
}
"""In the order in which they run: if time runs out, the smallest and the largest model have been measured."""
if DRY:
    WORKLOADS = dict.fromkeys(WORKLOADS, Workload(2, 64, False))


@contextmanager
def case(**names: Any) -> Iterator[dict[str, Any]]:
    """Report a case: its names, what the body adds, its seconds, and the traceback if it raises.

    The body may add `ok`; without it, a case that does not raise has passed.
    """
    global _failed
    row: dict[str, Any] = dict(names)
    start = time.monotonic()
    try:
        yield row
    except Exception:
        row |= {"ok": False, "error": shortened(traceback.format_exc())}
    row.setdefault("ok", True)
    _failed += not row["ok"]
    report(row | {"seconds": round(time.monotonic() - start, 2)})


def shortened(text: str, lines: int = 40, width: int = 300) -> str:
    """Return the last lines of a text, each cut to a width, because a JAX error may contain a whole program."""
    return "\n".join(line[:width] for line in text.splitlines()[-lines:])


def report(row: dict[str, Any]) -> None:
    """Print a row for the program that runs this one."""
    with _printing:
        print(ROW + json.dumps(row), flush=True)


def finish() -> NoReturn:
    """End the section with exit code 1 if a case failed."""
    sys.exit(bool(_failed))


def model_config(name: str) -> dict[str, Any]:
    """Return the contents of a model's config.json; in a dry run, a tiny model of the same family."""
    config = dict(MODELS[name])
    if DRY:
        heads, kv_heads = 4, 2
        config |= {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 512}
        config |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
        config.pop("head_dim", None)
    return config


def write_model(name: str, folder: Path) -> Path:
    """Write a model's config.json into a separate folder; return the file."""
    file = folder / name / "config.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(model_config(name)))
    return file


def kernel_shapes() -> list[tuple[str, int, int]]:
    """Return (model, in, out) of each linear layer that the 4-bit kernels are checked on."""
    if DRY:
        return [("tiny", 192, 96)]  # the last group is half full, and no tile divides the outputs
    return [(model, *shape) for model in ("Llama-3-8B", "Qwen2.5-0.5B") for shape in linear_layers(model)]


def options(file: Path, work: Workload, four_bit: bool, *more: str) -> list[str]:
    """Return the options of `lora-jax train` and `plan` for a measured step."""
    return [
        *("--model.path", str(file), "--model.load_in_4bit", str(four_bit), "--model.compute_dtype", "bfloat16"),
        *("--lora.r", "16", "--lora.lora_alpha", "32", "--lora.lora_dropout", "0"),
        *("--data.path", "none", "--data.max_length", str(work.length), "--output_dir", "none"),
        *("--train.per_device_train_batch_size", str(work.rows), "--train.gradient_accumulation_steps", "1"),
        *("--train.gradient_checkpointing", str(work.checkpointing), "--train.lr_scheduler_type", "constant"),
        *more,
    ]  # fmt: skip
