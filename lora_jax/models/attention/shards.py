"""Attention on a mesh, each device with its own rows and heads.

The compiler cannot split a Pallas call, and would move the blocks of a scan between devices, so a `shard_map` says how:

    rows    along `data` and `fsdp`, if they divide
    heads   along `tensor`, if they divide; key heads that do not are repeated until they do
    tokens  along `sequence`: devices exchange their tokens of all heads for all tokens of some heads (all-to-all, as in
            DeepSpeed Ulysses: Jacobs et al. 2023, arXiv:2309.14509); if heads do not divide, each device gathers keys
            and values, which are few, for its own queries
"""

from __future__ import annotations

from collections.abc import Callable
from math import lcm

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lora_jax.models.attention.query_blocks import Places
from lora_jax.parallel.mesh import FEATURES, POSITIONS, rows_and_positions

Whole = Callable[[Array, Array, Array, Array], Array]
"""Attention of tokens over themselves: query, key, value, segments."""
Part = Callable[[Array, Array, Array, Places, Places], Array]
"""Attention of some queries over all keys: query, key, value, and the places of both."""


def on_shards(
    whole: Whole,
    part: Part,
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segments: Int[Array, "batch length"],
) -> Float[Array, "batch length heads head_dim"]:
    """Return whole(query, key, value, segments), computed on shards if a mesh is set.

    `part` is used if a device has some of the queries and all keys of its heads.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return whole(query, key, value, segments)
    rows, tokens = rows_and_positions(segments.shape, mesh.shape)
    heads, kv_heads = query.shape[2], key.shape[2]
    across = FEATURES if mesh.shape.get(FEATURES, 1) > 1 and heads % mesh.shape[FEATURES] == 0 else None
    parts = 1 if across is None else mesh.shape[across]
    cut = 1 if tokens is None else mesh.shape[POSITIONS]
    traded = cut > 1 and heads % (parts * cut) == 0
    # A key head may be repeated as often as it has queries; heads then divide by any common multiple that is needed.
    times = lcm(kv_heads, parts * cut if traded else parts) // kv_heads
    if times > 1:
        key, value = jnp.repeat(key, times, axis=2), jnp.repeat(value, times, axis=2)

    def local(query: Array, key: Array, value: Array, segments: Array) -> Array:
        if traded:
            query, key, value = (
                jax.lax.all_to_all(x, POSITIONS, split_axis=2, concat_axis=1, tiled=True)
                for x in (query, key, value)
            )
            mixed = whole(query, key, value, segments)
            return jax.lax.all_to_all(mixed, POSITIONS, split_axis=1, concat_axis=2, tiled=True)
        if cut == 1:
            return whole(query, key, value, segments)
        key, value = (jax.lax.all_gather(x, POSITIONS, axis=1, tiled=True) for x in (key, value))
        length = query.shape[1]
        start = jax.lax.axis_index(POSITIONS) * length
        own = jax.lax.dynamic_slice_in_dim(segments, start, length, axis=1)
        slots = jnp.arange(segments.shape[1])
        return part(query, key, value, Places(own, slots[:length] + start), Places(segments, slots))

    x = P(rows, tokens, across)
    mapped = jax.shard_map(local, in_specs=(x, x, x, P(rows)), out_specs=x, check_vma=False)
    return mapped(query, key, value, segments)
