"""One LoRA training step beside PEFT's: tokens/s and peak memory of each, medians and ratios.

    python benchmarks/vs_peft.py --model DIR [--rounds 3] [--steps 3] [--trained 1.0]

r 16 on all linear layers, float32, AdamW, batch 2 x 256 full tokens, on this machine's CPU. The two libraries
run in turn, each in a process of its own, so that peak memory is each one's own. `--trained` is the share of
positions with a label: 1.0 trains on every token, 0.5 is a prompt and a completion of equal length.
Needs the parity extra (torch, transformers, peft).
"""

from __future__ import annotations

from functools import partial

from training import compare, our_steps, peft_steps, ratio

if __name__ == "__main__":
    contenders = {
        "PEFT": partial(peft_steps, dtype="float32"),
        "lora_jax": partial(our_steps, dtype="float32"),
    }
    print(ratio(compare(__file__, __doc__, contenders), "lora_jax", "PEFT"))
