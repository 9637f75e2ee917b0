"""Rows -> examples -> tokens with a mask of trained ones -> batches."""

from lora_jax.data.batches import (
    Batch,
    epoch_order,
    make_batch,
    padded_length,
)
from lora_jax.data.dataset import TokenDataset, load_examples
from lora_jax.data.formats import alpaca_prompt
from lora_jax.data.mixture import hold_out, mixed
from lora_jax.data.packing import pack, packs
from lora_jax.data.rows import Rows, read_rows
from lora_jax.data.steps import StepPlan, step_batch
from lora_jax.data.tokens import Tokens, tokenize

__all__ = [
    "Batch",
    "Rows",
    "StepPlan",
    "TokenDataset",
    "Tokens",
    "alpaca_prompt",
    "epoch_order",
    "hold_out",
    "load_examples",
    "make_batch",
    "mixed",
    "pack",
    "packs",
    "padded_length",
    "read_rows",
    "step_batch",
    "tokenize",
]
