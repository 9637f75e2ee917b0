"""Attention of a layer: its window, its share of a mesh, and the kernel of the platform that it is lowered for.

    TPU   splash attention, for bfloat16
    GPU   cuDNN's, for 16 bits, where no row packs several texts
    else  XLA, some queries at a time (`query_blocks.py`)

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
with suppress(ImportError):  # a JAX without Pallas' Mosaic, or without splash attention
    splash = import_module("lora_jax.models.attention.splash")

CACHED: Final = 8 * 2**20
"""Bytes of scores that a CPU forms at a time; more make it wait for its memory."""


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segments: Int[Array, "batch length"],
    window: Window = None,
    packed: bool = True,
) -> Float[Array, "batch length heads head_dim"]:
    """Return softmax(query · key / sqrt(head_dim)) · value, each token over those of its segment up to itself.

    Heads are in groups over the kv_heads; segment 0 is padding, whose results are finite and mean nothing. Not
    `packed` says that each row holds one segment, from its first place on. Under a mesh (`jax.set_mesh`) each
    device attends with its own rows and heads.
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
    """Return the same for queries and keys that stand in different places: those of a cache, say."""
    large = partial(query_blocks.attend, window=window)
    small = partial(large, at_once=CACHED)
    return jax.lax.platform_dependent(query, key, value, queries, keys, default=large, cpu=small)


def of_layer(
    windows: Sequence[Window], layer: Int[Array, ""] | None, keys: int, attention: Callable[[Window], Array]
) -> Array:
    """Return attention(window) for the window of a layer, which may be traced where windows differ.

    A window of as many places as there are keys, or more, is none.
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
