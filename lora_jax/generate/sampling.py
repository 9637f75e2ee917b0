"""Choose the next token from its logits.

Order and definitions follow transformers' `generate`: repetition penalty, then, for sampling, temperature, top-k and
top-p.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

Logits = Float[Array, "batch vocab"]


@dataclass(frozen=True)
class Sampling:
    """Greedy at temperature 0; otherwise sampling from the tokens that top_k (0: all) and top_p keep."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


GREEDY = Sampling()


def choose(key: Key[Array, ""], logits: Logits, sampling: Sampling) -> Int[Array, " batch"]:
    """Return one token per row: the most likely at temperature 0, otherwise a sample. Apply the penalty before."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_k:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = keep_top_p(logits, sampling.top_p)
    return jax.random.categorical(key, logits).astype(jnp.int32)


def penalize(logits: Logits, seen: Bool[Array, "batch vocab"], penalty: float) -> Logits:
    """Return the logits with those of seen tokens made less likely: positive ones divided, negative ones multiplied.

    Keskar et al. 2019, arXiv:1909.05858, section 4.1, with the sign taken into account as in transformers.
    """
    return jnp.where(seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)


def keep_top_k(logits: Logits, k: int) -> Logits:
    """Return the logits with all but the k largest set to minus infinity; ties with the k-th are kept."""
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(logits: Logits, p: float) -> Logits:
    """Return the logits with all but the smallest set of most likely tokens of total probability p set to -infinity.

    The token that takes the total past p is kept, so at least one is.
    Holtzman et al. 2019, arXiv:1904.09751, section 3.1.
    """
    order = jnp.argsort(logits, axis=-1)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    dropped = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1) <= 1 - p
    ascending = jnp.where(dropped.at[:, -1].set(False), -jnp.inf, ascending)
    return jnp.put_along_axis(logits, order, ascending, axis=-1, inplace=False)
