"""The loop: steps, logging, evaluation, checkpoints, and stopping when asked to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax

from lora_jax.config import TrainOptions
from lora_jax.errors import UserError
from lora_jax.hub.tokenizer import padding_token_id
from lora_jax.parallel.mesh import row_shards
from lora_jax.parallel.processes import same_in_all, writes
from lora_jax.progress import at, stage
from lora_jax.run.checkpoints import Checkpoints, Progress
from lora_jax.run.evaluation import Evaluation, Evaluator
from lora_jax.run.output import Logs
from lora_jax.run.profile import Profiler
from lora_jax.run.reporter import TRAINING, Reporter
from lora_jax.run.setup import Run
from lora_jax.run.signals import Interrupted, Signals
from lora_jax.run.stopping import Goal, Patience
from lora_jax.run.utilisation import utilisation_of_a_token
from lora_jax.run.warnings import Cautions, broken_base
from lora_jax.run.window import Window
from lora_jax.run_folder import BASE_LOSS, EVALUATED, WARNINGS
from lora_jax.train.feed import Feed, Sizes, eval_sizes, shaping
from lora_jax.train.optim import make_optimizer, schedule
from lora_jax.train.programs import Programs
from lora_jax.train.skipped import Skipped, places
from lora_jax.train.step import TrainState, make_train_step


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: the state to export, figures before and after, tokens seen, the signal that stopped it early.

    Figures are those of the evaluations before the first step and of the exported state, by their names.
    """

    state: TrainState
    before: Mapping[str, float]
    after: Mapping[str, float]
    num_tokens: int
    stopped_by: int | None
    steps: int
    """Steps that were trained, though an earlier one's state may be exported."""

    @property
    def eval_before(self) -> float | None:
        """The first set's loss before the first step, None where it was not measured."""
        return _loss(self.before)

    @property
    def eval_after(self) -> float | None:
        """The first set's loss of the exported state, None where it was not measured."""
        return _loss(self.after)


