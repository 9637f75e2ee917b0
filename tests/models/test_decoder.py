"""Properties of the decoder for every family, with and without an adapter."""

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.models.decoder import Decoder, positions_of
from lora_jax.product import drop
from tests.tiny import adapted, adapted_logits, logits, lora, text, tiny_base

FAMILIES = ["llama", "mistral-window", "qwen2-windows", "qwen3"]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("left", [False, True])
def test_padding_does_not_change_the_logits_of_real_tokens(tmp_path: Path, name: str, left: bool) -> None:
    base = tiny_base(tmp_path / "base", name)
    tokens, segments = text(1, 12)
    expected = adapted_logits(base, {}, {}, tokens, segments)
    sides = ((0, 0), (5, 0) if left else (0, 5))
    padded = adapted_logits(base, {}, {}, jnp.pad(tokens, sides), jnp.pad(segments, sides))
    np.testing.assert_allclose(padded[:, 5:] if left else padded[:, :12], expected, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_later_tokens_do_not_change_earlier_logits(tmp_path: Path, name: str) -> None:
    base = tiny_base(tmp_path / "base", name)
    tokens, segments = text(1, 16)
    changed = tokens.at[0, 10].add(1)
    first, second = (adapted_logits(base, {}, {}, ids, segments) for ids in (tokens, changed))
    np.testing.assert_array_equal(first[:, :10], second[:, :10])
    assert np.abs(np.asarray(first - second))[:, 10].max() > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_segments_in_a_row_do_not_see_each_other(tmp_path: Path, name: str) -> None:
    base = tiny_base(tmp_path / "base", name)
    model, tokens = Decoder(base.config), text(2, 9)[0]
    alone = logits(model, {"params": base.params}, tokens, jnp.ones((2, 9), jnp.int32))
    segments = jnp.repeat(jnp.asarray([[1, 2]]), 9, axis=1)
    positions = jnp.tile(jnp.arange(9, dtype=jnp.int32), (1, 2))

    @jax.jit
    def packed_logits(params: Any) -> jax.Array:
        given = (tokens.reshape(1, 18), positions, segments.astype(jnp.int32))
        hidden, _ = model.apply({"params": params}, *given)
        return model.apply({"params": params}, hidden, method="logits")

    packed = packed_logits(base.params)
    np.testing.assert_allclose(packed.reshape(2, 9, -1), alone, atol=1e-5)


def test_positions_count_tokens_wherever_the_padding_is() -> None:
    segments = jnp.asarray([[0, 0, 1, 1], [1, 1, 1, 0]], jnp.int32)
    assert positions_of(segments)[:, 1:].tolist() == [[0, 0, 1], [1, 2, 2]]


def test_logits_are_float32_in_any_compute_dtype(tmp_path: Path) -> None:
    base = tiny_base(tmp_path / "base", "qwen2-tied")
    _, _, trainable, adapter = adapted(base, lora(target_modules=("q_proj", "lm_head")))
    variables = {"params": base.params, "lora": trainable, "adapter": adapter}
    wide, narrow = (
        logits(Decoder(base.config, dtype), variables, *text()) for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert wide.dtype == narrow.dtype == jnp.float32
    spread = float(wide.std())
    assert 0 < float(jnp.abs(wide - narrow).mean()) < 0.1 * spread


def loss(model: Decoder, base: Any, adapter: Any, trainable: Any) -> jax.Array:
    variables = {"params": base.params, "lora": trainable, "adapter": adapter}
    return jnp.mean(jax.nn.logsumexp(logits(model, variables, *text()), axis=-1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama-biases", "qwen2-windows"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, name: str) -> None:
    base = tiny_base(tmp_path / "base", name)
    _, _, trainable, adapter = adapted(base, lora(target_modules=("q_proj", "down_proj"), bias="all"))
    kept, recomputed = (
        jax.jit(jax.grad(partial(loss, model, base, adapter)))(trainable)
        for model in (Decoder(base.config, gradient_checkpointing=flag) for flag in (False, True))
    )
    assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(kept)) > 1e-3
    for one, other in zip(jax.tree.leaves(kept), jax.tree.leaves(recomputed), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_is_off_without_a_key_and_differs_from_key_to_key(
    tmp_path: Path, checkpointing: bool
) -> None:
    base = tiny_base(tmp_path / "base")
    _, _, trainable, adapter = adapted(base, lora(lora_dropout=0.5))
    variables = {"params": base.params, "lora": trainable, "adapter": adapter}
    model = Decoder(base.config, gradient_checkpointing=checkpointing)
    tokens, segments = text()
    place = (tokens, positions_of(segments), segments)
    dropping = jax.jit(lambda key: model.apply(variables, *place, rngs={"dropout": key})[0])

    def hidden(key: int | None) -> np.ndarray:
        found = model.apply(variables, *place)[0] if key is None else dropping(jax.random.key(key))
        return np.asarray(found)

    plain, _ = Decoder(base.config).apply(variables, *place)
    np.testing.assert_allclose(hidden(None), plain, atol=1e-6)
    np.testing.assert_array_equal(hidden(1), hidden(1))
    assert np.abs(hidden(1) - hidden(2)).max() > 1e-3 < np.abs(hidden(1) - hidden(None)).max()


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_dropout_zeroes_its_share_and_keeps_the_mean(rate: float, dtype: Any) -> None:
    x = jnp.full((400, 500), 3, dtype)
    dropped = drop(x, rate, jax.random.key(0))
    assert dropped.dtype == dtype
    values = np.unique(np.asarray(dropped, np.float32))
    assert values[0] == 0
    np.testing.assert_allclose(values[1:], 3 / (1 - rate), rtol=1e-2)
    assert len(values) == 2
    assert float((dropped == 0).mean()) == pytest.approx(rate, abs=0.005)
    assert float(dropped.astype(jnp.float32).mean()) == pytest.approx(3, rel=0.02)
