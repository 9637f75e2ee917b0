"""What the head costs: memory by the size of the vocabulary, and time by the share of tokens that are trained.

    nice python benchmarks/head.py

A step of LoRA on all linear layers of a small model in float32, on this machine's CPU: 4 rows of 512 tokens, embed 256,
4 layers, gradient checkpointing, the head tied to the embedding. Memory is what the compiled step takes besides its
arguments and results; "all logits" is the same step with all positions' logits at once. Time is that of all cores
together, the least of some steps taken in turn.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.adapters.init import init_adapter
from lora_jax.adapters.targets import make_plan
from lora_jax.config import TrainOptions
from lora_jax.data.batches import Batch
from lora_jax.hub.adapter_files import AdapterConfig
from lora_jax.models.decoder import Decoder
from lora_jax.models.families import read_config
from lora_jax.models.load import abstract_params
from lora_jax.models.names import modules
from lora_jax.training import head_blocks, losses
from lora_jax.training.optim import make_optimizer
from lora_jax.training.step import init_state, make_train_step

ROWS, LENGTH = 4, 512
CONFIG = {
    "model_type": "qwen2", "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LENGTH, "hidden_act": "silu",
    "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip


def compiled_step(vocab: int) -> tuple[Any, tuple[Any, ...], int]:
    """Return a compiled step, its arguments, and the bytes that it takes besides them."""
    config = read_config(CONFIG | {"vocab_size": vocab}, "here")
    plan = make_plan(AdapterConfig(r=16, lora_alpha=32, target_modules="all-linear"), modules(config))
    keys = iter(jax.random.split(jax.random.key(0), 100))
    frozen = jax.tree.map(
        lambda leaf: 0.02 * jax.random.normal(next(keys), leaf.shape, leaf.dtype), abstract_params(config)
    )
    trainable, adapter = init_adapter(next(keys), plan, frozen, config.num_hidden_layers, "true")
    optimizer = make_optimizer(TrainOptions(lr_scheduler_type="constant"), 100)
    state = init_state(trainable, optimizer, next(keys))
    step: Any = make_train_step(Decoder(config, gradient_checkpointing=True), optimizer)
    compiled = step.lower(state, frozen, adapter, batch(vocab, 1.0)).compile()
    return compiled, (state, frozen, adapter), compiled.memory_analysis().temp_size_in_bytes


def batch(vocab: int, trained: float) -> Batch:
    """Return full rows whose last part is trained."""
    tokens = np.random.default_rng(0).integers(0, vocab, (1, ROWS, LENGTH)).astype(np.int32)
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    weights = (places >= LENGTH * (1 - trained)).astype(np.float32)
    return Batch(tokens, places, np.ones_like(tokens), np.roll(tokens, -1, -1), weights)


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
