"""How many parameters are trained, counted as PEFT counts them: true ranks, and a tied table once."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lora_jax.adapters.targets import Plan
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import Module, name_table


def trainable_parameters(plan: Plan, config: ModelConfig) -> tuple[int, int]:
    """Return (trainable, all) parameters of an adapted model, the copies that modules_to_save adds included."""
    low_rank = sum(target.r * sum(target.module.sizes) for target in plan.targets)
    copies = _whole(plan.saved) + len(plan.token_indices) * config.hidden_size
    biases = sum(module.sizes[-1] for module in plan.biases)
    base = sum(math.prod(entry.shape) for entry in name_table(config))
    return low_rank + copies + biases, base + low_rank + copies


def trainable_line(trainable: int, total: int) -> str:
    """Return PEFT's line for the two counts."""
    return f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"


def _whole(saved: Iterable[Module]) -> int:
    return sum(math.prod(module.sizes) + (module.sizes[-1] if module.bias else 0) for module in saved)
