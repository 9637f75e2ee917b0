"""Measure training steps of lora_jax on random weights: tokens/s, peak memory, and the compiler's numbers.

    python -m scripts.gpu_sections.steps NAMES MODEL

The step is the one that `lora-jax train` runs and `lora-jax plan` compiles with the options of `shared.options`. The
weights are made on the device from the model's config.json.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

import lora_jax as lj
from scripts.gpu_sections.shared import DRY, WORKLOADS, Workload, case, finish

WARM, TIMED = (1, 2) if DRY else (2, 8)


def measure(row: dict[str, Any], file: Path, four_bit: bool, work: Workload) -> None:
    """Run steps and add their figures to a row."""
    model = lj.load(file, load_in_4bit=four_bit, compute_dtype="bfloat16", random_weights=True)
    module = model.module.clone(packed=False, gradient_checkpointing=work.checkpointing)
    model = model.replace(module=module)
    adapter = model.add_adapter(lj.LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0))
    optimizer = lj.make_optimizer(lj.TrainingArguments(lr_scheduler_type="constant"), WARM + TIMED)
    step, state = lj.make_train_step(model, adapter, optimizer), lj.init_state(model, adapter, optimizer)
    facts = adapter.facts
    del adapter  # the state has a copy of what is trained
    tokens = np.random.default_rng(0).integers(0, model.config.vocab_size, (work.rows, work.length))
    batch = lj.Batch(*(array[None] for array in lj.make_batch(tokens)))  # one micro-batch
    begun = time.perf_counter()
    compiled = step.lower(state, batch).compile()
    row["compile_seconds"] = time.perf_counter() - begun
    row["program_bytes"] = program_bytes(compiled)
    seconds, losses = [], []
    for _ in range(WARM + TIMED):
        begun = time.perf_counter()
        state, metrics = compiled(state, model.params, facts, batch)
        losses.append(float(metrics.loss))
        seconds.append(time.perf_counter() - begun)
    row |= {"step_seconds": statistics.median(seconds[WARM:]), "losses": losses}
    row["tokens_per_second"] = tokens.size / row["step_seconds"]
    row["peak_bytes"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    row["ok"] = bool(np.isfinite(losses).all()) and losses[-1] < losses[0]


def program_bytes(compiled: Any) -> int:
    """Return the bytes that a compiled step needs: arguments, results that do not alias them, and temporaries."""
    memory = compiled.memory_analysis()
    results = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes + results + memory.temp_size_in_bytes


def main() -> None:
    names, file = json.loads(sys.argv[1]), Path(sys.argv[2])
    with case(library="lora_jax", **names) as row:
        measure(row, file, names["method"] == "QLoRA", WORKLOADS[names["model"]])
    finish()


if __name__ == "__main__":
    main()
