"""Batches: what is in them, and that the step alone decides it."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data.batches import (
    Batch,
    epoch_order,
    eval_batches,
    make_batch,
    padded_length,
    step_batch,
    steps_per_epoch,
    tokens_before,
)
from lora_jax.data.tokens import Tokens

PADDING = 0


def row_of(ids: list[int], trained: list[bool], row: int = 1) -> Tokens:
    return Tokens(np.asarray(ids, np.int32), np.asarray(trained, bool), row)


def rows_of(lengths: list[int]) -> list[Tokens]:
    """Rows whose ids name them: 100 * number + place."""
    return [
        row_of(
            [100 * number + place for place in range(length)], [place > 0 for place in range(length)], number
        )
        for number, length in enumerate(lengths, start=1)
    ]


def real_rows(batch: Batch) -> list[int]:
    """Numbers of the rows in a batch of `rows_of`, in order."""
    first = batch.tokens[..., 0].ravel()
    return [
        int(number) // 100
        for number, used in zip(first, batch.segment_ids[..., 0].ravel(), strict=True)
        if used
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


def test_row_of_full_length_and_row_of_one_token_fit():
    batch = make_batch(rows_of([4, 1]), rows=2, length=4, padding_id=PADDING)
    assert batch.weights.sum(axis=1).tolist() == [3, 0]
    assert batch.segment_ids.sum(axis=1).tolist() == [4, 1]


def test_what_does_not_fit_is_refused():
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
def test_padded_length_is_the_least_multiple_within_the_limit(longest, max_length, multiple):
    found = padded_length(longest, max_length, multiple)
    assert found >= longest
    assert found < longest + multiple
    assert found % multiple == 0 or found in (longest, max_length)


@given(st.integers(1, 200), st.integers(-(2**40), 2**40), st.integers(0, 100))
def test_order_of_an_epoch_is_a_permutation(rows, seed, epoch):
    assert sorted(epoch_order(rows, seed, epoch)) == list(range(rows))


ORDER_42 = [4, 1, 3, 6, 0, 7, 2, 5]


def test_order_differs_by_epoch_and_seed_and_is_the_same_for_all_time():
    assert epoch_order(8, 42, 0).tolist() != epoch_order(8, 42, 1).tolist()
    assert epoch_order(8, 42, 0).tolist() != epoch_order(8, 43, 0).tolist()
    assert epoch_order(8, 42, 0).tolist() == ORDER_42
    with pytest.raises(ValueError, match="read-only"):
        epoch_order(8, 42, 0)[0] = 3


SIZES = SimpleNamespace(batch=2, accumulation=3, length=8)


def batch_of_step(dataset, step, seed=1):
    return step_batch(
        dataset,
        step,
        seed=seed,
        batch=SIZES.batch,
        accumulation=SIZES.accumulation,
        length=SIZES.length,
        padding_id=PADDING,
    )


@given(rows=st.integers(1, 30), epoch=st.integers(0, 3))
def test_epoch_sees_each_row_once_in_the_order_of_the_epoch(rows, epoch):
    dataset = rows_of([1 + i % 8 for i in range(rows)])
    steps = steps_per_epoch(rows, 6)
    seen = [number for i in range(steps) for number in real_rows(batch_of_step(dataset, epoch * steps + i))]
    assert seen == [int(i) + 1 for i in epoch_order(rows, 1, epoch)]


def test_batch_of_a_step_is_the_same_whatever_came_before():
    dataset = rows_of([3, 5, 8, 1, 2, 7, 4, 6, 3, 2])
    forward = [batch_of_step(dataset, step) for step in range(6)]
    backward = [batch_of_step(dataset, step) for step in reversed(range(6))][::-1]
    for one, other in zip(forward, backward, strict=True):
        for first, second in zip(one, other, strict=True):
            np.testing.assert_array_equal(first, second)


def test_every_step_has_the_same_shape_and_the_last_is_filled_with_padding():
    dataset = rows_of([3, 5, 8, 1, 2, 7, 4])
    first, last = batch_of_step(dataset, 0), batch_of_step(dataset, 1)
    assert {array.shape for batch in (first, last) for array in batch} == {(3, 2, 8)}
    assert len(real_rows(first)) == 6
    assert len(real_rows(last)) == 1
    assert last.weights[1:].sum() == 0


def test_accumulation_splits_the_same_rows():
    dataset = rows_of([3, 5, 8, 1, 2, 7, 4])
    whole = step_batch(dataset, 0, seed=1, batch=6, accumulation=1, length=8, padding_id=PADDING)
    for one, other in zip(whole, batch_of_step(dataset, 0), strict=True):
        np.testing.assert_array_equal(one.reshape(6, 8), other.reshape(6, 8))


def test_evaluation_sees_every_row_once_in_order():
    dataset = rows_of([3, 5, 8, 1, 2])
    batches = list(eval_batches(dataset, batch=2, length=8, padding_id=PADDING))
    assert [real_rows(batch) for batch in batches] == [[1, 2], [3, 4], [5]]
    assert {array.shape for batch in batches for array in batch} == {(2, 8)}


@given(st.lists(st.integers(2, 9), min_size=1, max_size=12), st.integers(0, 20), st.integers(1, 5))
def test_tokens_before_a_step_are_those_of_the_batches_before_it(
    lengths: list[int], step: int, rows: int
) -> None:
    dataset = rows_of(lengths)
    batches = (
        step_batch(dataset, past, seed=3, batch=rows, accumulation=1, length=9, padding_id=PADDING)
        for past in range(step)
    )
    seen = sum(int(np.count_nonzero(batch.segment_ids)) for batch in batches)
    assert tokens_before(np.array([len(row) for row in dataset]), step, seed=3, rows_per_step=rows) == seen
