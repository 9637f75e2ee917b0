"""Optimizers and schedules, by optax, with the names of transformers' TrainingArguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.config import TrainOptions
from lora_jax.methods.table import LEAVES
from lora_jax.training.adam8bit import adamw8bit
from lora_jax.types import PyTree

DECAYED = frozenset(leaf.name for leaf in LEAVES.values() if leaf.decays)


def warmup_steps(train: TrainOptions, steps: int) -> int:
    """Return the number of warmup steps in a run of `steps`."""
    if train.lr_scheduler_type == "constant":
        return 0
    return train.warmup_steps or math.ceil(train.warmup_ratio * steps)


def schedule(train: TrainOptions, steps: int) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Return the learning rate as a function of the step, counted from 0, as transformers' schedulers do.

    Linear warmup from 0, then constant, linear or half-cosine decay to `min_lr_ratio` of the peak.
    """
    warm, peak, floor = warmup_steps(train, steps), train.learning_rate, train.min_lr_ratio

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        index = jnp.asarray(count, jnp.float32)
        done = jnp.clip((index - warm) / max(1, steps - warm), 0.0, 1.0)
        if train.lr_scheduler_type == "cosine":
            decayed = 0.5 * (1 + jnp.cos(jnp.pi * done))
        elif train.lr_scheduler_type == "linear":
            decayed = 1 - done
        else:
            decayed = jnp.ones_like(done)
        return peak * jnp.where(index < warm, index / max(1, warm), floor + (1 - floor) * decayed)

    return rate


def decay_mask(tree: PyTree) -> Any:
    """Return True for the leaves that weight decay applies to: matrices, not biases or norms."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in DECAYED, tree)


def make_optimizer(train: TrainOptions, steps: int) -> optax.GradientTransformation:
    """Return the optimizer of the trainable tree; gradients are first clipped by their global norm."""
    rate, decay = schedule(train, steps), train.weight_decay
    b1, b2 = train.adam_beta1, train.adam_beta2
    if train.optim in ("adamw8bit", "paged_adamw_8bit"):
        update = adamw8bit(rate, b1, b2, train.adam_epsilon, decay, decay_mask)
    elif train.optim in ("adamw", "paged_adamw_32bit"):
        update = optax.adamw(rate, b1, b2, eps=train.adam_epsilon, weight_decay=decay, mask=decay_mask)
    elif train.optim == "lion":
        update = optax.lion(rate, b1, b2, weight_decay=decay, mask=decay_mask)
    elif train.optim == "adafactor":
        # optax would add weight decay unscaled by the learning rate; the other optimizers scale it.
        factored = optax.adafactor(None, multiply_by_parameter_scale=False)  # its updates point downhill
        decayed = optax.add_decayed_weights(-decay, decay_mask)
        update = optax.chain(factored, decayed, optax.scale_by_learning_rate(rate, flip_sign=False))
    else:
        update = optax.chain(optax.add_decayed_weights(decay, decay_mask), optax.sgd(rate))
    clip = optax.clip_by_global_norm(train.max_grad_norm) if train.max_grad_norm else optax.identity()
    return optax.chain(clip, update)
