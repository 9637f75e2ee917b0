"""Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) in XLA, with memory linear in the length.

If there are few scores, they are computed at once. Otherwise queries are processed in blocks (and key heads too, if one
block for all of them is still large), and the backward pass recomputes the scores. If query i is known to have the slot
of key i, keys in the future of a whole block of queries, or before its window, are skipped.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Window = int | None
"""Number of positions that a query sees, including its own; None is all."""

FEWEST, STAGES = 64, 4
"""Minimum number of queries per block; and how often, at most, the number of keys grows from block to block."""


class Places(NamedTuple):
    """Segments and slots of tokens.

    A token sees tokens of its own segment; segment 0 is padding. A slot is an index in the sequence, unlike a position,
    which restarts with each segment.
    """

    segments: Int[Array, "batch length"]
    slots: Int[Array, " length"]


def sees(queries: Places, keys: Places, window: Window = None) -> Bool[Array, "batch length keys"]:
    """Return which keys each query sees: those in its segment and window that are not in its future."""
    distance = queries.slots[:, None] - keys.slots
    near = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    same = queries.segments[:, :, None] == keys.segments[:, None, :]
    return same & (keys.segments != 0)[:, None, :] & near


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    queries: Places,
    keys: Places,
    window: Window = None,
    aligned: bool = False,
    at_once: int = 128 * 2**20,
) -> Float[Array, "batch length heads head_dim"]:
    """Return softmax(query · key / sqrt(head_dim)) · value, with heads grouped over the kv_heads.

    Scores and softmax are float32. A query that sees no key (padding) gets a finite, meaningless row. `aligned` says
    that queries and keys have the same slots 0, 1, 2, …; `at_once` limits the bytes of scores computed at a time, to no
    fewer than FEWEST queries of one key head.
    """
    batch, length, heads, head_dim = query.shape
    size, kv_heads = key.shape[1:3]
    # The heads of a group become rows of one product with their keys: a plain batched product takes a CPU two thirds of
    # the time that it takes with the group as a separate axis.
    folded = query.reshape(batch, length, kv_heads, -1, head_dim).transpose(0, 2, 3, 1, 4)
    folded = folded.reshape(batch * kv_heads, -1, length, head_dim)
    key = key.transpose(0, 2, 1, 3).reshape(batch * kv_heads, size, head_dim)
    value = value.transpose(0, 2, 1, 3).reshape(batch * kv_heads, size, head_dim)
    if 4 * batch * heads * length * size <= at_once:
        mixed = _mixed(folded, key, value, sees(queries, keys, window))
    else:
        mixed = _some_at_a_time(folded, key, value, queries, keys, window, aligned, at_once)
    mixed = mixed.reshape(batch, kv_heads, -1, length, head_dim).transpose(0, 3, 1, 2, 4)
    return mixed.reshape(batch, length, heads, head_dim)


def _some_at_a_time(
    query: Float[Array, "groups group length head_dim"],
    key: Float[Array, "groups keys head_dim"],
    value: Float[Array, "groups keys head_dim"],
    queries: Places,
    keys: Places,
    window: Window,
    aligned: bool,
    at_once: int,
) -> Float[Array, "groups group length head_dim"]:
    groups, group, length, _ = query.shape
    size, kv_heads = key.shape[1], groups // len(keys.segments)
    span = size if window is None or not aligned else min(size, window + FEWEST)
    row = 4 * group * span
    block = min(length, max(FEWEST, at_once // (row * groups) // FEWEST * FEWEST))

    def one(part: tuple[Array, Array, Array, Array]) -> Array:
        query, key, value, index = part
        ours = Places(queries.segments[index][None], queries.slots)
        theirs = Places(keys.segments[index][None], keys.slots)
        return _one_group(query, key, value, ours, theirs, window, aligned, block)

    parts = (query, key, value, jnp.arange(groups) // kv_heads)
    return jax.lax.map(one, parts, batch_size=min(groups, max(1, at_once // (row * block))))


def _one_group(
    query: Float[Array, "group length head_dim"],
    key: Float[Array, "keys head_dim"],
    value: Float[Array, "keys head_dim"],
    queries: Places,
    keys: Places,
    window: Window,
    aligned: bool,
    block: int,
) -> Float[Array, "group length head_dim"]:
    """Return the attention output of the heads that share one key head, `block` queries at a time."""
    group, length, head_dim = query.shape
    size, count = len(key), -(-length // block)
    spare = count * block - length
    # The extra queries have no slot and are padding: they see nothing, and are cut off at the end.
    rows = jnp.pad(query, ((0, 0), (0, spare), (0, 0))).reshape(group, count, block, head_dim).swapaxes(0, 1)
    segments = jnp.pad(queries.segments[0], (0, spare)).reshape(count, 1, block)
    slots = jnp.pad(queries.slots, (0, spare), constant_values=-1).reshape(count, block)

    @partial(jax.checkpoint, static_argnums=(4,), prevent_cse=False)
    def meet(rows: Array, segments: Array, slots: Array, start: Array, span: int) -> Array:
        near, far, own, at = (
            jax.lax.dynamic_slice_in_dim(array, start, span)
            for array in (key, value, keys.segments[0], keys.slots)
        )
        mask = sees(Places(segments, slots), Places(own[None], at), window)
        return _mixed(rows[None], near[None], far[None], mask)[0]

    def blocks(first: int, last: int, span: int) -> Array:
        """Return the blocks from first to last, each over `span` keys that end with its own, or with the last."""
        ends = (jnp.arange(first, last) + 1) * block
        starts = jnp.clip(ends - span, 0, size - span)
        parts = (rows[first:last], segments[first:last], slots[first:last], starts)
        return jax.lax.map(lambda part: meet(*part, span), parts)

    if not aligned:
        mixed = blocks(0, count, size)
    elif window is not None and window + block < size:
        mixed = blocks(0, count, window + block)
    else:
        step = -(-count // STAGES)
        stages = ((first, min(first + step, count)) for first in range(0, count, step))
        mixed = jnp.concatenate([blocks(*stage, min(size, stage[1] * block)) for stage in stages])
    return mixed.swapaxes(0, 1).reshape(group, count * block, head_dim)[:, :length]


def _mixed(
    query: Float[Array, "groups group length head_dim"],
    key: Float[Array, "groups keys head_dim"],
    value: Float[Array, "groups keys head_dim"],
    mask: Bool[Array, "batch length keys"],
) -> Float[Array, "groups group length head_dim"]:
    """Return each group's values weighted by its attention; the groups in a batch row share its mask."""
    groups, group, length, head_dim = query.shape
    rows, size = group * length, key.shape[1]
    precision = jax.lax.Precision.HIGHEST if query.dtype == jnp.float32 else None
    folded = query.reshape(groups, rows, head_dim)
    scores = jnp.einsum("nrd,nkd->nrk", folded, key, precision=precision, preferred_element_type=jnp.float32)
    scores = scores.reshape(len(mask), groups // len(mask), group, length, size) * head_dim**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(value.dtype).reshape(groups, rows, size)
    mixed = jnp.einsum("nrk,nkd->nrd", probabilities, value, precision=precision)
    return mixed.reshape(query.shape)
