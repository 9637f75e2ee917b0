"""Training steps of PEFT and of lora_jax on the same rows, each library in processes of its own.

What the benchmarks of training share: r 16 on all linear layers, AdamW, batch 2 x 256 full tokens, on this machine's
CPU. Contenders run in turn, so that peak memory is each one's own and a busy moment of the machine hits all alike.
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
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

BATCH, LENGTH, RANK, ALPHA = 2, 256, 16, 32
CHECKPOINTING = bool(os.environ.get("CHECKPOINTING"))

Contender = Callable[[str, int, float], list[float]]
"""(folder of the model, steps, share of positions with a label) -> seconds of each step."""


def batch(vocab: int, trained: float) -> tuple[np.ndarray, np.ndarray]:
    """Return tokens and whether each is trained, both [batch, length]; the end of a row is its completion."""
    tokens = np.random.default_rng(0).integers(0, vocab, (BATCH, LENGTH))
    return tokens, np.broadcast_to(np.arange(LENGTH) >= LENGTH * (1 - trained), tokens.shape)


def peft_steps(model: str, steps: int, trained: float, dtype: str, **loading: Any) -> list[float]:
    """Return the seconds of steps as a user of PEFT takes them; `loading` goes to from_pretrained."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype), **loading)
    if "quantization_config" in loading:
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=CHECKPOINTING)
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


def our_steps(
    model: str, steps: int, trained: float, dtype: str, compute_dtype: str = "float32", **options: Any
) -> list[float]:
    """Return the seconds of our steps; `options` are those of the base model."""
    import jax

    import lora_jax as lj

    base = lj.load(model, dtype=dtype, compute_dtype=compute_dtype, **options)
    base = base.replace(module=base.module.clone(gradient_checkpointing=CHECKPOINTING))
    adapter = base.add_adapter(
        lj.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0), key=jax.random.key(0)
    )
    optimizer = lj.make_optimizer(lj.TrainingArguments(lr_scheduler_type="constant"), steps)
    step, state = lj.make_train_step(base, adapter, optimizer), lj.init_state(base, adapter, optimizer)
    del adapter  # the state has a copy of what is trained
    tokens, chosen = batch(base.config.vocab_size, trained)
    inputs = lj.make_batch(tokens, labels=np.where(chosen, tokens, -100))
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = step(state, inputs)
        loss = float(metrics.loss)
        seconds.append(time.perf_counter() - start)
        print(f"  loss {loss:.4f}", file=sys.stderr)
    return seconds


def compare(
    script: str, description: str, contenders: Mapping[str, Contender]
) -> dict[str, dict[str, float]]:
    """Run the contenders in turn as the command line says; print each run and the medians, and return these.

    In a process that is to run one of them alone, print its figures as JSON and end the process.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a checkpoint")
    parser.add_argument("--rounds", type=int, default=3, help="times that each contender is run")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a run, after one that warms up")
    parser.add_argument("--trained", type=float, default=1.0, help="share of positions with a label")
    parser.add_argument("--only", choices=contenders, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        seconds = contenders[options.only](options.model, options.steps + 1, options.trained)[1:]
        used = resource.getrusage(resource.RUSAGE_SELF)
        figures = {"step_seconds": statistics.median(seconds), "peak_bytes": used.ru_maxrss * 1024}
        print(json.dumps(figures))
        sys.exit()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    command = [sys.executable, script, "--model", options.model, "--steps", str(options.steps)]
    command += ["--trained", str(options.trained)]
    for number in range(options.rounds):
        for name, rounds in results.items():
            done = subprocess.run([*command, "--only", name], stdout=subprocess.PIPE, check=True, text=True)
            rounds.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1} {name}: {_shown(rounds[-1])}", flush=True)
    middle = {
        name: {key: statistics.median(entry[key] for entry in rounds) for key in rounds[0]}
        for name, rounds in results.items()
    }
    for name, figures in middle.items():
        print(f"median {name}: {_shown(figures)}")
    return middle


def ratio(medians: Mapping[str, Mapping[str, float]], ours: str, other: str) -> str:
    """Return a line on one contender beside another."""
    faster = medians[other]["step_seconds"] / medians[ours]["step_seconds"]
    smaller = medians[ours]["peak_bytes"] / medians[other]["peak_bytes"]
    return f"{ours} is {faster:.2f}x the tokens/s of {other} at {smaller:.2f}x its memory"


def _shown(figures: Mapping[str, float]) -> str:
    seconds = figures["step_seconds"]
    return f"{seconds:.2f} s a step, {BATCH * LENGTH / seconds:.1f} tokens/s, {figures['peak_bytes'] / 2**30:.2f} GiB"
