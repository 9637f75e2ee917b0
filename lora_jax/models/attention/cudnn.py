"""Attention on a GPU: cuDNN's flash attention, for rows that hold one segment from the first position on."""

from __future__ import annotations

from functools import partial
from typing import Final, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lora_jax.models.attention.query_blocks import Window

DTYPES: Final = (jnp.bfloat16, jnp.float16)


def usable(query: Array, key: Array) -> bool:
    """Return whether cuDNN is installed and supports this head size; tracing finds out and runs nothing."""
    small = [jax.ShapeDtypeStruct((1, 8, *x.shape[2:]), x.dtype) for x in (query, key, key)]
    try:
        jax.eval_shape(partial(_attend, window=None), *small, jax.ShapeDtypeStruct((1,), jnp.int32))
    except (RuntimeError, NotImplementedError, ValueError, ImportError):
        return False
    return True


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segments: Int[Array, "batch length"],
    window: Window = None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "batch length heads head_dim"]:
    """Return causal softmax(query · key / sqrt(head_dim)) · value; padding rows are 0.

    XLA's implementation computes the same in plain operations, with memory quadratic in the length.
    """
    real = segments != 0
    lengths = jnp.maximum(jnp.count_nonzero(real, axis=1), 1).astype(jnp.int32)
    mixed = _attend(query, key, value, lengths, window, implementation)
    return jnp.where(real[:, :, None, None], mixed, 0)


def _attend(
    query: Array,
    key: Array,
    value: Array,
    lengths: Array,
    window: Window,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    return jax.nn.dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
