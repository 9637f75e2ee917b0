"""Attention over many scores: some heads at a time, with the values and gradients of all at once."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models import attention
from lora_jax.models.attention import attend, attention_mask, within_window


@pytest.mark.parametrize("heads_at_once", [0, 1, 2])
def test_heads_taken_some_at_a_time_give_what_all_at_once_give(
    heads_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, length, heads, kv_heads, head_dim = 2, 9, 6, 3, 8
    keys = jax.random.split(jax.random.key(0), 4)
    query, key, value, pull = (
        jax.random.normal(seed, (batch, length, count, head_dim))
        for seed, count in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    )
    slots = jnp.arange(length)
    segments = jnp.where(slots < 4, 1, 2) * jnp.array([[1], [2]]) * (slots < 8)
    mask = within_window(attention_mask(segments, segments, slots, slots), slots, slots, jnp.int32(5))

    def weighed(*arrays: Any) -> Any:
        return jnp.sum(attend(*arrays, mask) * pull * (segments != 0)[..., None, None])

    both = jax.value_and_grad(weighed, argnums=(0, 1, 2))
    expected = both(query, key, value)
    scores = 4 * heads // kv_heads * length * length
    monkeypatch.setattr(attention, "AT_ONCE", heads_at_once * scores)
    found = both(query, key, value)
    for ours, whole in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, whole, rtol=1e-5, atol=1e-6)
