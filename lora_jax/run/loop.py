"""The training loop: steps, logging, evaluation, checkpoints, and stopping on request."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax

from lora_jax.errors import Option, UserError, switch
from lora_jax.hub.tokenizer import padding_token_id
from lora_jax.parallel.processes import same_in_all, writes
from lora_jax.progress import at, stage
from lora_jax.run.checkpoints import Checkpoints, Progress
from lora_jax.run.evaluation import Evaluation, Evaluator
from lora_jax.run.journal import Journal
from lora_jax.run.profile import Profiler
from lora_jax.run.reporter import TRAINING
from lora_jax.run.setup import Run
from lora_jax.run.signals import Interrupted, Signals
from lora_jax.run.stopping import Goal, Patience
from lora_jax.run.warnings import broken_base
from lora_jax.run.window import Window
from lora_jax.training.feed import Feed, Sizes
from lora_jax.training.programs import Programs
from lora_jax.training.skipped import Skipped, places
from lora_jax.training.step import TrainState
from lora_jax.types import Object


@dataclass(frozen=True)
class Training:
    """What the loop runs: a run, the sizes of its steps, the step, the evaluator, and the goal."""

    run: Run
    sizes: Sizes
    step: Programs
    evaluator: Evaluator
    goal: Goal


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: state to export, metrics before and after, tokens seen, the signal that stopped it if any.

    Metrics are those of the evaluation before the first step, and those of the exported state.
    """

    state: TrainState
    before: Mapping[str, float]
    after: Mapping[str, float]
    num_tokens: int
    stopped_by: int | None
    steps: int
    """Number of steps trained, even if the state of an earlier step is exported."""

    @property
    def eval_before(self) -> float | None:
        """The first set's loss before the first step, or None if it was not evaluated."""
        return _loss(self.before)

    @property
    def eval_after(self) -> float | None:
        """The first set's loss for the exported state, or None if it was not evaluated."""
        return _loss(self.after)

    @property
    def results(self) -> dict[str, float]:
        """Final metrics: those of the exported state, and under NAME_before those before the first step."""
        before = {f"{name}_before": value for name, value in self.before.items()}
        found = {"num_tokens": self.num_tokens, **before, **self.after}
        return {name: value for name, value in found.items() if math.isfinite(value)}


