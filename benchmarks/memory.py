"""The peak memory of a step on TPUs, from the TPU compiler, with no TPU at hand: the table of docs/memory.md.

    python benchmarks/memory.py [--row WORD ...] [--more]

Each row is what `lora-jax plan` says of r 16 on all linear layers, or of all parameters: AdamW, gradient
checkpointing, a row a device and one pass. --row takes those whose name or topology has a word in it, --more adds the
smaller models of the README. A program takes minutes, unless it is known from before. Exits with 1 where a row is over
its limit. Needs the test extra (libtpu).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from lora_jax.cache import keep_compiled
from lora_jax.plan.topologies import find_target, prepare_environment

prepare_environment()
keep_compiled()

from lora_jax.commands.plan import PlanOptions  # noqa: E402
from lora_jax.options import parse  # noqa: E402
from lora_jax.plan.estimate import estimate  # noqa: E402
from shapes import write_config  # noqa: E402

QLORA, LORA, FULL = "QLoRA, NF4", "LoRA, bf16", "full fine-tuning"
FLAGS = {QLORA: ("--model.load_in_4bit", "True"), LORA: (), FULL: ("--method", "full")}


class Row(NamedTuple):
    """A model, how it is trained, tokens a row, a topology, and the GiB that it may take a device (None: any)."""

    model: str
    method: str
    length: int
    topology: str
    limit: float | None = None


ROWS = (
    Row("Mistral-7B", QLORA, 1024, "v5e:1x1", 5.5),
    Row("Qwen2-7B", QLORA, 1024, "v5e:1x1", 6.5),
    Row("Llama-3-8B", QLORA, 2048, "v5e:1x1", 7.5),
    Row("Llama-2-13B", QLORA, 1024, "v5e:1x1", 9.5),
    Row("LLaMA-65B", QLORA, 512, "v5p:1x1x1", 38),
    Row("Llama-3-70B", QLORA, 2048, "v5e:2x4", 12),
    Row("Llama-3-8B", LORA, 4096, "v5e:2x4", 8),
    Row("Qwen2-7B", FULL, 1024, "v6e:2x4"),
)
MORE = (
    Row("Qwen2.5-0.5B", LORA, 1024, "v5e:1x1"),
    Row("Llama-3.2-1B", LORA, 1024, "v5e:1x1"),
    Row("Qwen2.5-3B", LORA, 1024, "v5e:1x1"),
    Row("Qwen2.5-0.5B", QLORA, 1024, "v5e:1x1"),
)


def cells(row: Row, folder: Path) -> tuple[list[str], bool]:
    """Return a row of the table, and whether it is within its limit."""
    options = parse(
        PlanOptions,
        [
            *("--model.path", str(write_config(row.model, folder / row.model)), "--topology", row.topology),
            *("--data.max_length", str(row.length), "--train.per_device_train_batch_size", "1"),
            *("--train.gradient_accumulation_steps", "1", *FLAGS[row.method]),
        ],
        program="memory.py",
    )
    found = estimate(options, find_target(row.topology))
    held, gib = found.held, 2**30
    needed = found.figures.peak / gib
    within = found.figures.fits and (row.limit is None or needed <= row.limit)
    parts = [held.frozen / gib, held.adapter / gib, held.optimizer / gib, found.activations / gib, needed]
    allowed = "-" if row.limit is None else f"{row.limit:g}"
    has = f"{found.figures.limit / gib:.2f}"
    name = [row.model, row.method, str(row.length), row.topology]
    return [*name, *(f"{part:.2f}" for part in parts), allowed, has], within


def main() -> int:
    """Print the table; return 1 where a row is over its limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--row", nargs="*", default=[""], metavar="WORD")
    parser.add_argument("--more", action="store_true")
    options = parser.parse_args()
    rows = [*ROWS, *(MORE if options.more else ())]
    print(
        "| model | trained | tokens a row | topology | base | adapter | optimizer | rest | peak | at most | has |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    within = []
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            if any(word in f"{row.model} {row.method} {row.length} {row.topology}" for word in options.row):
                texts, good = cells(row, Path(folder))
                within.append(good)
                print(f"| {' | '.join(texts)} |", flush=True)
    return int(not all(within))


if __name__ == "__main__":
    sys.exit(main())
