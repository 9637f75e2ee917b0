"""Attention on a TPU: JAX's splash attention, which computes scores tile by tile in VMEM, forward and backward.

Tiles entirely in the future, or before every window, are skipped. Memory is linear in the length.
"""

from __future__ import annotations

from typing import Any, Final

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from lora_jax.models.attention.query_blocks import Window

DTYPES: Final = (jnp.bfloat16,)
"""Its products are bfloat16, as the matrix unit's; float32 keeps all of its bits, through XLA."""

_LANES, _SMALLEST, _LARGEST = 128, 256, 512


def tile(length: int) -> tuple[int, int]:
    """Return (tile size, padded length): the least padding first, then the largest tiles."""
    if length <= _LARGEST:
        whole = _up(length, _LANES)
        return whole, whole
    sizes = range(_SMALLEST, _LARGEST + 1, _LANES)
    side = min(sizes, key=lambda size: (_up(length, size), -size))
    return side, _up(length, side)


def attend(
    query: Float[Array, "batch length heads head_dim"],
    key: Float[Array, "batch length kv_heads head_dim"],
    value: Float[Array, "batch length kv_heads head_dim"],
    segments: Int[Array, "batch length"],
    window: Window = None,
    interpret: bool = False,
) -> Float[Array, "batch length heads head_dim"]:
    """Return causal softmax(query · key / sqrt(head_dim)) · value within each segment."""
    length, heads, head_dim = query.shape[1:]
    side, padded = tile(length)

    def laid_out(x: Array) -> Array:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padded - length), (0, 0)))

    shape = (padded, padded)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)
    sizes = kernels.BlockSizes(
        block_q=side, block_kv=side, block_q_dkv=side, block_kv_dkv=side, block_q_dq=side, block_kv_dq=side
    )
    kernel: Any = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    # Padding is segment 0 and sees padding: the kernel could not normalize a row without a key.
    segments = jnp.pad(segments, ((0, 0), (0, padded - length)))
    scaled = (query * head_dim**-0.5).astype(query.dtype)
    both = kernels.SegmentIds(segments, segments)
    mixed = jax.vmap(kernel)(laid_out(scaled), laid_out(key), laid_out(value), both)
    return mixed[:, :, :length].swapaxes(1, 2)


def _up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