def run_sizes(run: Run, lengths: Sequence[int] | None = None) -> Sizes:
    """Return which rows each step takes, rows a pass and the number of steps of a run.

    `lengths` are those of the steps of the run that is gone on with: which are best depends on the number of steps.
    """
    train, data, mesh = run.config.train, run.config.data, run.mesh
    passes, shards = train.gradient_accumulation_steps, row_shards(mesh.shape)
    batch = train.per_device_train_batch_size * shards
    per_device = train.per_device_eval_batch_size or train.per_device_train_batch_size
    plan = shaping(data, mesh).plan(
        run.train_rows.lengths,
        batch * passes,
        train.seed,
        steps=train.max_steps,
        epochs=train.num_train_epochs,
    )
    if lengths and lengths[-1] == plan.buckets[-1]:
        plan = replace(plan, buckets=tuple(lengths))
    # Rows and passes that an epoch cannot fill would be computed in vain.
    batch = min(batch, -(-len(plan.bins) // shards) * shards)
    passes = min(passes, -(-len(plan.bins) // batch))
    plan = replace(plan, per_step=batch * passes)
    steps = train.max_steps
    if steps <= 0:
        steps = math.ceil(train.num_train_epochs * plan.steps_per_epoch)
    return Sizes(
        plan=plan,
        batch=batch,
        accumulation=passes,
        evaluation=eval_sizes(data, per_device, mesh),
        steps=steps,
    )


class Loop:
    """One run's loop over its steps."""

    def __init__(
        self,
        run: Run,
        sizes: Sizes,
        state_shardings: TrainState,
        logs: Logs,
        checkpoints: Checkpoints,
        reporter: Reporter,
        signals: Signals,
        profiler: Profiler,
        evaluator: Evaluator,
        goal: Goal,
    ) -> None:
        self.run, self.sizes, self.logs, self.reporter = run, sizes, logs, reporter
        self.profiler, self.utilisation = profiler, utilisation_of_a_token(run)
        self.checkpoints, self.signals = checkpoints, signals
        self.options: TrainOptions = run.config.train
        optimizer = make_optimizer(self.options, sizes.steps)
        self.train_step = Programs(make_train_step(run.model, optimizer, state_shardings), "the step")
        self.evaluator, self.goal = evaluator, goal
        self.rate = jax.jit(schedule(self.options, sizes.steps))  # one program, not one for each operation
        padding_id = padding_token_id(run.tokenizer, run.model_config.vocab_size)
        self.feed = Feed(run.train_rows, sizes, run.mesh, padding_id)
        kept = logs.metrics.kept
        self.cautions = Cautions(run, [text for line in kept for text in line.get(WARNINGS, [])])
        self.evaluations = {line["step"]: found for line in kept if (found := evaluated_figures(line))}
        self.warnings: list[str] = []
        self.state: TrainState | None = None
        """That of the last step, where one was done."""

    @stage(TRAINING)
    def train(self, state: TrainState, progress: Progress | None = None) -> Outcome:
        """Run from the state's step to the last one, until it stops early, or until SIGINT or SIGTERM.

        Saves what is asked for. `progress` is what the checkpoint held beside the state. Raises UserError where a
        checkpoint cannot be written, and where too many steps in a row were not finite.
        """
        first, sizes = int(state.step), self.sizes
        progress = progress or Progress([])
        self.skipped = Skipped(self.options.max_nonfinite_steps, progress.skipped, progress.skipped_in_a_row)
        options, goal, stand = self.options, self.goal, (progress.best, progress.worse)
        self.patience = Patience(
            goal, options.early_stopping_patience, options.early_stopping_threshold, *stand
        )
        self._warn(self.cautions.before_training(sizes))
        self.cautions.compile(state.trainable)
        if first == 0 and options.eval_on_start:
            self._before_training(state)
        elif progress.unlogged is not None:
            evaluation = self._evaluate(state)
            self._write(progress.unlogged, state, evaluation)
            progress = progress._replace(window=[])
            if self._saves(first) or (first == sizes.steps and options.save_strategy != "no"):
                # By it the checkpoint may be the best, as if the run had never been stopped.
                self.checkpoints.measured(first, evaluation.figures.get(goal.metric))
        elif first < sizes.steps and not self.patience.over:
            self.evaluator.compile(state.trainable)  # which an evaluation at the start would have done
        if first < sizes.steps and not self.patience.over:
            shapes = self.feed.shapes(first + 1)
            self.train_step.compile(state, self.run.frozen, self.run.adapter, batches=shapes)
        window = Window(self.feed.tokens_before(first + 1), progress.window)
        stopped: int | None = None
        self.signals.compiling()
        for step in range(first + 1, sizes.steps + 1):
            if self.patience.over:
                break
            self.profiler.before(step)
            at(f"step {step}/{sizes.steps}")
            batch = self.feed.batch(step)
            state, metrics = self.train_step(state, self.run.frozen, self.run.adapter, batch)
            self.state = state
            self.signals.stepping()
            window.add(self.feed.tokens(step), metrics)
            self.skipped.add(step, metrics)
            last = step == sizes.steps
            self.profiler.after(step, metrics)
            self.reporter.at(step)
            evaluates, value, unlogged = self._evaluates(step), None, None
            if evaluates or self._logs(step):
                self.skipped.read()
                entry = self._entry(step, window)  # before the evaluation, whose time is not a step's
                if evaluates and self.skipped.too_many:
                    unlogged = entry
                else:
                    try:
                        evaluation = self._evaluate(state) if evaluates else Evaluation()
                    except Interrupted as stop:
                        self._save(state, window, entry)
                        stopped = stop.number
                        break
                    self._write(entry, state, evaluation)
                    value = evaluation.figures.get(goal.metric)
                    window.restart()
            if self.skipped.too_many:
                self._save(state, window, unlogged)
                raise self._broken(self.skipped.too_many, step)
            ends = last or self.patience.over
            received = self.signals.received()
            if received or self._saves(step) or (ends and self.options.save_strategy != "no"):
                self._save(state, window, value=value)
            if received and not ends:
                stopped = received
                break
            self.checkpoints.check()
        if stopped is None and 0 < sizes.steps == self.skipped.total:
            self._save(state, window)
            raise self._broken(range(1, sizes.steps + 1), sizes.steps)
        self.signals.finishing()
        jax.block_until_ready(state)
        steps = int(state.step)
        if stopped is None:
            state = self._exported(state)
        step = int(state.step)
        before, after = (self.evaluations.get(number, {}) for number in (0, step))
        return Outcome(state, before, after, self.feed.tokens_before(step + 1), stopped, steps)

    def _before_training(self, state: TrainState) -> None:
        """Evaluate the start; a line of step 0 is written where there is a figure."""
        evaluation = self._evaluate(state)
        base_loss = None
        if evaluation.figures and self.run.config.lora.init_from is not None:
            base_loss = self.evaluator.base_loss()
        entry = {"step": 0, "epoch": 0.0, "num_tokens": 0}
        if base_loss is not None:
            entry[BASE_LOSS] = base_loss
        self._warn(self.cautions.about_start(evaluation.figures, base_loss))
        self._write(entry, state, evaluation)

    def _evaluate(self, state: TrainState) -> Evaluation:
        """Return what an evaluation finds; raises Interrupted on a signal."""
        return self.evaluator(state.trainable)

    def _exported(self, state: TrainState) -> TrainState:
        """Return the best checkpoint's state where that is asked for and another one, else the last."""
        best = self.checkpoints.best
        if not self.options.load_best_model_at_end or best is None or best.step == int(state.step):
            return state
        damaged = self.checkpoints.damage(best.step) if writes() else None
        if not same_in_all(str(damaged)) or damaged is not None:  # all have to restore it, or none
            self.reporter.warned(
                f"the best checkpoint, that of step {best.step}, is damaged ({damaged}): the last step is exported"
            )
            return state
        return self.checkpoints.restore(state, best.step)[0]

    def _broken(self, steps: range, saved: int) -> UserError:
        """Return what to say of steps in a row that were not finite, once the state is saved."""
        self.signals.finishing()
        rows = [row for step in steps for row in self.feed.rows_of(step)]
        behind = ""
        if saved < self.sizes.steps:
            behind = f", or go on behind them with --resume: step {saved} is saved, and no skipped step has changed it"
        which = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
        cause = broken_base(self.run) or "look at those rows or lower --train.learning_rate"
        return UserError(
            f"loss or gradient not finite in {which}, on {places(self.run.train_rows, rows)}; {cause}{behind}"
        )

    def _save(
        self,
        state: TrainState,
        window: Window,
        unlogged: dict[str, Any] | None = None,
        value: float | None = None,
    ) -> None:
        self.logs.sync()  # a resumption needs all lines up to its checkpoint
        self.skipped.read()
        counts = (self.patience.best, self.patience.worse, self.skipped.total, self.skipped.in_a_row)
        self.checkpoints.save(state, Progress(window.sums(), unlogged, *counts), value)

    def _entry(self, step: int, window: Window) -> dict[str, Any]:
        loss, figures = window.figures()
        if self.utilisation is not None:
            figures["mfu"] = self.utilisation * figures["tokens_per_second"]
        # A step that is skipped does not take the schedule on.
        updates = step - self.skipped.total
        rate = float(self.rate(max(0, updates - (self.skipped.in_a_row == 0))))
        return {
            "step": step,
            "epoch": round(step / self.sizes.steps_per_epoch, 4),
            "loss": loss,
            "learning_rate": float(f"{rate:.7g}"),  # 0.0002, as float32 can tell
            **figures,
            "padding": round(self.feed.padding(step), 4),
            "skipped_steps": self.skipped.total,
        }

    def _write(self, entry: dict[str, Any], state: TrainState, evaluation: Evaluation) -> None:
        """Write and show a line, with what the evaluation found and the warnings that it gives reason for."""
        step = entry["step"]
        if evaluation.figures:
            self.evaluations[step] = evaluation.figures
            self.patience = self.patience.after(evaluation.figures)
        if step > 0:
            ends = step == self.sizes.steps or self.patience.over
            self._warn(self.cautions.about_step(entry, state.trainable, ends))
        if step == 1 and 0 not in self.evaluations:
            self._warn(self.cautions.about_start(entry))
        entry = {name: number(value) for name, value in (entry | evaluation.figures).items()}
        if step > 0 or evaluation.figures:
            if self.warnings:
                entry, self.warnings = entry | {WARNINGS: self.warnings}, []
            self.logs.metrics.write(entry)
            self.reporter.logged(entry)
        self.logs.write_samples({"step": step, **sample} for sample in evaluation.samples)
        for sample in evaluation.samples:
            self.reporter.sampled(sample)

    def _warn(self, texts: list[str]) -> None:
        for text in texts:
            self.reporter.warned(text)
        self.warnings += texts

    def _logs(self, step: int) -> bool:
        return step % self.options.logging_steps == 0 or step in (1, self.sizes.steps)

    def _evaluates(self, step: int) -> bool:
        every = self.options.eval_steps
        return step == self.sizes.steps or (every > 0 and step % every == 0)

    def _saves(self, step: int) -> bool:
        every = {"no": 0, "steps": self.options.save_steps, "epoch": self.sizes.steps_per_epoch}[
            self.options.save_strategy
        ]
        return every > 0 and step % every == 0


def evaluated_figures(line: Mapping[str, Any]) -> dict[str, float]:
    """Return what a line of metrics.jsonl holds of an evaluation; NaN for what is no number."""
    found = {name: value for name, value in line.items() if name.startswith(EVALUATED)}
    return {name: math.nan if value is None else value for name, value in found.items()}


def _loss(figures: Mapping[str, float]) -> float | None:
    return next((value for name, value in figures.items() if name.endswith("loss")), None)


def number(value: Any) -> Any:
    """Return a value as JSON has it: null for what is no finite number."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
