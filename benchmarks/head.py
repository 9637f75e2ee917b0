"""What the head costs: memory by the size of the vocabulary, and time by the share of tokens that are trained.

    nice python benchmarks/head.py

A step of LoRA on all linear layers of a small model in float32, on this machine's CPU: 4 rows of 512 tokens, embed 256,
4 layers, gradient checkpointing, the head tied to the embedding. Memory is what the compiled step takes besides its
arguments and results; "all logits" is the same step with all positions' logits at once. Time is that of all cores
together, the least of some steps taken in turn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lj
from lora_jax.training import head_blocks, losses

ROWS, LENGTH = 4, 512
CONFIG = {
    "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip


def compiled_step(vocab: int) -> tuple[Any, tuple[Any, ...], int]:
    """Return a compiled step, its arguments, and the bytes that it takes besides them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(CONFIG | {"vocab_size": vocab}))
        model = lj.load(file, random_weights=True)
    model = model.replace(module=model.module.clone(gradient_checkpointing=True))
    with redirect_stdout(None):  # a line in the middle of the table
        adapter = model.add_adapter(lj.LoraConfig(lora_dropout=0.0))
    optimizer = lj.make_optimizer(lj.TrainingArguments(lr_scheduler_type="constant"), 100)
    step, state = lj.make_train_step(model, adapter, optimizer), lj.init_state(model, adapter, optimizer)
    compiled = step.lower(state, batch(vocab, 1.0)).compile()
    return compiled, (state, model.params, adapter.facts), compiled.memory_analysis().temp_size_in_bytes


def batch(vocab: int, trained: float) -> lj.Batch:
    """Return full rows whose last part is trained."""
    tokens = np.random.default_rng(0).integers(0, vocab, (1, ROWS, LENGTH)).astype(np.int32)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    weights = (places >= LENGTH * (1 - trained)).astype(np.float32)
    return lj.Batch(tokens, places, np.ones_like(tokens), np.roll(tokens, -1, -1), weights)


def memory(vocabs: list[int]) -> None:
    print(f"| vocabulary | table | step | all logits |\n|{'---|' * 4}")
    ours = losses.CHUNK, head_blocks.BLOCK
    for vocab in vocabs:
        used = compiled_step(vocab)[2]
        losses.CHUNK, head_blocks.BLOCK = ROWS * LENGTH, vocab
        whole = compiled_step(vocab)[2]
        losses.CHUNK, head_blocks.BLOCK = ours
        table = vocab * CONFIG["hidden_size"] * 4
        print(
            f"| {vocab:,} | {' | '.join(f'{size / 2**20:.0f} MiB' for size in (table, used, whole))} |",
            flush=True,
        )


def seconds(vocab: int, shares: list[float], steps: int) -> None:
    step, (state, *rest), _ = compiled_step(vocab)
    batches = [jax.tree.map(jnp.asarray, batch(vocab, share)) for share in shares]
    found: list[list[float]] = [[] for _ in shares]
    for number in range(steps + 1):
        for given, each in zip(batches, found, strict=True):
            start = time.process_time()
            state, metrics = step(state, *rest, given)
            jax.block_until_ready((state, metrics))
            if number:
                each.append(time.process_time() - start)
    print(f"\n| trained (vocabulary {vocab:,}) | CPU seconds a step | of all |\n|{'---|' * 3}")
    for share, each in zip(shares, found, strict=True):
        print(f"| {share:.0%} | {min(each):.2f} | {min(each) / min(found[0]):.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each share")
    options = parser.parse_args()
    memory([32768, 65536, 131072])
    for vocab in (32768, 131072):
        seconds(vocab, [1.0, 0.5, 0.1, 0.01], options.steps)


if __name__ == "__main__":
    main()
