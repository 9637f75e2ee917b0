"""Seconds from the start of a process to the end of its first training step, by stage, beside PEFT's.

    python benchmarks/time_to_first_step.py --model DIR [--rounds 3] [--only warm PEFT]

r 16 on all linear layers, float32, AdamW, a batch of 2 rows of 192 tokens, on this machine's CPU. "cold" starts with
empty caches of compiled programs and of tokens, "warm" with those that it left. PEFT's loop is plain transformers and
peft. Each start is a process of its own. Needs the parity extra (torch, transformers, peft).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BATCH, LENGTH, RANK, ALPHA = 2, 192, 16, 32
WORDS = "the tide is high and the wind is fair "

OURS = """
import sys, time
stages = {"importing": time.time()}
def seen(name, detail):
    key = "second step" if detail.startswith("step 2/") else name
    stages.setdefault(key, time.time())
from lora_jax import progress
from lora_jax.cli import run
with progress.shown_by(seen):
    try:
        run(sys.argv[1:])
    except SystemExit as done:
        assert not done.code
import json
print("STAGES", json.dumps(stages))
"""
PEFT = """
import json, sys, time
stages = {"importing": time.time()}
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
model, data, rows, length, rank, alpha = sys.argv[1:]
stages["loading the model"] = time.time()
base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
config = LoraConfig(r=int(rank), lora_alpha=int(alpha), target_modules="all-linear", task_type="CAUSAL_LM")
adapted = get_peft_model(base, config).train()
optimizer = torch.optim.AdamW((p for p in adapted.parameters() if p.requires_grad), lr=2e-4)
stages["tokenizing"] = time.time()
tokenizer = AutoTokenizer.from_pretrained(model)
texts = [json.loads(line)["text"] for line in open(data)]
batch = tokenizer(texts[: int(rows)], truncation=True, max_length=int(length), return_tensors="pt")
stages["training"] = time.time()
adapted(**batch, labels=batch["input_ids"]).loss.backward()
torch.nn.utils.clip_grad_norm_(adapted.parameters(), 0.3)
optimizer.step()
stages["second step"] = time.time()
print("STAGES", json.dumps(stages))
"""


def started(
    program: str, arguments: list[str], environment: dict[str, str]
) -> tuple[float, dict[str, float]]:
    """Return the seconds to the end of the first step, and those of each stage on the way."""
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith("STAGES "))
    stages: dict[str, float] = json.loads(line.removeprefix("STAGES "))
    moments = sorted((when, name) for name, when in stages.items() if when <= stages["second step"])
    ends = [when for when, _ in moments[1:]]
    spent = {name: end - when for (when, name), end in zip(moments, ends, strict=False)}
    return stages["second step"] - start, spent


def ours(model: str, data: Path, work: Path) -> tuple[float, dict[str, float]]:
    output = work / "out"
    shutil.rmtree(output, ignore_errors=True)
    environment = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(work / "compiled"),
        "LORA_JAX_CACHE": str(work / "tokens"),
    }
    options = {
        "--model.path": model, "--model.dtype": "float32", "--data.path": str(data), "--output_dir": str(output),
        "--data.max_length": LENGTH, "--lora.r": RANK, "--lora.lora_alpha": ALPHA, "--train.max_steps": 2,
        "--train.per_device_train_batch_size": BATCH, "--train.gradient_accumulation_steps": 1,
        "--train.gradient_checkpointing": False, "--train.save_strategy": "no", "--lora.lora_dropout": 0,
    }  # fmt: skip
    return started(OURS, ["train", *(str(word) for pair in options.items() for word in pair)], environment)


def peft(model: str, data: Path) -> tuple[float, dict[str, float]]:
    sizes = [str(size) for size in (BATCH, LENGTH, RANK, ALPHA)]
    return started(PEFT, [model, str(data), *sizes], {"HF_HUB_OFFLINE": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=["cold", "warm", "PEFT"])
    parser.add_argument("--work", help="folder whose caches are kept for another call")
    given = parser.parse_args()
    work = Path(given.work or tempfile.mkdtemp())
    work.mkdir(exist_ok=True)
    data = work / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": f"{row} {WORDS * 40}"}) + "\n" for row in range(2 * BATCH)))
    found: dict[str, list[float]] = {}
    for _ in range(given.rounds):
        for kind in given.only:
            if kind == "cold":
                for name in ("compiled", "tokens"):
                    shutil.rmtree(work / name, ignore_errors=True)
            seconds, stages = peft(given.model, data) if kind == "PEFT" else ours(given.model, data, work)
            found.setdefault(kind, []).append(seconds)
            shown = ", ".join(f"{name} {spent:.1f}" for name, spent in stages.items() if spent >= 0.05)
            print(f"{kind:<5} {seconds:6.1f} s: {shown}", flush=True)
    for kind, values in found.items():
        ratio = statistics.median(values) / statistics.median(found.get("PEFT", values))
        print(f"{kind:<5} {statistics.median(values):6.1f} s in the median, {ratio:.2f}x", flush=True)
    if not given.work:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
