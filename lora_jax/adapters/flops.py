"""Floating-point operations of training, from the shapes of its products: 2 · tokens · in · out each.

A base product runs forward, and backward for its input's gradient; a kernel that is trained has a product more. With
gradient checkpointing the backward pass runs a layer's products again, but for what only its output needs: the last
product, down_proj's. What a method adds is its own (`Method.flops`). Attention's scores and values are
two products with all keys, which a causal kernel halves; backward they are four, and what is not kept of them is formed
again. The head runs forward and backward on trained tokens alone. What is no product, a few per cent in a model of this
kind, is not counted.
"""

from __future__ import annotations

import numpy as np

from lora_jax.methods.matching import Plan
from lora_jax.models.model_config import ModelConfig
from lora_jax.models.names import modules
from lora_jax.modules import LM_HEAD

LAST = "down_proj"


def step_flops(
    config: ModelConfig, plan: Plan | None, tokens: int, length: int, *, again: bool, causal: bool
) -> int:
    """Return the operations of a step on so many tokens, all trained, in rows of one length, over all devices.

    `plan` is None where all is trained; `again` says that a layer's products are run again in the backward pass, and
    `causal` that attention skips the keys that lie behind a query.
    """
    products = _products(config, plan, tokens, tokens, again)
    keys = 0
    for window in config.sliding_windows:
        seen = min(window or length, length) if causal else length
        keys += seen // 2 if causal and seen == length else seen
    return products + _scores(config, tokens, 2 + 4 + (2 if again else 1)) * keys


def needed_flops(config: ModelConfig, plan: Plan | None, lengths: np.ndarray, trained: int) -> int:
    """Return the operations that training on rows of these lengths needs, `trained` of their tokens as targets.

    What model FLOPs utilization counts (PaLM, appendix B): nothing is run twice, no key is multiplied in vain, and
    padding does not count.
    """
    lengths = lengths.astype(np.int64)
    products = _products(config, plan, int(lengths.sum()), trained, again=False)
    scores = 0
    for window in config.sliding_windows:
        seen = lengths if window is None else np.minimum(lengths, window)
        scores += int(
            (seen * (seen + 1) // 2 + (lengths - seen) * seen).sum()
        )  # pairs of a query and a key it sees
    return products + _scores(config, 1, 2 + 4) * scores


def _products(config: ModelConfig, plan: Plan | None, tokens: int, trained: int, again: bool) -> int:
    whole = {module.name for module in plan.saved} if plan else set()
    adapted = {site.module.name: site for site in plan.targets} if plan else {}
    total = 0
    for module in modules(config):
        if module.kind != "linear":
            continue
        inputs, outputs = module.sizes
        count = trained if module.path == LM_HEAD else tokens
        repeats = again and module.layer is not None
        needed = repeats and not module.name.endswith(LAST)
        total += 2 * count * inputs * outputs * (2 + (plan is None or module.name in whole) + needed)
        if plan is not None and (site := adapted.get(module.name)) is not None:
            total += count * plan.method.flops(site, repeats, needed)
    return total


def _scores(config: ModelConfig, tokens: int, products: int) -> int:
    """Return the operations of so many products of scores or values, for each key that a token sees."""
    return 2 * tokens * config.num_attention_heads * config.head_dim * products
