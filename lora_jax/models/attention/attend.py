"""Attention of a layer: its window, its sharding, and the implementation for the platform it is lowered for.

    TPU   splash attention, for bfloat16
    GPU   cuDNN, for 16 bits, if no row packs several segments
    else  XLA, in blocks of queries (`query_blocks.py`)

None of them holds scores, or a mask, of all queries and all keys of a long text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_jax.models.attention import cudnn, query_blocks
from lora_jax.models.attention.query_blocks import Places, Window
from lora_jax.models.attention.shards import on_shards

splash: ModuleType | None = None
with suppress(ImportError):  # this JAX has no Mosaic, or no splash attention
    splash = import_module("lora_jax.models.attention.splash")

CACHED: Final = 8 * 2**20
"""Bytes of scores that a CPU computes at a time; with more it waits for memory."""


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segments: Int[Array, "batch length"],
    window: Window = None,
    packed: bool = True,
) -> Float[Array, "batch length heads head_dim"]:
    """Return causal softmax(query · key / sqrt(head_dim)) · value within each segment.

    Heads are grouped over the kv_heads. Segment 0 is padding, whose results are finite but meaningless. If not
    `packed`, each row holds one segment, from its first position on. On a mesh (`jax.set_mesh`), each device attends
    with its own rows and heads.
    """
    whole = partial(_by_platform, window=window, packed=packed)
    return on_shards(whole, partial(attend_over, window=window), query, key, value, segments)


def attend_over(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    queries: Places,
    keys: Places,
    window: Window = None,
) -> Float[Array, "batch length heads head_dim"]:
    """Return the same for queries and keys in different slots, such as those of a cache."""
    large = partial(query_blocks.attend, window=window)
    small = partial(large, at_once=CACHED)
    return jax.lax.platform_dependent(query, key, value, queries, keys, default=large, cpu=small)


def of_layer(
    windows: Sequence[Window], layer: Int[Array, ""] | None, keys: int, attention: Callable[[Window], Array]
) -> Array:
    """Return attention(window) for the window of a layer; `index` may be traced if windows differ.

    A window as large as the number of keys, or larger, counts as none.
    """
    narrow = [None if window is None or window >= keys else window for window in windows]
    different = list(dict.fromkeys(narrow))
    if len(different) == 1:
        return attention(different[0])
    chosen = jnp.asarray([different.index(window) for window in narrow])[layer]
    return jax.lax.switch(chosen, [partial(attention, window) for window in different])


def _by_platform(
    query: Array, key: Array, value: Array, segments: Array, window: Window, packed: bool
) -> Array:
    def xla(query: Array, key: Array, value: Array, segments: Array, **settings: int) -> Array:
        places = Places(segments, jnp.arange(segments.shape[1], dtype=jnp.int32))
        return query_blocks.attend(query, key, value, places, places, window, aligned=True, **settings)

    chosen: dict[str, Callable[..., Array]] = {"cpu": partial(xla, at_once=CACHED)}
    if splash is not None and query.dtype in splash.DTYPES:
        chosen["tpu"] = partial(splash.attend, window=window)
    if not packed and query.dtype in cudnn.DTYPES and cudnn.usable(query, key):
        chosen["cuda"] = partial(cudnn.attend, window=window)
    return jax.lax.platform_dependent(query, key, value, segments, default=xla, **chosen)
