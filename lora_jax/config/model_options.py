"""Options of the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lora_jax.config.checks import require
from lora_jax.config.unset import unset
from lora_jax.errors import Option, switch

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
FOUR_BIT = "bnb_4bit_"
"""Prefix of options that only apply to 4-bit models."""
QUANTIZING = (
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
    "llm_int8_skip_modules",
)
"""Options that say how the base model is quantized."""


@dataclass(frozen=True)
class ModelOptions:
    """The base model."""

    path: str = ""
    """Folder of a Hugging Face checkpoint, or its Hub id."""
    revision: str | None = None
    """Branch, tag or commit of a Hub id."""
    dtype: Dtype = "auto"
    """Dtype in which base weights are stored; auto keeps the checkpoint's."""
    compute_dtype: Dtype = "auto"
    """Dtype of matrix products; auto is float32 on a CPU or if dtype is float32, else bfloat16."""
    resize_vocab: bool = False
    """Add embedding rows for tokens that the tokenizer has beyond the checkpoint's vocabulary."""
    load_in_4bit: bool | None = unset(False)
    """Quantize linear layers to 4 bits (QLoRA); not needed for a checkpoint that is already quantized."""
    load_in_8bit: bool | None = unset(False)
    """Quantize linear layers to 8 bits, with one scale per output."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = unset("nf4")
    """4-bit data type: nf4 (4-bit NormalFloat) or fp4."""
    bnb_4bit_use_double_quant: bool | None = unset(True)
    """Quantize the scales of 4-bit blocks to 8 bits: 4.13 bits per weight instead of 4.5."""
    bnb_4bit_compute_dtype: Dtype | None = unset("auto")
    """transformers' name for compute_dtype of a 4-bit model."""
    llm_int8_skip_modules: tuple[str, ...] | None = unset(())
    """Modules not to quantize, in 4 bits too; the embedding, lm_head and norms never are."""


def check_model(model: ModelOptions) -> None:
    """Raise UserError for model options that contradict each other."""
    require(
        not (model.load_in_4bit and model.load_in_8bit),
        switch("model.load_in_8bit"),
        f"cannot be combined with {Option('model.load_in_4bit')}; drop one of the two",
    )
    dtypes = (model.compute_dtype, model.bnb_4bit_compute_dtype or "auto")
    require(
        "auto" in dtypes or dtypes[0] == dtypes[1],
        Option("model.bnb_4bit_compute_dtype", model.bnb_4bit_compute_dtype),
        f"contradicts {Option('model.compute_dtype', model.compute_dtype)}; give one of the two",
    )
