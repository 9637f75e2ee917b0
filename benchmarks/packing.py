"""How much of what a step computes is padding: rows as a run takes them, in one length, in buckets, and packed.

    python benchmarks/packing.py MODEL ROWS [--max_length 1024] [--rows_per_step 16]

MODEL is a folder with a tokenizer, ROWS a file of rows. Prints a line for each way: steps of an epoch by length, the
share of padding, and the time that planning and making a step's batch take.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from transformers import AutoTokenizer

import lora_jax as lj

WAYS = {"one length": ("none", 1), "2 buckets": ("none", 2), "4 buckets": ("none", 4), "8 buckets": ("none", 8),
        "bfd": ("bfd", 1), "wrapped": ("wrapped", 1)}  # fmt: skip
EPOCHS = 3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("rows")
    parser.add_argument("--max_length", type=int, default=1024)
    parser.add_argument("--rows_per_step", type=int, default=16)
    parser.add_argument("--multiple", type=int, default=64)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    rows = lj.tokenize(options.rows, tokenizer, lj.DataConfig(max_length=options.max_length))
    print(rows.summary())
    lj.make_mesh()  # starts JAX
    for name, (packing, most) in WAYS.items():
        data = lj.DataConfig(
            max_length=options.max_length,
            packing=packing,
            length_buckets=most,
            pad_to_multiple_of=options.multiple,
        )
        started = time.perf_counter()
        batches = lj.batches(rows, tokenizer, data, batch_size=options.rows_per_step, epochs=EPOCHS)
        planned, steps = time.perf_counter() - started, range(min(20, batches.steps_per_epoch))
        plan = batches.plan
        started = time.perf_counter()
        for step in steps:
            batches[step]
        made = (time.perf_counter() - started) / len(steps)
        computed = sum(
            length * count * options.rows_per_step for length, count in plan.steps_by_length.items()
        )
        print(
            f"{name:<11} {plan.summary()}; {computed:,} tokens an epoch; planned in {1e3 * planned:.0f} ms, "
            f"a batch made in {1e3 * made:.2f} ms"
        )


if __name__ == "__main__":
    main()
