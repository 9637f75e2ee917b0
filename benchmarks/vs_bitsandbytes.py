"""One QLoRA training step beside PEFT's with bitsandbytes, and beside our own float32 LoRA.

    python benchmarks/vs_bitsandbytes.py --model DIR [--rounds 3] [--steps 3] [--trained 1.0]

NF4 with double quantisation, r 16 on all linear layers, AdamW, batch 2 x 256 full tokens, on this machine's CPU.
The contenders run in turn, each in a process of its own. Both libraries compute in float32, the faster dtype of
each on a CPU without bfloat16 products; --also-bfloat16 shows it. Needs the parity extra.
"""

from __future__ import annotations

import sys
from functools import partial

from training import compare, our_steps, peft_steps, ratio

PEFT, OURS, LORA = "PEFT + bitsandbytes", "lora_jax QLoRA", "lora_jax LoRA"


def bitsandbytes_steps(model: str, steps: int, trained: float, dtype: str) -> list[float]:
    """Return the seconds of PEFT's steps on a base that bitsandbytes quantised."""
    import torch
    from transformers import BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )
    return peft_steps(model, steps, trained, dtype, quantization_config=quantization, device_map="cpu")


if __name__ == "__main__":
    contenders = {
        PEFT: partial(bitsandbytes_steps, dtype="float32"),
        OURS: partial(our_steps, dtype="float32", load_in_4bit=True),
        LORA: partial(our_steps, dtype="float32"),
    }
    if "--also-bfloat16" in sys.argv:
        sys.argv.remove("--also-bfloat16")
        contenders[f"{OURS}, bfloat16"] = partial(
            our_steps, dtype="bfloat16", compute_dtype="bfloat16", load_in_4bit=True
        )
        contenders[f"{LORA}, bfloat16"] = partial(our_steps, dtype="bfloat16", compute_dtype="bfloat16")
        contenders[f"{PEFT}, bfloat16"] = partial(bitsandbytes_steps, dtype="bfloat16")
    medians = compare(__file__, __doc__, contenders)
    print(ratio(medians, OURS, PEFT))
    print(ratio(medians, OURS, LORA))
