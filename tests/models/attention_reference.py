"""Attention in float64 with a mask of all queries and all keys, and inputs for the tests."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lora_jax.models.attention.query_blocks import Window


def arrays(batch: int, length: int, heads: int, kv_heads: int, head_dim: int) -> tuple[jax.Array, ...]:
    """Return query, key, value and the cotangent of the result."""
    seeds = jax.random.split(jax.random.key(0), 4)
    counts = (heads, kv_heads, kv_heads, heads)
    return tuple(
        jax.random.normal(seed, (batch, length, count, head_dim))
        for seed, count in zip(seeds, counts, strict=True)
    )


def packed_segments(batch: int, length: int) -> jax.Array:
    """Return rows of three segments whose ends differ between rows, followed by padding."""
    slots, rows = np.arange(length), np.arange(batch)[:, None]
    segments = 1 + (slots >= length // 3 + rows) + (slots >= length // 2 + 2 * rows)
    return jnp.asarray(segments * (slots < length - length // 10 - rows), jnp.int32)


def padded_segments(lengths: list[int], length: int) -> jax.Array:
    """Return rows of one segment each, with the given lengths, padded at the end."""
    return jnp.asarray(np.arange(length) < np.array(lengths)[:, None], jnp.int32)


def reference(query: Any, key: Any, value: Any, pull: Any, segments: Any, window: Window) -> tuple[Any, Any]:
    """Return the values, 0 for padding, and the gradients of their product with `pull`, in float64."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (query, key, value, pull))
    batch, length, heads, head_dim = q.shape
    group = heads // k.shape[2]
    k, v = np.repeat(k, group, axis=2), np.repeat(v, group, axis=2)
    segments, slots = np.asarray(segments), np.arange(length)
    distance = slots[:, None] - slots
    mask = (segments[:, :, None] == segments[:, None]) & (distance >= 0) & (segments != 0)[:, None]
    mask &= distance < (length if window is None else window)
    scores = np.where(mask[:, None], np.einsum("bthd,bshd->bhts", q, k) / head_dim**0.5, -np.inf)
    real = (segments != 0)[:, None, :, None]
    largest = np.where(real, scores.max(axis=-1, keepdims=True), 0)
    powers = np.exp(scores - largest)
    weights = powers / np.where(real, powers.sum(axis=-1, keepdims=True), 1)
    mixed, do = np.einsum("bhts,bshd->bthd", weights, v), do * (segments != 0)[..., None, None]
    d_weights = np.einsum("bthd,bshd->bhts", do, v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(axis=-1, keepdims=True)) / head_dim**0.5

    def summed(x: Any) -> Any:
        return x.reshape(batch, length, -1, group, head_dim).sum(axis=3)

    dq, dk = np.einsum("bhts,bshd->bthd", d_scores, k), np.einsum("bhts,bthd->bshd", d_scores, q)
    dv = np.einsum("bhts,bthd->bshd", weights, do)
    return mixed, (dq, summed(dk), summed(dv))


def check(found: Any, expected: Any, tolerance: float) -> None:
    """Compare trees of arrays, relative to the largest of each array."""
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(
            np.asarray(ours, np.float64), theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max()
        )
