"""Which evaluation is best, and when to stop: functions of the metrics so far, so that a resumed run decides alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lora_jax.config import TrainOptions
from lora_jax.errors import Option, UserError, listing, nearest
from lora_jax.run.scores import score_names
from lora_jax.run_folder import EVALUATED, metric_name

EVAL_METRICS = ("loss", "perplexity", "token_accuracy")
"""Metrics that are evaluated on each set."""


@dataclass(frozen=True)
class Goal:
    """The metric that evaluations are compared by."""

    metric: str
    greater_is_better: bool

    def better(self, value: float, than: float, by: float = 0.0) -> bool:
        """Return whether a value is better than another by more than `by`."""
        ahead = value - than if self.greater_is_better else than - value
        return ahead > by


def goal(train: TrainOptions, names: Sequence[str]) -> Goal:
    """Return the metric to compare, eval_loss by default; `names` are the sets. Raises UserError for an unknown one."""
    known = [
        metric_name(name, metric)
        for name in names or ("",)
        for metric in (*EVAL_METRICS, *score_names(train.generation_metrics))
    ]
    metric = train.metric_for_best_model or known[0]
    metric = metric if metric.startswith(EVALUATED) else f"{EVALUATED}{metric}"
    if metric not in known:
        raise UserError(
            f"{Option('train.metric_for_best_model', train.metric_for_best_model)}: is not a metric of this run;"
            f"{nearest(metric, known)} Metrics: {listing(known)}"
        )
    return Goal(metric, not metric.endswith(("loss", "perplexity")))


def check_saves(train: TrainOptions, steps_per_epoch: int) -> None:
    """Raise UserError if the best checkpoint is asked for but checkpoints do not coincide with evaluations."""
    if train.load_best_model_at_end and train.save_strategy == "epoch" and steps_per_epoch % train.eval_steps:
        raise UserError(
            f"{Option('train.eval_steps', train.eval_steps)}: must divide the {steps_per_epoch} steps of an epoch for "
            f"{Option('train.load_best_model_at_end')} with {Option('train.save_strategy', 'epoch')}"
        )


@dataclass(frozen=True)
class Patience:
    """The best metric so far, including that before the first step, and evaluations in a row without improvement.

    As in transformers' EarlyStoppingCallback, an improvement by no more than the threshold does not count, but becomes
    the value to beat.
    """

    goal: Goal
    patience: int
    threshold: float
    best: float | None = None
    worse: int = 0

    def after(self, metrics: Mapping[str, float]) -> Patience:
        """Return the count after an evaluation; a metric that is NaN is no improvement."""
        value = metrics[self.goal.metric]
        if math.isnan(value):
            return replace(self, worse=self.worse + 1)
        if self.best is None:
            return replace(self, best=value)
        worse = 0 if self.goal.better(value, self.best, self.threshold) else self.worse + 1
        best = value if self.goal.better(value, self.best) else self.best
        return replace(self, best=best, worse=worse)

    @property
    def over(self) -> bool:
        """Whether the run stops here."""
        return 0 < self.patience <= self.worse
