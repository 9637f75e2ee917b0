from __future__ import annotations

import math

import pytest

from lora_jax.config import TrainOptions
from lora_jax.errors import UserError
from lora_jax.run.stopping import Goal, Patience, check_saves, goal

LOSS = Goal("eval_loss", greater_is_better=False)


def stopped_at(losses: list[float], patience: int, threshold: float = 0.0, aim: Goal = LOSS) -> int | None:
    """Return the number of the evaluation after which a run stops, or None."""
    stand = Patience(aim, patience, threshold)
    for number, loss in enumerate(losses):
        stand = stand.after({aim.metric: loss})
        if stand.over:
            return number
    return None


@pytest.mark.parametrize(
    ("losses", "patience", "threshold", "expected"),
    [
        ([3, 2, 1, 1.5, 1.2], 2, 0.0, 4),
        ([3, 2, 1, 1.5, 0.9, 1.2], 2, 0.0, None),
        ([3, 3, 3], 1, 0.0, 1),  # equal is no improvement
        ([3, 2.95, 2.9, 2.85], 2, 0.1, 2),  # each is better than the one before, none by enough
        ([1, 2, 3], 0, 0.0, None),
        ([3, math.nan, math.nan], 2, 0.0, 2),
        ([math.nan, 2, 1], 2, 0.0, None),
    ],
)
def test_a_run_stops_after_evaluations_without_improvement(
    losses: list[float], patience: int, threshold: float, expected: int | None
) -> None:
    assert stopped_at(losses, patience, threshold) == expected


def test_the_metric_determines_what_is_better() -> None:
    accuracy = Goal("eval_token_accuracy", greater_is_better=True)
    assert stopped_at([0.1, 0.2, 0.3], 1, aim=accuracy) is None
    assert stopped_at([0.3, 0.2, 0.3], 2, aim=accuracy) == 2


def test_two_numbers_hold_the_whole_patience() -> None:
    """A resumed run stops where it would have stopped anyway."""
    losses = [3.0, 2.0, 2.5, 1.9, 1.95, 1.92, 1.91]
    whole = Patience(LOSS, 3, 0.05)
    for loss in losses:
        whole = whole.after({"eval_loss": loss})
        resumed = Patience(LOSS, 3, 0.05, whole.best, whole.worse)
        assert resumed == whole
    assert whole.over


@pytest.mark.parametrize(
    ("given", "names", "expected"),
    [
        (None, [""], Goal("eval_loss", False)),
        (None, ["math", "chat"], Goal("eval_math_loss", False)),
        (None, [], Goal("eval_loss", False)),
        ("token_accuracy", [""], Goal("eval_token_accuracy", True)),
        ("eval_chat_perplexity", ["math", "chat"], Goal("eval_chat_perplexity", False)),
        ("eval_bleu", [""], Goal("eval_bleu", True)),
        ("rougeL", [""], Goal("eval_rougeL", True)),
    ],
)
def test_a_metric_is_known_by_name_with_its_direction(
    given: str | None, names: list[str], expected: Goal
) -> None:
    options = TrainOptions(metric_for_best_model=given, generation_metrics=("bleu", "rouge"))
    assert goal(options, names) == expected


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"metric_for_best_model eval_los: .*'eval_loss'.*eval_perplexity"):
        goal(TrainOptions(metric_for_best_model="eval_los"), [""])


def test_saves_must_coincide_with_evaluations_to_keep_the_best() -> None:
    options = TrainOptions(load_best_model_at_end=True, save_strategy="epoch", eval_steps=4)
    check_saves(options, 8)
    with pytest.raises(UserError, match=r"--train.eval_steps 4: must divide the 6 steps of an epoch"):
        check_saves(options, 6)
