"""When a run ends early, beside transformers' EarlyStoppingCallback."""

import numpy as np
import pytest
from transformers import TrainingArguments
from transformers.trainer_callback import EarlyStoppingCallback, TrainerControl, TrainerState

from lora_jax.run.stopping import Goal, Patience


@pytest.mark.parametrize("greater", [False, True])
@pytest.mark.parametrize(("patience", "threshold"), [(1, 0.0), (3, 0.0), (2, 0.3)])
def test_the_same_evaluation_ends_a_run(
    greater: bool, patience: int, threshold: float, tmp_path: object
) -> None:
    goal = Goal("eval_score", greater)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), metric_for_best_model="score", greater_is_better=greater, report_to=[]
    )
    ends = []
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=12).cumsum().round(1).tolist()
        callback, state, control = (
            EarlyStoppingCallback(patience, threshold),
            TrainerState(),
            TrainerControl(),
        )
        stand, ours, theirs = Patience(goal, patience, threshold), None, None
        for number, value in enumerate(values):
            callback.on_evaluate(arguments, state, control, {"eval_score": value})
            if state.best_metric is None or (
                value > state.best_metric if greater else value < state.best_metric
            ):
                state.best_metric = value  # as the trainer does after its callbacks
            stand = stand.after({"eval_score": value})
            ours = number if ours is None and stand.over else ours
            theirs = number if theirs is None and control.should_training_stop else theirs
        assert ours == theirs
        ends.append(ours)
    assert len(set(ends)) > 2
