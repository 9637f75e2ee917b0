"""How several steps become one line of metrics.jsonl."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lora_jax.run.window import Window
from lora_jax.training.step import StepMetrics


def step(loss: float, weight: float, right: int, trained: int, finite: bool = True) -> StepMetrics:
    numbers = (np.float32(loss), np.float32(weight), np.float32(1), np.int32(trained), np.float32(right))
    return StepMetrics(*numbers, np.bool_(finite))  # pyright: ignore[reportArgumentType]


def test_mean_loss_is_weighted_and_accuracy_counts_tokens() -> None:
    window = Window(100, [])
    window.add(10, step(loss=2.0, weight=1.5, right=1, trained=8))
    window.add(20, step(loss=math.nan, weight=9, right=9, trained=9, finite=False))
    window.add(30, step(loss=4.0, weight=0.5, right=3, trained=2))
    loss, metrics = window.metrics()
    assert loss == pytest.approx((2.0 * 1.5 + 4.0 * 0.5) / 2)
    assert metrics["token_accuracy"] == pytest.approx(4 / 10)
    assert metrics["num_tokens"] == 160


def test_a_window_continues_from_stored_sums() -> None:
    first, whole = Window(0, []), Window(0, [])
    one, two = step(2.0, 3.0, 2, 4), step(1.0, 5.0, 1, 6)
    first.add(7, one)
    second = Window(7, first.sums())
    second.add(8, two)
    for metrics, tokens in ((one, 7), (two, 8)):
        whole.add(tokens, metrics)
    assert second.sums() == whole.sums()
    assert second.metrics()[0] == whole.metrics()[0]


def test_sums_of_an_older_checkpoint_have_no_weights() -> None:
    assert Window(0, [6.0, 3.0, 2.0]).sums() == [6.0, 3.0, 2.0, 3.0]


def test_a_window_of_skipped_steps_has_no_loss_and_one_of_padding_has_zero() -> None:
    skipped, padding = Window(0, []), Window(0, [])
    skipped.add(1, step(math.nan, 4, 0, 4, finite=False))
    padding.add(1, step(0.0, 0.0, 0, 0))
    assert math.isnan(skipped.metrics()[0])
    assert padding.metrics()[0] == 0
