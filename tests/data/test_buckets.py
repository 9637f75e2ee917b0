"""The lengths that steps are padded to: optimal, and no more than are worth compiling."""

from __future__ import annotations

from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data.buckets import SAVING, bucket_lengths

NEEDED = st.lists(st.integers(1, 9), min_size=1, max_size=30).map(lambda units: 64 * np.array(units))


def padded(needed: np.ndarray, lengths: tuple[int, ...]) -> np.ndarray:
    return np.array(lengths)[np.searchsorted(lengths, needed)]


def best(needed: np.ndarray, count: int, fewest: int) -> int | None:
    """The padded tokens with the best set of that many lengths, found by trying all sets."""
    values, found = np.unique(needed), []
    for lower in combinations(values[:-1].tolist(), count - 1):
        steps = padded(needed, (*lower, int(values[-1])))
        if np.unique(steps, return_counts=True)[1].min() >= fewest or count == 1:
            found.append(int(steps.sum()))
    return min(found, default=None)


@given(NEEDED, st.integers(1, 5), st.integers(1, 6))
def test_lengths_are_optimal_and_one_more_would_save_little(needed, most, fewest):
    lengths = bucket_lengths(needed, most, fewest)
    assert list(lengths) == sorted(set(lengths))
    assert len(lengths) <= most
    assert lengths[-1] == needed.max()
    used, steps = np.unique(padded(needed, lengths), return_counts=True)
    assert used.tolist() == list(lengths)
    assert len(lengths) == 1 or steps.min() >= fewest
    tokens = int(padded(needed, lengths).sum())
    assert tokens == best(needed, len(lengths), fewest)
    for count in range(1, min(most, len(np.unique(needed))) + 1):
        other = best(needed, count, fewest)
        if count > len(lengths) and other is not None:
            assert other > tokens * (1 - SAVING) ** (count - len(lengths)) - 1e-6
        if count < len(lengths) and other is not None:
            assert tokens < other


def test_steps_of_equal_length_share_a_program():
    assert bucket_lengths(np.full(100, 256), 4) == (256,)


def test_a_few_long_steps_do_not_pad_the_others():
    needed = np.array([1024] * 5 + [128] * 95)
    assert bucket_lengths(needed, 4) == (128, 1024)
    assert bucket_lengths(needed, 1) == (1024,)
    assert bucket_lengths(needed, 4, fewest=6) == (1024,)  # five steps are not worth a program


def test_a_length_that_saves_little_is_dropped():
    assert bucket_lengths(np.array([1024] * 96 + [960] * 4), 4) == (1024,)
