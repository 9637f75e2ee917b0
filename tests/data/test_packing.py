"""Packing: each token of each row once, in few bins."""

from __future__ import annotations

import time
from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.config import DataOptions
from lora_jax.data.packing import best_fit_decreasing, pack, packs
from lora_jax.data.tokens import Tokens

CAPACITY = 40
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60).map(np.array)


def rows_of(lengths: np.ndarray) -> list[Tokens]:
    """Rows whose tokens encode their row and position; all but the first are trained."""
    return [
        Tokens(1000 * row + np.arange(length, dtype=np.int32), np.arange(length) > 0, row + 1)
        for row, length in enumerate(lengths)
    ]


def one_by_one(lengths: np.ndarray, capacity: int) -> list[int]:
    """Best-fit decreasing by its definition, with the remaining space of each bin."""
    spaces: list[int] = []
    for length in sorted(lengths.tolist(), reverse=True):
        fitting = [space for space in spaces if space >= length]
        space = min(fitting, default=capacity)
        if fitting:
            spaces.remove(space)
        spaces.append(space - length)
    return sorted(spaces)


@given(LENGTHS, st.sampled_from(["none", "bfd", "wrapped"]))
def test_every_token_is_in_one_bin_and_no_bin_is_too_long(lengths, packing):
    bins, rows = pack(lengths, packing, CAPACITY), rows_of(lengths)
    examples = [bins.examples(rows, index) for index in range(len(bins))]
    assert [sum(map(len, pieces)) for pieces in examples] == bins.lengths.tolist()
    assert bins.lengths.max() <= CAPACITY
    found = np.concatenate([piece.input_ids for pieces in examples for piece in pieces])
    expected = np.concatenate([row.input_ids for row in rows])
    np.testing.assert_array_equal(np.sort(found), np.sort(expected))


@given(LENGTHS, st.sampled_from(["none", "bfd"]))
def test_only_wrapping_cuts_rows(lengths, packing):
    bins = pack(lengths, packing, CAPACITY)
    assert not bins.starts.any()
    np.testing.assert_array_equal(bins.sizes, lengths[bins.rows])
    np.testing.assert_array_equal(np.sort(bins.rows), np.arange(len(lengths)))


@given(LENGTHS)
def test_best_fit_decreasing_by_length_equals_one_row_at_a_time(lengths):
    bin_of = best_fit_decreasing(lengths, CAPACITY)
    filled = np.bincount(bin_of, lengths).astype(int)
    assert sorted((CAPACITY - filled).tolist()) == one_by_one(lengths, CAPACITY)
    assert (
        len(filled) <= 11 / 9 * ceil(lengths.sum() / CAPACITY) * 2
    )  # the optimum is at most twice the volume


@given(st.lists(st.integers(1, 3 * CAPACITY), min_size=1, max_size=40).map(np.array))
def test_wrapping_fills_all_bins_but_the_last_and_keeps_the_order(lengths):
    bins, rows = pack(lengths, "wrapped", CAPACITY), rows_of(lengths)
    assert len(bins) == ceil(lengths.sum() / CAPACITY)
    assert set(bins.lengths[:-1]) <= {CAPACITY}
    pieces = [piece for index in range(len(bins)) for piece in bins.examples(rows, index)]
    np.testing.assert_array_equal(
        np.concatenate([piece.input_ids for piece in pieces]), np.concatenate([row.input_ids for row in rows])
    )
    assert bins.lost_targets(rows) == len(pieces) - len(rows)


def test_a_piece_that_starts_inside_its_row_loses_its_first_target():
    rows = rows_of(np.array([3, 5, 4]))
    rows[2] = Tokens(rows[2].input_ids, np.array([False, False, True, True]), 3)
    bins = pack(np.array([3, 5, 4]), "wrapped", 5)  # 3 + 2, 3 + 2, 2
    assert bins.starts.tolist() == [0, 0, 2, 0, 2]
    assert bins.lost_targets(rows) == 2
    shared = "wrapped: 3 rows share 3 of at most 5 tokens"
    assert bins.summary("wrapped", rows) == f"{shared}; 2 trained tokens after a cut are not targets"
    rows[2] = Tokens(rows[2].input_ids, np.array([False, True, False, True]), 3)
    assert bins.lost_targets(rows) == 1


@pytest.mark.parametrize("packing", ["bfd", "wrapped"])
def test_a_hundred_thousand_rows_are_packed_in_a_second(packing):
    lengths = np.clip(np.random.default_rng(0).lognormal(5.3, 0.7, 100_000).astype(int) + 1, 1, 1024)
    started = time.process_time()
    bins = pack(lengths, packing, 1024)
    assert time.process_time() - started < 1
    assert bins.lengths.sum() == lengths.sum()
    assert len(bins) <= 1.01 * lengths.sum() / 1024 + 1


@pytest.mark.parametrize("lengths", [[5, 0], [5, 9]])
def test_rows_that_fit_no_bin_are_refused(lengths):
    with pytest.raises(ValueError, match="do not fit in bins of 8"):
        best_fit_decreasing(np.array(lengths), 8)


def test_a_run_is_packed_if_training_or_evaluation_is():
    assert [
        packs(DataOptions(packing=training, eval_packing=evaluation))
        for training, evaluation in (
            ("none", None),
            ("none", "none"),
            ("bfd", None),
            ("none", "bfd"),
            ("wrapped", "none"),
        )
    ] == [False, False, True, True, True]
