"""Choosing a token: greedy, and sampling with temperature, top-k and top-p."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.generate.sampling import Sampling, choose, keep_top_k, keep_top_p, penalize

PROBABILITIES = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
LOGITS = jnp.log(jnp.asarray(PROBABILITIES, jnp.float32))[None]
DRAWS = 20_000


def kept(logits: jax.Array) -> list[int]:
    return np.flatnonzero(np.isfinite(np.asarray(logits[0]))).tolist()


def frequencies(sampling: Sampling) -> np.ndarray:
    """Return how often each token is sampled."""
    drawn = choose(jax.random.key(0), jnp.repeat(LOGITS, DRAWS, axis=0), sampling)
    return np.bincount(np.asarray(drawn), minlength=LOGITS.shape[1]) / DRAWS


def test_temperature_zero_takes_the_most_likely_and_the_first_of_equals() -> None:
    logits = jnp.asarray([[0.0, 2.0, 1.0], [3.0, 1.0, 3.0]])
    assert choose(jax.random.key(0), logits, Sampling(top_k=1, top_p=0.1)).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_samples_follow_the_softmax_of_the_scaled_logits(temperature: float) -> None:
    expected = PROBABILITIES ** (1 / temperature)
    np.testing.assert_allclose(frequencies(Sampling(temperature)), expected / expected.sum(), atol=0.015)


def test_remaining_tokens_keep_their_proportions() -> None:
    expected = np.where(PROBABILITIES >= 0.3, PROBABILITIES, 0) / 0.7
    np.testing.assert_allclose(frequencies(Sampling(1.0, top_k=2)), expected, atol=0.015)
    np.testing.assert_allclose(frequencies(Sampling(1.0, top_p=0.6)), expected, atol=0.015)


def test_temperature_comes_before_top_p() -> None:
    # At temperature 2 the most likely token has less than 0.4 of the probability, at 1 exactly as much.
    assert np.count_nonzero(frequencies(Sampling(1.0, top_p=0.39))) == 1
    assert np.count_nonzero(frequencies(Sampling(2.0, top_p=0.39))) == 2


@pytest.mark.parametrize(
    ("k", "expected"), [(1, [1]), (2, [1, 3]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_the_k_largest(k: int, expected: list[int]) -> None:
    assert kept(keep_top_k(LOGITS, k)) == expected


def test_top_k_keeps_ties_with_the_last() -> None:
    assert kept(keep_top_k(jnp.asarray([[1.0, 3.0, 1.0, 0.0]]), 2)) == [0, 1, 2]


@pytest.mark.parametrize(
    ("p", "expected"), [(0.01, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]), (0.84, [1, 3, 4])]
)
def test_top_p_keeps_the_token_that_passes_p(p: float, expected: list[int]) -> None:
    assert kept(keep_top_p(LOGITS, p)) == expected


@given(st.lists(st.floats(-5, 5, width=32), min_size=8, max_size=8, unique=True), st.floats(0.01, 0.99))
def test_top_p_keeps_the_smallest_set_of_most_likely_tokens(values: list[float], p: float) -> None:
    logits = jnp.asarray([values], jnp.float32)
    probabilities = np.asarray(jax.nn.softmax(logits[0])).astype(np.float64)
    chosen = kept(keep_top_p(logits, p))
    left_out = np.delete(probabilities, chosen)
    assert probabilities[chosen].min() >= left_out.max(initial=0)
    assert probabilities[chosen].sum() >= p - 1e-5
    assert probabilities[chosen].sum() - probabilities[chosen].min() <= p + 1e-5


def test_penalty_makes_seen_tokens_less_likely_whatever_their_sign() -> None:
    logits = jnp.asarray([[2.0, -2.0, 2.0, -2.0]])
    seen = jnp.asarray([[True, True, False, False]])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 2.0, -2.0]]
    assert penalize(logits, seen, 1.0).tolist() == logits.tolist()
