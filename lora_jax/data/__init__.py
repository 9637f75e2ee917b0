"""Rows -> examples -> tokens and what of them is trained -> batches."""

from lora_jax.data.batches import (
    Batch,
    epoch_order,
    eval_batches,
    make_batch,
    padded_length,
    step_batch,
    steps_per_epoch,
)
from lora_jax.data.dataset import TokenDataset, load_examples
from lora_jax.data.formats import alpaca_prompt
from lora_jax.data.mixture import hold_out, mixed
from lora_jax.data.rows import Rows, read_rows
from lora_jax.data.tokens import Tokens, tokenise

__all__ = [
    "Batch",
    "Rows",
    "TokenDataset",
    "Tokens",
    "alpaca_prompt",
    "epoch_order",
    "eval_batches",
    "hold_out",
    "load_examples",
    "make_batch",
    "mixed",
    "padded_length",
    "read_rows",
    "step_batch",
    "steps_per_epoch",
    "tokenise",
]