class Loop:
    """One run's training loop."""

    def __init__(
        self,
        training: Training,
        journal: Journal,
        checkpoints: Checkpoints,
        signals: Signals,
        profiler: Profiler,
    ) -> None:
        self.run, self.sizes, self.options = training.run, training.sizes, training.run.config.train
        self.train_step, self.evaluator, self.goal = training.step, training.evaluator, training.goal
        self.journal, self.checkpoints, self.signals, self.profiler = journal, checkpoints, signals, profiler
        padding_id = padding_token_id(self.run.tokenizer, self.run.model_config.vocab_size)
        self.feed = Feed(self.run.train_rows, self.sizes, self.run.mesh, padding_id)
        self.state: TrainState | None = None
        """State after the last step, once there is one."""

    @stage(TRAINING)
    def train(self, state: TrainState, progress: Progress | None = None) -> Outcome:
        """Run from the state's step to the last, until the run stops early, or until SIGINT or SIGTERM.

        Saves checkpoints as the options say. `progress` is what the checkpoint holds besides the state. Raises
        UserError if a checkpoint cannot be written, and if too many steps in a row are not finite.
        """
        first = int(state.step)
        self._before_steps(first, state, progress or Progress([]))
        self.signals.compiling()
        stopped: int | None = None
        for step in range(first + 1, self.sizes.steps + 1):
            if self.patience.over:
                break
            state = self._step(step, state)
            try:
                value = self._log(step, state)
            except Interrupted as told:
                stopped = told.number
                break
            self._check_finite(step, state)
            received = self.signals.received()
            self._save_if_due(step, state, value, told=received is not None)
            if received is not None and not self._is_last(step):
                stopped = received
                break
            self.checkpoints.check()
        if stopped is None and 0 < self.sizes.steps == self.skipped.total:
            self._save(state)
            raise self._nonfinite_error(range(1, self.sizes.steps + 1), self.sizes.steps)
        return self._outcome(state, stopped)

    def _before_steps(self, first: int, state: TrainState, progress: Progress) -> None:
        """Restore the checkpoint's counts, warn, evaluate if that is due, and compile everything that steps run."""
        options, window = self.options, progress.window
        self.skipped = Skipped(options.max_nonfinite_steps, progress.skipped, progress.skipped_in_a_row)
        patience, threshold = options.early_stopping_patience, options.early_stopping_threshold
        self.patience = Patience(self.goal, patience, threshold, progress.best, progress.worse)
        self.journal.warn(self.journal.warnings.before_training(self.sizes))
        self.journal.warnings.compile(state.trainable)
        if first == 0 and options.eval_on_start:
            self._evaluate_start(state)
        elif progress.unlogged is not None:
            self._repeat_evaluation(progress.unlogged, state)
            window = []
        elif first < self.sizes.steps and not self.patience.over:
            self.evaluator.compile(state.trainable)  # an evaluation at the start has compiled already
        if first < self.sizes.steps and not self.patience.over:
            shapes = self.feed.shapes(first + 1)
            self.train_step.compile(state, self.run.frozen, self.run.adapter, batches=shapes)
        self.window = Window(self.feed.tokens_before(first + 1), window)

    def _evaluate_start(self, state: TrainState) -> None:
        evaluation = self.evaluator(state.trainable)
        base_loss = None
        if evaluation.metrics and self.run.config.lora.init_from is not None:
            base_loss = self.evaluator.base_loss()
        self._update_patience(evaluation)
        self.journal.start(evaluation, base_loss)

    def _repeat_evaluation(self, entry: Object, state: TrainState) -> None:
        """Repeat the evaluation that a signal interrupted, and write its line."""
        step, evaluation = int(state.step), self.evaluator(state.trainable)
        self._update_patience(evaluation)
        self.journal.write(entry, state.trainable, evaluation, self._is_last(step))
        if self._save_due(step) or (step == self.sizes.steps and self.options.save_strategy != "no"):
            # The checkpoint may turn out to be the best, as if the run had not been stopped.
            self.checkpoints.measured(step, evaluation.metrics.get(self.goal.metric))

    def _step(self, step: int, state: TrainState) -> TrainState:
        """Queue a step, and return the state after it."""
        self.profiler.before(step)
        at(f"step {step}/{self.sizes.steps}")
        batch = self.feed.batch(step)
        state, metrics = self.train_step(state, self.run.frozen, self.run.adapter, batch)
        self.state = state
        self.signals.stepping()
        self.window.add(self.feed.tokens(step), metrics)
        self.skipped.add(step, metrics)
        self.profiler.after(step, metrics)
        self.journal.reporter.at(step)
        return state

    def _log(self, step: int, state: TrainState) -> float | None:
        """Log and evaluate a step if that is due; return the metric that decides, if it was evaluated.

        Raises Interrupted, after saving the state, if a signal interrupts the evaluation.
        """
        evaluates = self._eval_due(step)
        if not evaluates and not self._log_due(step):
            return None
        self.skipped.read()
        # Before the evaluation, so that its time is not counted as the step's.
        entry = self.journal.entry(step, self.window, self.skipped, self.feed.padding(step))
        if evaluates:
            self._check_finite(step, state, unlogged=entry)
        try:
            evaluation = self.evaluator(state.trainable) if evaluates else Evaluation()
        except Interrupted:
            self._save(state, entry)
            raise
        self._update_patience(evaluation)
        self.journal.write(entry, state.trainable, evaluation, self._is_last(step))
        self.window.restart()
        return evaluation.metrics.get(self.goal.metric)

    def _update_patience(self, evaluation: Evaluation) -> None:
        if evaluation.metrics:
            self.patience = self.patience.after(evaluation.metrics)

    def _check_finite(self, step: int, state: TrainState, unlogged: Object | None = None) -> None:
        """If too many steps in a row were not finite, save and raise UserError."""
        if self.skipped.too_many:
            self._save(state, unlogged)
            raise self._nonfinite_error(self.skipped.too_many, step)

    def _nonfinite_error(self, steps: range, saved: int) -> UserError:
        """Return the error for steps in a row that were not finite, after the state is saved."""
        self.signals.finishing()
        rows = [row for step in steps for row in self.feed.rows_of(step)]
        behind = ""
        if saved < self.sizes.steps:
            behind = (
                f", or continue after them with {switch('resume')}: step {saved} is saved, unchanged by the skipped "
                "steps"
            )
        which = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        cause = broken_base(self.run) or f"check those rows or lower {Option('train.learning_rate')}"
        return UserError(
            f"loss or gradient not finite in {which}, on {places(self.run.train_rows, rows)}; {cause}{behind}"
        )

    def _save_if_due(self, step: int, state: TrainState, value: float | None, told: bool) -> None:
        """Save if a signal, the options or the end of the run require it; `value` is the metric at this step."""
        at_end = self._is_last(step) and self.options.save_strategy != "no"
        if told or self._save_due(step) or at_end:
            self._save(state, value=value)

    def _save(self, state: TrainState, unlogged: Object | None = None, value: float | None = None) -> None:
        self.journal.logs.sync()  # resuming needs all lines up to the checkpoint
        self.skipped.read()
        counts = (self.patience.best, self.patience.worse, self.skipped.total, self.skipped.in_a_row)
        self.checkpoints.save(state, Progress(self.window.sums(), unlogged, *counts), value)

    def _outcome(self, state: TrainState, stopped: int | None) -> Outcome:
        """Return the outcome, with the state to export unless the run was stopped."""
        self.signals.finishing()
        jax.block_until_ready(state)
        steps = int(state.step)
        if stopped is None:
            state = self._state_to_export(state)
        step = int(state.step)
        before, after = (self.journal.evaluations.get(number, {}) for number in (0, step))
        return Outcome(state, before, after, self.feed.tokens_before(step + 1), stopped, steps)

    def _state_to_export(self, state: TrainState) -> TrainState:
        """Return the state of the best checkpoint if the options ask for it, otherwise the last."""
        best = self.checkpoints.best
        if not self.options.load_best_model_at_end or best is None or best.step == int(state.step):
            return state
        damaged = self.checkpoints.damage(best.step) if writes() else None
        if not same_in_all(str(damaged)) or damaged is not None:  # either all restore it, or none
            self.journal.reporter.warned(
                f"the best checkpoint (step {best.step}) is damaged ({damaged}): exporting the last step instead"
            )
            return state
        return self.checkpoints.restore(state, best.step)[0]

    def _is_last(self, step: int) -> bool:
        return step == self.sizes.steps or self.patience.over

    def _log_due(self, step: int) -> bool:
        return step % self.options.logging_steps == 0 or step in (1, self.sizes.steps)

    def _eval_due(self, step: int) -> bool:
        every = self.options.eval_steps
        return step == self.sizes.steps or (every > 0 and step % every == 0)

    def _save_due(self, step: int) -> bool:
        every = {"no": 0, "steps": self.options.save_steps, "epoch": self.sizes.steps_per_epoch}[
            self.options.save_strategy
        ]
        return every > 0 and step % every == 0


def _loss(metrics: Mapping[str, float]) -> float | None:
    return next((value for name, value in metrics.items() if name.endswith("loss")), None)
