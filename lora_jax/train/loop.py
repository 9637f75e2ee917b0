"""The loop: steps, logging, evaluation, checkpoints, and stopping when asked to."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from lora_jax.config import TrainOptions
from lora_jax.data.batches import Batch
from lora_jax.data.steps import Shaping
from lora_jax.hub.tokenizer import padding_token_id
from lora_jax.parallel.mesh import POSITIONS, row_shards
from lora_jax.train.checkpoint import EVAL_LOSS, Checkpoints, Progress
from lora_jax.train.feed import Feed, Sizes, evaluation, evaluation_shapes, padding_multiple
from lora_jax.train.optim import make_optimizer, schedule
from lora_jax.train.output import MetricsLog
from lora_jax.train.profile import Profiler
from lora_jax.train.programs import Programs
from lora_jax.train.report import Reporter
from lora_jax.train.setup import Run
from lora_jax.train.signals import Signals
from lora_jax.train.step import StepMetrics, TrainState, make_eval_step, make_train_step
from lora_jax.train.utilisation import utilisation_of_a_token


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: the last state, eval loss before and after, tokens seen, the signal that stopped it early."""

    state: TrainState
    eval_before: float | None
    eval_after: float | None
    num_tokens: int
    stopped_by: int | None


def run_sizes(run: Run) -> Sizes:
    """Return which rows each step takes, rows a pass and the number of steps of a run."""
    train, data, mesh = run.config.train, run.config.data, run.mesh
    shards, passes = row_shards(mesh.shape), train.gradient_accumulation_steps
    batch = train.per_device_train_batch_size * shards
    multiple, parts = padding_multiple(data, mesh), mesh.shape[POSITIONS]
    shaping = Shaping(data.packing, data.max_length, data.length_buckets, multiple, parts)
    plan = shaping.plan(
        run.train_rows.lengths,
        batch * passes,
        train.seed,
        steps=train.max_steps,
        epochs=train.num_train_epochs,
    )
    steps = train.max_steps
    if steps <= 0:
        steps = math.ceil(train.num_train_epochs * plan.steps_per_epoch)
    return Sizes(
        plan=plan,
        batch=batch,
        accumulation=passes,
        eval_batch=(train.per_device_eval_batch_size or train.per_device_train_batch_size) * shards,
        eval_shaping=replace(shaping, packing=data.eval_packing or data.packing),
        evaluations=2 + (steps // train.eval_steps if train.eval_steps else 0),
        steps=steps,
    )


class Loop:
    """One run's loop over its steps."""

    def __init__(
        self,
        run: Run,
        sizes: Sizes,
        state_shardings: TrainState,
        log: MetricsLog,
        checkpoints: Checkpoints,
        reporter: Reporter,
        signals: Signals,
        profiler: Profiler,
    ) -> None:
        self.run, self.sizes, self.log, self.reporter = run, sizes, log, reporter
        self.profiler, self.utilisation = profiler, utilisation_of_a_token(run)
        self.checkpoints, self.signals = checkpoints, signals
        self.options: TrainOptions = run.config.train
        optimizer = make_optimizer(self.options, sizes.steps)
        self.train_step = Programs(make_train_step(run.model, optimizer, state_shardings))
        self.eval_step = Programs(make_eval_step(run.model))
        self.rate = schedule(self.options, sizes.steps)
        self.padding_id = padding_token_id(run.tokenizer)
        self.feed = Feed(run.train_rows, sizes, run.mesh, self.padding_id)

    def train(self, state: TrainState, progress: Progress | None = None) -> Outcome:
        """Run from the state's step to the last one, or until SIGINT or SIGTERM; save what is asked for.

        `progress` is what the checkpoint held beside the state. Raises UserError where a checkpoint cannot be written.
        """
        first = int(state.step)
        before, after = self.log.evaluated
        if first == 0 and (before := self._evaluate(state)) is not None:
            after = before
            self._write({"step": 0, "epoch": 0.0, "num_tokens": 0, "eval_loss": before})
        elif progress is not None and progress.unlogged is not None:
            after = self._evaluate(state)
            self._write(progress.unlogged | {"eval_loss": after})
            progress = None
        elif 0 < first < self.sizes.steps:
            self._compile_evaluation(state)
        shapes = self.feed.shapes(first + 1)
        self.train_step.compile(state, self.run.frozen, self.run.adapter, batches=shapes)
        window = _Window(self.feed.tokens_before(first + 1), None if progress is None else progress.window)
        stopped: int | None = None
        self.signals.compiling()
        for step in range(first + 1, self.sizes.steps + 1):
            self.profiler.before(step)
            batch = self.feed.batch(step)
            state, metrics = self.train_step(state, self.run.frozen, self.run.adapter, batch)
            self.signals.stepping()
            window.add(self.feed.tokens(step), metrics)
            last = step == self.sizes.steps
            self.profiler.after(step, metrics)
            self.reporter.at(step)
            evaluates, loss = self._evaluates(step), None
            if evaluates or self._logs(step):
                entry = self._entry(step, window)  # before the evaluation, whose time is not a step's
                try:
                    if evaluates and (loss := self._evaluate(state)) is not None:
                        after = entry[EVAL_LOSS] = loss
                except _Stopped as stop:
                    self._save(state, Progress(window.sums(), entry))
                    stopped = stop.number
                    break
                self._write(entry)
                window.restart()
            received = self.signals.received()
            if received or self._saves(step) or (last and self.options.save_strategy != "no"):
                self._save(state, Progress(window.sums()), loss)
            if received and not last:
                stopped = received
                break
            self.checkpoints.check()
        self.signals.finishing()
        jax.block_until_ready(state)
        return Outcome(state, before, after, window.tokens, stopped)

    def _save(self, state: TrainState, progress: Progress, eval_loss: float | None = None) -> None:
        self.log.sync()  # a resumption needs all lines up to its checkpoint
        self.checkpoints.save(state, progress, eval_loss)

    def _evaluate(self, state: TrainState) -> float | None:
        """Return the mean loss over the evaluation rows, None where there are none; raises _Stopped on a signal."""
        if self.run.eval_rows is None:
            return None
        total, weight = 0.0, 0.0
        for batch in self._eval_batches():
            loss, counted = self.eval_step(state.trainable, self.run.frozen, self.run.adapter, batch)
            total, weight = total + float(loss), weight + float(counted)
            if (number := self.signals.received()) is not None:
                raise _Stopped(number)
        return total / weight

    def _compile_evaluation(self, state: TrainState) -> None:
        """Compile what evaluates, so that no compilation comes between a signal and the checkpoint it asks for."""
        if self.run.eval_rows is not None:
            shapes = evaluation_shapes(self.run.eval_rows, self.sizes, self.run.mesh)
            self.eval_step.compile(state.trainable, self.run.frozen, self.run.adapter, batches=shapes)

    def _eval_batches(self) -> Iterator[Batch]:
        rows = self.run.eval_rows
        return iter(()) if rows is None else evaluation(rows, self.sizes, self.run.mesh, self.padding_id)

    def _entry(self, step: int, window: _Window) -> dict[str, Any]:
        loss, figures = window.figures()
        if self.utilisation is not None:
            figures["mfu"] = self.utilisation * figures["tokens_per_second"]
        return {
            "step": step,
            "epoch": round(step / self.sizes.steps_per_epoch, 4),
            "loss": loss,
            "learning_rate": float(f"{float(self.rate(step - 1)):.7g}"),  # 0.0002, as float32 can tell
            **figures,
            "padding": round(self.feed.padding(step), 4),
        }

    def _write(self, entry: dict[str, Any]) -> None:
        self.log.write(entry)
        self.reporter.logged(entry)

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


class _Window:
    """The steps since the last logged one: mean loss over their trained tokens, time and tokens."""

    def __init__(self, tokens: int, sums: list[float] | None) -> None:
        self.tokens = tokens
        self.restart()
        self.carried = sums or self.carried

    def restart(self) -> None:
        self.carried = [0.0, 0.0]
        self.pending: list[tuple[StepMetrics, int]] = []
        self.started = time.perf_counter()

    def add(self, tokens: int, metrics: StepMetrics) -> None:
        self.tokens += tokens
        # Steps are only queued here. With two under way the device never waits, and a signal does not wait long.
        if self.pending:
            jax.block_until_ready(self.pending[-1][0])
        self.pending.append((metrics, tokens))

    def sums(self) -> list[float]:
        """Return the loss summed over the trained tokens, and their number; waits for the steps."""
        total, count = self.carried
        for metrics, _ in self.pending:
            trained = int(metrics.trained_tokens)
            total, count = total + float(metrics.loss) * trained, count + trained
        return [total, count]

    def figures(self) -> tuple[float, dict[str, Any]]:
        """Return the mean loss, and the other figures of a logged line; waits for the steps."""
        total, count = self.sums()
        seconds = time.perf_counter() - self.started
        return total / max(1, count), {
            "grad_norm": float(self.pending[-1][0].grad_norm),
            "num_tokens": self.tokens,
            "tokens_per_second": sum(tokens for _, tokens in self.pending) / seconds,
            "step_seconds": seconds / len(self.pending),
        }


class _Stopped(Exception):  # noqa: N818 - a way out, not an error
    """A signal came during an evaluation."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
