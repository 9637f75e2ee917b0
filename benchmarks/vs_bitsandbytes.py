"""One QLoRA training step beside PEFT's with bitsandbytes, and beside our own float32 LoRA.

    python benchmarks/vs_bitsandbytes.py --model DIR [--rounds 3] [--steps 3] [--trained 1.0]

NF4 with double quantization, r 16 on all linear layers, AdamW, batch 2 x 256 full tokens, on this machine's CPU.
The contenders run in turn, each in a process of its own. Which compute dtype is the better one depends on the CPU
(AVX512-BF16 multiplies bfloat16 at twice the rate), so both libraries run in both, and the best of each is
compared. Needs the parity extra.
"""

from __future__ import annotations

from functools import partial

from training import compare, our_steps, peft_steps, ratio

PEFT, OURS, LORA = "PEFT + bitsandbytes", "lora_jax QLoRA", "lora_jax LoRA"
DTYPES = ("bfloat16", "float32")


def bitsandbytes_steps(model: str, steps: int, trained: float, dtype: str) -> list[float]:
    """Return the seconds of PEFT's steps on a base that bitsandbytes quantized."""
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
    contenders = {f"{PEFT}, {dtype}": partial(bitsandbytes_steps, dtype=dtype) for dtype in DTYPES}
    for dtype in DTYPES:
        steps = partial(our_steps, dtype=dtype, compute_dtype=dtype, load_in_4bit=True)
        contenders[f"{OURS}, {dtype}"] = steps
    lora = f"{LORA}, float32"
    contenders[lora] = partial(our_steps, dtype="float32")
    medians = compare(__file__, __doc__, contenders)

    def best(library: str) -> str:
        return min(
            (name for name in medians if name.startswith(library)),
            key=lambda name: medians[name]["step_seconds"],
        )

    print(ratio(medians, best(OURS), best(PEFT)))
    print(ratio(medians, best(OURS), lora))
    print(ratio(medians, f"{OURS}, float32", lora))
