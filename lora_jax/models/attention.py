"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) under a causal, segmented, windowed mask."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Mask = Bool[Array, "batch length keys"]

AT_ONCE = 128 * 2**20
"""Most bytes of float32 scores at once, unless a single head of keys has more."""


def attention_mask(
    query_segments: Int[Array, "batch length"],
    key_segments: Int[Array, "batch keys"],
    query_slots: Int[Array, " length"],
    key_slots: Int[Array, " keys"],
) -> Bool[Array, "batch length keys"]:
    """Return which keys each query sees: those of its own segment that stand no later than itself.

    Slots are places in the sequence (not positions, which restart with a segment); segment 0 is padding.
    """
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return same & (key_slots[None, :] <= query_slots[:, None]) & (key_segments != 0)[:, None, :]


def within_window(
    mask: Mask, query_slots: Int[Array, " length"], key_slots: Int[Array, " keys"], window: Int[Array, ""]
) -> Mask:
    """Return the mask less the keys `window` or more places before the query."""
    return mask & (query_slots[:, None] - key_slots[None, :] < window)


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    mask: Mask,
) -> Float[Array, "batch length heads head_dim"]:
    """Return softmax(query · key / sqrt(head_dim)) · value, heads in groups over the kv_heads.

    Scores and softmax are float32. A query that sees no key (padding) gets a finite, meaningless row.
    """
    batch, length, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1], key.shape[2]
    rows = heads // kv_heads * length
    # Heads of a group become rows of one product with their keys: a plain batched product, which a CPU does
    # in two thirds of the time that it takes with the group as an axis of its own.
    folded = query.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    folded = folded.reshape(batch * kv_heads, rows, head_dim)
    key = key.transpose(0, 2, 1, 3).reshape(batch * kv_heads, keys, head_dim)
    value = value.transpose(0, 2, 1, 3).reshape(batch * kv_heads, keys, head_dim)
    if 4 * batch * heads * length * keys <= AT_ONCE:
        mixed = _mixed(folded, key, value, mask)
    else:
        # Some heads of keys at a time; their scores are formed again in the backward pass, else all would be kept.
        def one(part: tuple[Array, Array, Array, Array]) -> Array:
            query, key, value, row = part
            return _mixed(query[None], key[None], value[None], mask[row][None])[0]

        parts = (folded, key, value, jnp.arange(batch * kv_heads) // kv_heads)
        mixed = jax.lax.map(jax.checkpoint(one), parts, batch_size=max(1, AT_ONCE // (4 * rows * keys)))
    mixed = mixed.reshape(batch, kv_heads, -1, length, head_dim).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads, head_dim)


def _mixed(
    query: Float[Array, "groups rows head_dim"],
    key: Float[Array, "groups keys head_dim"],
    value: Float[Array, "groups keys head_dim"],
    mask: Mask,
) -> Float[Array, "groups rows head_dim"]:
    """Return each group's values weighed by its scores; the groups of a row of the batch share its mask."""
    batch, length, keys = mask.shape
    groups, rows, head_dim = query.shape
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    scores = jnp.einsum("nrd,nkd->nrk", query, key, precision=precision, preferred_element_type=jnp.float32)
    scores = scores.reshape(batch, groups // batch, -1, length, keys) * head_dim**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(-1, rows, keys)
    return jnp.einsum("nrk,nkd->nrd", probabilities, value, precision=precision)
