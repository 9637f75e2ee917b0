"""Floating-point operations of a step, from the shapes of its products: 2 · tokens · in · out each.

A base product runs forward, and backward for its input's gradient; a kernel that is trained has a product more. With
gradient checkpointing the backward pass runs a layer's products again, but for what only its output needs: the last
product, down_proj's. The low-rank term has two products forward and four backward. Attention's scores and values are
two products with all keys, which a causal kernel halves; backward they are four, and what is not kept of them is formed
again. The head runs forward and backward on trained tokens alone, all of them here. What is no product, a few per
cent in a model of this kind, is not counted.
"""

from __future__ import annotations

from lora_jax.models.config import ModelConfig
from lora_jax.models.names import modules
from lora_jax.plan.subject import Subject

LAST = "down_proj"


def step_flops(subject: Subject, tokens: int, *, causal: bool) -> int:
    """Return the operations of a step on so many tokens, in rows of `max_length`, over all devices.

    `causal` says that attention skips the keys that lie behind a query.
    """
    config, plan = subject.model_config, subject.plan
    again = subject.config.train.gradient_checkpointing
    trained = {module.name for module in plan.saved} if plan else set()
    ranks = {target.module.name: target.r for target in plan.targets} if plan else {}
    total = 0
    for module in modules(config):
        if module.kind != "linear":
            continue
        inputs, outputs = module.sizes
        whole = plan is None or module.name in trained
        needed = again and module.layer is not None and not module.name.endswith(LAST)
        total += 2 * tokens * inputs * outputs * (2 + whole + needed)
        rank = ranks.get(module.name, 0)
        repeated = inputs + outputs * needed if again and module.layer is not None else 0
        total += 2 * tokens * rank * (3 * (inputs + outputs) + repeated)
    return total + _attention(config, tokens, subject.config.data.max_length, again, causal)


def _attention(config: ModelConfig, tokens: int, length: int, again: bool, causal: bool) -> int:
    products = 2 + 4 + (2 if again else 1)  # forward, backward, and scores (and values) formed again
    one = 2 * tokens * config.num_attention_heads * config.head_dim
    keys = 0
    for window in config.sliding_windows:
        seen = min(window or length, length) if causal else length
        keys += seen // 2 if causal and seen == length else seen
    return one * products * keys
