"""Plans of steps: each row once per epoch, independent of processes, and determined by the step number."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_jax.data.batches import Batch, epoch_order
from lora_jax.data.steps import Shaping, StepPlan, step_batch
from lora_jax.data.tokens import Tokens

PER_STEP, MAX_LENGTH = 6, 40
SHAPING = {"packing": "none", "max_length": MAX_LENGTH, "most": 3, "multiple": 8, "parts": 1}
LENGTHS = st.lists(st.integers(2, MAX_LENGTH), min_size=1, max_size=60).map(np.array)
PACKINGS = st.sampled_from(["none", "bfd", "wrapped"])


def plan_of(lengths: np.ndarray, per_step: int = PER_STEP, seed: int | None = 1, **shaping: Any) -> StepPlan:
    return Shaping(**(SHAPING | shaping)).plan(lengths, per_step, seed, epochs=100)


def rows_of(lengths: np.ndarray) -> list[Tokens]:
    """Rows whose tokens encode their row and position; all but the first are trained."""
    return [
        Tokens(1000 * (row + 1) + np.arange(length, dtype=np.int32), np.arange(length) > 0, row + 1)
        for row, length in enumerate(lengths)
    ]


def batch_of(dataset: list[Tokens], plan: StepPlan, step: int, passes: int = 1, part: Any = None) -> Batch:
    return step_batch(dataset, plan, step, accumulation=passes, padding_id=0, part=part)


def tokens_of(batch: Batch) -> list[int]:
    return batch.tokens[batch.segment_ids > 0].tolist()


@given(LENGTHS, PACKINGS, st.integers(0, 3), st.sampled_from([1, 3]))
def test_epoch_sees_every_token_once_and_no_step_is_too_long(lengths, packing, epoch, most):
    dataset, plan = rows_of(lengths), plan_of(lengths, packing=packing, most=most)
    steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
    batches = [batch_of(dataset, plan, step) for step in steps]
    seen = [token for batch in batches for token in tokens_of(batch)]
    assert sorted(seen) == sorted(token for row in dataset for token in row.input_ids.tolist())
    for step, batch in zip(steps, batches, strict=True):
        assert batch.tokens.shape == (1, PER_STEP, plan.at(step).length)
        assert plan.at(step).tokens == len(tokens_of(batch))
        assert plan.rows_of(step) == sorted({token // 1000 - 1 for token in tokens_of(batch)})
    assert [len(plan.at(step).bins) for step in steps[:-1]] == [PER_STEP] * (len(steps) - 1)
    widths = np.unique([batch.tokens.shape[-1] for batch in batches], return_counts=True)
    assert dict(zip(*(found.tolist() for found in widths), strict=True)) == plan.steps_by_length


@given(LENGTHS, PACKINGS, st.integers(0, 30))
def test_counts_before_a_step_equal_those_of_earlier_batches(lengths, packing, step):
    dataset, plan = rows_of(lengths), plan_of(lengths, packing=packing)
    before = [batch_of(dataset, plan, past) for past in range(step)]
    real, computed = (
        sum(len(tokens_of(batch)) for batch in before),
        sum(batch.tokens.size for batch in before),
    )
    assert plan.tokens_before(step) == real
    assert plan.padding_before(step) == pytest.approx(1 - real / computed if step else 0)
    assert (
        plan.lengths_of(range(step, step + 5))
        == sorted({plan.at(s).length for s in range(step, step + 5)})[::-1]
    )


@given(LENGTHS, PACKINGS, st.integers(0, 8))
def test_a_step_depends_neither_on_passes_nor_on_processes(lengths, packing, step):
    """Pain 11: the rows of a step do not depend on how it is split, and neither does their length."""
    dataset, plan = rows_of(lengths), plan_of(lengths, packing=packing)
    whole = batch_of(dataset, plan, step)
    for passes in (2, 3, 6):
        for one, other in zip(batch_of(dataset, plan, step, passes), whole, strict=True):
            np.testing.assert_array_equal(one.reshape(other.shape), other)
    halves = [batch_of(dataset, plan, step, 3, part) for part in ([0], [1])]
    for first, second, other in zip(*halves, whole, strict=True):
        joined = np.concatenate((first, second), axis=1)
        np.testing.assert_array_equal(joined.reshape(other.shape), other)


@given(LENGTHS, PACKINGS)
def test_a_plan_is_the_same_for_every_process_and_history(lengths, packing):
    one, other = plan_of(lengths, packing=packing), plan_of(lengths, packing=packing)
    steps = range(3 * one.steps_per_epoch)
    backward = [other.at(step) for step in reversed(steps)][::-1]
    for step, found in zip(steps, backward, strict=True):
        np.testing.assert_array_equal(one.at(step).bins, found.bins)
        assert one.at(step)[1:] == found[1:]


@given(LENGTHS)
def test_sequence_parallelism_changes_only_a_steps_length(lengths):
    one, cut = plan_of(lengths), plan_of(lengths, parts=3)
    for step in range(2 * one.steps_per_epoch):
        np.testing.assert_array_equal(one.at(step).bins, cut.at(step).bins)
        assert cut.at(step).length == -(-one.at(step).length // 3) * 3


def test_with_one_length_the_order_is_the_epochs():
    plan = plan_of(np.full(20, 7))
    for epoch in (0, 1):
        steps = range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
        seen = np.concatenate([plan.at(step).bins for step in steps])
        np.testing.assert_array_equal(seen, epoch_order(20, 1, epoch))


LONG_TAILED = np.random.default_rng(3).integers(2, 17, 600)
LONG_TAILED[::10] = 40


def test_lengths_are_shuffled_differently_in_every_epoch():
    plan = plan_of(LONG_TAILED)
    assert list(plan.steps_by_length) == [8, 16, 40]
    count = plan.steps_per_epoch
    lengths = [
        [plan.at(step).length for step in range(epoch * count, (epoch + 1) * count)] for epoch in (0, 1)
    ]
    assert lengths[0] != lengths[1]
    assert sorted(lengths[0]) == sorted(lengths[1])
    assert [epoch[0] for epoch in lengths] == [40, 40]
    assert 40 in lengths[0][count // 2 :]
    assert set(plan.at(0).bins) != set(plan.at(count).bins)


def test_rows_in_a_bucket_are_not_sorted():
    """A step's rows are drawn from its whole bucket, not from rows of similar length."""
    plan = plan_of(LONG_TAILED, most=2)
    spreads = [np.ptp(LONG_TAILED[step.bins]) for step in map(plan.at, range(100)) if step.length == 16]
    assert np.mean(spreads) > 8


def test_buckets_save_padding_and_short_runs_have_fewer():
    one = plan_of(LONG_TAILED, most=1)
    assert plan_of(LONG_TAILED).padding < 0.7 * one.padding
    shaping = Shaping(**SHAPING)
    numbers = [len(shaping.plan(LONG_TAILED, PER_STEP, 1, steps=steps).buckets) for steps in (4, 10, 1000)]
    assert numbers == [1, 2, 3]


def test_evaluation_takes_each_row_once_by_length():
    lengths = np.array([3, 30, 5, 8, 17, 2, 33])
    plan = plan_of(lengths, per_step=2, seed=None)
    taken = [plan.at(step) for step in range(plan.steps_per_epoch)]
    assert sorted(np.concatenate([step.bins for step in taken]).tolist()) == list(range(7))
    found = [step.length for step in taken]
    assert found == sorted(found, reverse=True)


def test_summary_counts_steps_by_length_and_padding():
    plan = plan_of(np.array([8] * 12 + [40] * 6))
    assert plan.summary() == "8 x 2 steps, 40 x 1 steps per epoch; 0.0% padding"
