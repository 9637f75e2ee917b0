"""Measure training steps of PEFT, without and with bitsandbytes, on random weights: tokens/s and peak memory.

    python -m scripts.gpu_sections.peft_steps NAME MODEL

Steps are those of transformers' Trainer with bf16=True: scaled_dot_product_attention, autocast, AdamW, gradient
clipping.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoConfig, AutoModelForCausalLM

from scripts.gpu_sections.shared import DRY, WORKLOADS, Workload, case, finish

DEVICE = "cpu" if DRY else "cuda"
WARM, TIMED = (1, 2) if DRY else (2, 8)


def random_model(file: Path, four_bit: bool, work: Workload) -> Any:
    """Return an adapted model with random bfloat16 weights, made on the device."""
    config = AutoConfig.from_pretrained(file.parent)
    with torch.device(DEVICE):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    base.config.use_cache = False
    if four_bit:
        quantize(base)
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=work.checkpointing)
    elif work.checkpointing:
        base.gradient_checkpointing_enable()
        base.enable_input_require_grads()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(base, lora).train()


def quantize(base: Any) -> None:
    """Replace all linear layers except the head with bitsandbytes' 4-bit layers, one after the other."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    kinds = {name: type(module) for name, module in base.named_modules()}
    for name in (name for name, kind in kinds.items() if kind is torch.nn.Linear and name != "lm_head"):
        module = base.get_submodule(name)
        packed = Linear4bit(
            module.in_features,
            module.out_features,
            bias=module.bias is not None,
            compute_dtype=torch.bfloat16,
            quant_type="nf4",
            device="meta",
        )
        packed.weight = Params4bit(module.weight.data, requires_grad=False, quant_type="nf4").to(DEVICE)
        packed.bias = module.bias
        parent, _, last = name.rpartition(".")
        setattr(base.get_submodule(parent), last, packed)
    base.is_loaded_in_4bit = True


def measure(row: dict[str, Any], file: Path, four_bit: bool, work: Workload) -> None:
    """Run steps and add their measurements to a row."""
    model = random_model(file, four_bit, work)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0)
    shape = (work.rows, work.length)
    tokens = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(DEVICE)
    if not DRY:  # making the model does not count
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds, losses = [], []
    for _ in range(WARM + TIMED):
        begun = time.perf_counter()
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 0.3)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if not DRY:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    row |= {"step_seconds": statistics.median(seconds[WARM:]), "losses": losses}
    row["tokens_per_second"] = tokens.numel() / row["step_seconds"]
    row["peak_bytes"] = None if DRY else torch.cuda.max_memory_allocated()
    row["ok"] = bool(torch.tensor(losses).isfinite().all()) and losses[-1] < losses[0]


def main() -> None:
    names, file = json.loads(sys.argv[1]), Path(sys.argv[2])
    with case(library="PEFT", **names) as row:
        measure(row, file, names["method"] == "QLoRA", WORKLOADS[names["model"]])
    finish()


if __name__ == "__main__":
    main()
