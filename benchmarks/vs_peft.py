"""One LoRA training step beside PEFT's: tokens/s and peak memory of each, medians and ratios.

    python benchmarks/vs_peft.py --model DIR [--rounds 3] [--steps 3] [--trained 1.0]

r 16 on all linear layers, float32, AdamW, batch 2 x 256 full tokens, on this machine's CPU. The two libraries
run in turn, each in a process of its own, so that peak memory is each one's own. `--trained` is the share of
positions with a label: 1.0 trains on every token, 0.5 is a prompt and a completion of equal length.
Needs the parity extra (torch, transformers, peft).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

BATCH, LENGTH, RANK, ALPHA = 2, 256, 16, 32


def batch(vocab: int, trained: float) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and whether each is trained, both [batch, length]; the end of a row is its completion."""
    tokens = np.random.default_rng(0).integers(0, vocab, (BATCH, LENGTH))
    return tokens, np.broadcast_to(np.arange(LENGTH) >= LENGTH * (1 - trained), tokens.shape)


def run_peft(model: str, steps: int, trained: float) -> list[float]:
    """Return the losses and seconds of steps as a user of PEFT takes them."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW(
        (p for p in adapted.parameters() if p.requires_grad), lr=2e-4, weight_decay=0
    )
    tokens, chosen = batch(base.config.vocab_size, trained)
    ids = torch.from_numpy(tokens)
    labels = torch.where(torch.from_numpy(chosen.copy()), ids, -100)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        loss = adapted(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(adapted.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        print(f"  loss {loss.item():.4f}", file=sys.stderr)
    return seconds


def run_ours(model: str, steps: int, trained: float) -> list[float]:
    """Return the seconds of our steps."""
    import jax

    from lora_jax.adapters.init import init_adapter
    from lora_jax.adapters.peft import adapter_config
    from lora_jax.adapters.targets import make_plan
    from lora_jax.config import LoraOptions, TrainOptions
    from lora_jax.data.batches import Batch
    from lora_jax.hub.checkpoint import Checkpoint
    from lora_jax.models.decoder import Decoder
    from lora_jax.models.families import read_config
    from lora_jax.models.load import load_params
    from lora_jax.models.names import modules
    from lora_jax.train.optim import make_optimizer
    from lora_jax.train.step import init_state, make_train_step

    checkpoint = Checkpoint.open(Path(model))
    config = read_config(checkpoint.config, model)
    plan = make_plan(adapter_config(LoraOptions(r=RANK, lora_alpha=ALPHA), model, None), modules(config))
    frozen = load_params(checkpoint, config, "float32")
    key = jax.random.key(0)
    trainable, adapter = init_adapter(key, plan, frozen, config.num_hidden_layers, "true")
    optimizer = make_optimizer(TrainOptions(lr_scheduler_type="constant"), steps)
    step = make_train_step(Decoder(config, gradient_checkpointing=CHECKPOINTING), optimizer)
    state = init_state(trainable, optimizer, key)
    tokens, chosen = batch(config.vocab_size, trained)
    weights = np.zeros(tokens.shape, np.float32)
    weights[:, :-1] = chosen[:, 1:]
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    whole = Batch(
        tokens.astype(np.int32),
        positions,
        np.ones_like(positions),
        np.roll(tokens, -1, 1).astype(np.int32),
        weights,
    )
    inputs = Batch(*(np.ascontiguousarray(array)[None] for array in whole))
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = step(state, frozen, adapter, inputs)
        loss = float(metrics.loss)
        seconds.append(time.perf_counter() - start)
        print(f"  loss {loss:.4f}", file=sys.stderr)
    return seconds


CHECKPOINTING = bool(os.environ.get("CHECKPOINTING"))


def measure(library: str, model: str, steps: int, trained: float) -> dict[str, float]:
    """Run one library in a process of its own; return its median step and peak memory."""
    command = [sys.executable, __file__, "--model", model, "--steps", str(steps), "--trained", str(trained)]
    done = subprocess.run([*command, "--only", library], stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print a line a round, then the medians and the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="times that each library is run")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a run, after one that warms up")
    parser.add_argument("--trained", type=float, default=1.0, help="share of positions with a label")
    parser.add_argument("--only", choices=("peft", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        run = {"peft": run_peft, "ours": run_ours}[options.only]
        seconds = run(options.model, options.steps + 1, options.trained)[1:]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        cpu = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        print(
            json.dumps({"step_seconds": statistics.median(seconds), "peak_bytes": peak, "cpu_seconds": cpu})
        )
        return
    results: dict[str, list[dict[str, float]]] = {"peft": [], "ours": []}
    for number in range(options.rounds):
        for library, rounds in results.items():
            rounds.append(measure(library, options.model, options.steps, options.trained))
            figures = rounds[-1]
            print(
                f"round {number + 1} {library}: {figures['step_seconds']:.2f} s a step, "
                f"{BATCH * LENGTH / figures['step_seconds']:.1f} tokens/s, {figures['peak_bytes'] / 2**30:.2f} GiB"
            )
    middle = {
        name: {key: statistics.median(entry[key] for entry in rounds) for key in rounds[0]}
        for name, rounds in results.items()
    }
    for name, figures in middle.items():
        rate = BATCH * LENGTH / figures["step_seconds"]
        print(f"median {name}: {rate:.1f} tokens/s, peak {figures['peak_bytes'] / 2**30:.2f} GiB")
    faster = middle["peft"]["step_seconds"] / middle["ours"]["step_seconds"]
    smaller = middle["ours"]["peak_bytes"] / middle["peft"]["peak_bytes"]
    print(f"ours is {faster:.2f}x PEFT's tokens/s at {smaller:.2f}x its memory")


if __name__ == "__main__":
    main()
