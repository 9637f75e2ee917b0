"""How many parameters are trained, counted as PEFT counts them: true ranks, and a tied table once."""

from __future__ import annotations

import math

from lora_jax.methods.matching import Plan
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import name_table


def trainable_parameters(plan: Plan, config: ModelConfig) -> tuple[int, int]:
    """Return (trainable, all) parameters of an adapted model, the copies that modules_to_save adds included."""
    trained = sum(site.parameters for site in plan.sites)
    added = sum(math.prod(site.shape(leaf)) for site in plan.sites for leaf in site.leaves if leaf.added)
    base = sum(math.prod(entry.shape) for entry in name_table(config))
    return trained, base + added


def trainable_line(trainable: int, total: int) -> str:
    """Return PEFT's line for the two counts."""
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
