"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), and its scalings for long contexts.

The two halves of a head are rotated against each other, as in Hugging Face checkpoints, rather than interleaved pairs
as in the original Llama files.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from lora_jax.models.model_config import Rope

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")


def frequencies(rope: Rope, head_dim: int, positions: Int[Array, "batch length"]) -> Float[Array, " half"]:
    """Return the angle per position by which each pair in a head is rotated, in radians, float32 [head_dim / 2].

    default: theta^(-2i/d). linear: divided by `factor`. llama3: divided by `factor` for wavelengths above the original
    context / `low_freq_factor`, unchanged for those below the original context / `high_freq_factor`, interpolated in
    between. dynamic: for n positions beyond an original context of L, theta becomes
    theta * (factor * n / L - factor + 1)^(d / (d - 2)). Formulas of transformers' modeling_rope_utils.
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    if rope.rope_type == "dynamic":
        original = rope.original_max_position_embeddings
        seen = jnp.maximum(jnp.max(positions) + 1, original).astype(jnp.float32)
        growth = rope.factor * seen / original - (rope.factor - 1)
        return 1.0 / (rope.rope_theta * growth ** (head_dim / (head_dim - 2))) ** exponent
    plain = 1.0 / rope.rope_theta**exponent
    if rope.rope_type == "linear":
        return plain / rope.factor
    if rope.rope_type == "llama3":
        turns = rope.original_max_position_embeddings * plain / (2 * math.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - kept) * plain / rope.factor + kept * plain
    return plain


def angles(
    rope: Rope, head_dim: int, positions: Int[Array, "batch length"], dtype: DTypeLike
) -> tuple[Float[Array, "batch length half"], Float[Array, "batch length half"]]:
    """Return cosine and sine of all angles, computed in float32 and cast to dtype."""
    turned = positions[..., None].astype(jnp.float32) * frequencies(rope, head_dim, positions)
    return jnp.cos(turned).astype(dtype), jnp.sin(turned).astype(dtype)


def rotate(
    x: Float[Array, "batch length heads head_dim"],
    cosine: Float[Array, "batch length half"],
    sine: Float[Array, "batch length half"],
) -> Float[Array, "batch length heads head_dim"]:
    """Return x with each head rotated by its position's angles."""
    first, second = jax.numpy.split(x, 2, axis=-1)
    cosine, sine = cosine[:, :, None], sine[:, :, None]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
