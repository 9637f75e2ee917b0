"""Batches: what is in them, and the order of an epoch."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data.batches import (
    Batch,
    epoch_order,
    make_batch,
    packed_batch,
    padded_length,
)
from lora_jax.data.tokens import Tokens

PADDING = 0


def row_of(ids: list[int], trained: list[bool], row: int = 1) -> Tokens:
    return Tokens(np.asarray(ids, np.int32), np.asarray(trained, bool), row)


def rows_of(lengths: list[int]) -> list[Tokens]:
    """Rows whose ids encode them: 100 * number + position."""
    return [
        row_of(
            [100 * number + place for place in range(length)], [place > 0 for place in range(length)], number
        )
        for number, length in enumerate(lengths, start=1)
    ]


def test_batch_holds_next_tokens_and_weights_of_trained_ones():
    batch = make_batch([row_of([5, 6, 7, 8], [False, False, True, True])], rows=2, length=6, padding_id=9)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 8, 9, 9], [9] * 6])
    np.testing.assert_array_equal(batch.positions, [[0, 1, 2, 3, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch.segment_ids, [[1, 1, 1, 1, 0, 0], [0] * 6])
    np.testing.assert_array_equal(batch.targets[0, :3], [6, 7, 8])
    np.testing.assert_array_equal(batch.weights, [[0, 1, 1, 0, 0, 0], [0] * 6])
    kinds = [array.dtype for array in batch]
    assert kinds == [np.int32, np.int32, np.int32, np.int32, np.float32]


def test_eos_target_keeps_its_weight_when_it_is_the_padding_id():
    batch = make_batch([row_of([5, 6, 9], [False, True, True])], rows=1, length=5, padding_id=9)
    np.testing.assert_array_equal(batch.weights, [[1, 1, 0, 0, 0]])
    assert batch.targets[0, 1] == 9


def test_rows_of_full_length_and_of_one_token_fit():
    batch = make_batch(rows_of([4, 1]), rows=2, length=4, padding_id=PADDING)
    assert batch.weights.sum(axis=1).tolist() == [3, 0]
    assert batch.segment_ids.sum(axis=1).tolist() == [4, 1]


def test_examples_in_one_row_do_not_predict_each_other():
    """Pain 13: no target of a segment is a token of the next, even if all tokens are trained."""
    first, second = row_of([5, 6, 7], [True] * 3), row_of([8, 9], [True] * 2)
    batch = packed_batch([[first, second]], rows=2, length=7, padding_id=PADDING)
    np.testing.assert_array_equal(batch.tokens[0], [5, 6, 7, 8, 9, 0, 0])
    np.testing.assert_array_equal(batch.positions[0], [0, 1, 2, 0, 1, 0, 0])
    np.testing.assert_array_equal(batch.segment_ids[0], [1, 1, 1, 2, 2, 0, 0])
    np.testing.assert_array_equal(batch.weights[0], [1, 1, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(batch.targets[0, [0, 1, 3]], [6, 7, 9])


def test_targets_have_the_weight_of_their_row():
    heavy = Tokens(np.arange(4, dtype=np.int32), np.array([False, False, True, True]), 1, weight=2.5)
    batch = packed_batch([[heavy, row_of([1, 2], [False, True])]], rows=1, length=6, padding_id=PADDING)
    np.testing.assert_array_equal(batch.weights, [[0, 2.5, 2.5, 0, 1, 0]])


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit in a length of 3"):
        make_batch(rows_of([4]), rows=1, length=3, padding_id=PADDING)
    with pytest.raises(ValueError, match="do not fit in 1 rows"):
        make_batch(rows_of([1, 1]), rows=1, length=3, padding_id=PADDING)


@given(st.lists(st.integers(1, 9), max_size=5), st.integers(0, 3), st.integers(0, 5))
def test_padding_adds_nothing_but_padding(lengths, more_rows, more_length):
    examples = rows_of(lengths)
    tight = make_batch(examples, len(lengths), 9, PADDING)
    loose = make_batch(examples, len(lengths) + more_rows, 9 + more_length, PADDING)
    for name, small, large in zip(Batch._fields, tight, loose, strict=True):
        np.testing.assert_array_equal(large[: len(lengths), :9], small, err_msg=name)
        assert not large[len(lengths) :].any()
        assert not large[:, 9:].any()
    assert tight.weights.sum() == sum(example.trained[1:].sum() for example in examples)


@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([1, 8, 64, 128]))
def test_padded_length_is_the_smallest_multiple_within_the_limit(longest, max_length, multiple):
    found = padded_length(longest, max_length, multiple)
    assert found >= longest
    assert found < longest + multiple
    assert found % multiple == 0 or found in (longest, max_length)


@given(st.integers(1, 200), st.integers(-(2**40), 2**40), st.integers(0, 100))
def test_order_of_an_epoch_is_a_permutation(rows, seed, epoch):
    assert sorted(epoch_order(rows, seed, epoch)) == list(range(rows))


ORDER_42 = [4, 1, 3, 6, 0, 7, 2, 5]


def test_order_differs_by_epoch_and_seed_and_never_changes():
    assert epoch_order(8, 42, 0).tolist() != epoch_order(8, 42, 1).tolist()
    assert epoch_order(8, 42, 0).tolist() != epoch_order(8, 43, 0).tolist()
    assert epoch_order(8, 42, 0).tolist() == ORDER_42
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(8, 42, 0)[0] = 3
