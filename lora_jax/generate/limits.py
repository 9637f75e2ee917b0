"""Limits of generation: tokens that neither memory nor the model's positions have room for."""

from __future__ import annotations

from lora_jax.errors import Option, UserError
from lora_jax.generate.decode import cache_bytes
from lora_jax.models.decoder import Decoder
from lora_jax.parallel.memory import devices_memory


def check_cache(model: Decoder, batch: int, longest: int, max_new_tokens: int, option: Option) -> None:
    """Raise UserError, naming the `option` for max_new_tokens, if the cache alone is larger than memory."""
    needed, there = cache_bytes(model, batch, longest, max_new_tokens), devices_memory()
    if needed > there:
        raise UserError(
            f"{option} {max_new_tokens}: the cache for that many tokens takes {needed / 2**30:,.1f} GiB, but there are "
            f"{there / 2**30:,.1f} GiB of memory; give fewer"
        )


def beyond_positions(positions: int, longest: int, max_new_tokens: int) -> str | None:
    """Return a note if a prompt of `longest` tokens, or its completion, exceeds the model's maximum position."""
    if longest > positions:
        what = f"the prompt has {longest:,} tokens"
    elif longest + max_new_tokens > positions:
        what = f"the prompt and {Option('max_new_tokens')} make up to {longest + max_new_tokens:,} tokens"
    else:
        return None
    return f"{what}; the model has {positions:,} positions (max_position_embeddings) and generates noise beyond them"
