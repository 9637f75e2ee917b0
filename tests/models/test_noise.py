"""NEFTune's noise: its size, where it is added, and where it is not."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lora_jax.data.batches import Batch, make_batch
from lora_jax.data.tokens import Tokens
from lora_jax.models.decoder import Decoder, embedding_noise, segment_lengths
from lora_jax.training.step import batch_loss, make_eval_step
from tests.tiny import Base, tiny_base

ALPHA = 5.0


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")


def rows(length: int) -> Batch:
    """Two rows of 6 and 10 tokens, padded to `length`."""
    ids = np.random.default_rng(0).integers(3, 90, 10).astype(np.int32)
    return make_batch([Tokens(ids[:n], np.arange(n) > 1, 1, False) for n in (6, 10)], 2, length, 0)


def loss(base: Base, batch: Batch, seed: int | None, **options: Any) -> float:
    summed = jax.jit(partial(batch_loss, Decoder(base.config, **options)))
    key = None if seed is None else jax.random.key(seed)
    return float(summed({}, base.params, {}, batch, key)[0])


def test_noise_is_uniform_with_the_papers_scale() -> None:
    lengths = jnp.array([[16], [64]])
    noise = np.asarray(embedding_noise(jax.random.key(0), jnp.zeros((2, 64, 128)), lengths, ALPHA))
    for row, length in zip(noise, (16, 64), strict=True):
        bound = ALPHA / np.sqrt(length * 128)
        assert 0.99 * bound < np.abs(row).max() <= bound
        assert row.std() == pytest.approx(bound / np.sqrt(3), rel=0.02)
        assert abs(row.mean()) < 0.02 * bound


@pytest.mark.slow
def test_noise_in_a_packed_row_depends_on_each_text() -> None:
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 3]])
    assert segment_lengths(segments)[:, :5].tolist() == [[3, 3, 3, 2, 2], [6] * 5]
    assert segment_lengths(segments)[1, 6] == 1


@pytest.mark.slow
def test_training_is_noised_by_its_key_and_evaluation_is_not(base: Base) -> None:
    batch = rows(10)
    plain = loss(base, batch, 0)
    noised = [loss(base, batch, seed, neftune_noise_alpha=ALPHA) for seed in (0, 0, 1)]
    assert noised[0] == noised[1] != noised[2]
    assert plain not in noised
    assert loss(base, batch, None, neftune_noise_alpha=ALPHA) == plain
    sums = make_eval_step(Decoder(base.config, neftune_noise_alpha=ALPHA))({}, base.params, {}, batch)
    assert float(sums.loss) == pytest.approx(plain, rel=1e-6)


def test_noise_works_without_dropout(base: Base) -> None:
    assert [Decoder(base.config, neftune_noise_alpha=alpha).draws for alpha in (0.0, 1.0)] == [False, True]


def test_noise_does_not_depend_on_padding() -> None:
    def largest(length: int) -> np.ndarray:
        batch = rows(length)
        lengths = jnp.sum(jnp.asarray(batch.segment_ids) != 0, 1, keepdims=True)
        noise = embedding_noise(jax.random.key(0), jnp.zeros((2, length, 4096)), lengths, ALPHA)
        return np.abs(np.asarray(noise)).max((1, 2))

    np.testing.assert_allclose(largest(10), largest(40), rtol=1e-3)
