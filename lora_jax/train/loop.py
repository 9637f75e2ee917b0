"""The loop: steps, logging, evaluation, checkpoints, and stopping when asked to."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

import jax

from lora_jax.config import TrainOptions
from lora_jax.data.batches import padded_length, steps_per_epoch
from lora_jax.hub.tokenizer import padding_token_id
from lora_jax.parallel.mesh import POSITIONS, row_shards
from lora_jax.parallel.processes import Agreement
from lora_jax.train.checkpoint import Checkpoints
from lora_jax.train.feed import Feed, Sizes, evaluation
from lora_jax.train.optim import make_optimizer, schedule
from lora_jax.train.output import MetricsLog
from lora_jax.train.report import Reporter
from lora_jax.train.setup import Run
from lora_jax.train.step import StepMetrics, TrainState, make_eval_step, make_train_step


@dataclass(frozen=True)
class Outcome:
    """How the loop ended: the last state, eval loss before and after, tokens seen, the signal that stopped it early."""

    state: TrainState
    eval_before: float | None
    eval_after: float | None
    num_tokens: int
    stopped_by: int | None


def run_sizes(run: Run) -> Sizes:
    """Return the padded length, rows a pass and number of steps of a run."""
    train, rows, shards = run.config.train, len(run.train_rows), row_shards(run.mesh.shape)
    longest = max(run.train_rows.longest, run.eval_rows.longest if run.eval_rows else 0)
    batch = train.per_device_train_batch_size
    eval_batch = train.per_device_eval_batch_size or batch
    epoch = steps_per_epoch(rows, batch * shards * train.gradient_accumulation_steps)
    return Sizes(
        length=padded_length(longest, run.config.data.max_length, parts=run.mesh.shape[POSITIONS]),
        batch=batch * shards,
        accumulation=train.gradient_accumulation_steps,
        eval_batch=eval_batch * shards,
        steps_per_epoch=epoch,
        steps=train.max_steps if train.max_steps > 0 else math.ceil(train.num_train_epochs * epoch),
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
    ) -> None:
        self.run, self.sizes, self.log, self.checkpoints, self.reporter = (
            run,
            sizes,
            log,
            checkpoints,
            reporter,
        )
        self.options: TrainOptions = run.config.train
        self.train_step = make_train_step(
            run.model, make_optimizer(self.options, sizes.steps), state_shardings
        )
        self.eval_step = make_eval_step(run.model)
        self.rate = schedule(self.options, sizes.steps)
        self.padding_id = padding_token_id(run.tokenizer)
        self.feed = Feed(run.train_rows, sizes, run.mesh, self.options.seed, self.padding_id)

    def train(self, state: TrainState, sums: list[float] | None = None) -> Outcome:
        """Run from the state's step to the last one, or until SIGINT or SIGTERM; save what is asked for.

        `sums` is what the checkpoint held beside the state (see `_Window.sums`).
        """
        first = int(state.step)
        before, after = self.log.evaluated
        if first == 0 and (before := self._evaluate(state)) is not None:
            after = before
            self._write({"step": 0, "epoch": 0.0, "num_tokens": 0, "eval_loss": before})
        window = _Window(self.feed.tokens_before(first + 1), sums)
        agreement = Agreement(self.run.mesh)
        with _signals() as received:
            for step in range(first + 1, self.sizes.steps + 1):
                batch = self.feed.batch(step)
                state, metrics = self.train_step(state, self.run.frozen, self.run.adapter, batch)
                window.add(self.feed.tokens(step), metrics)
                last = step == self.sizes.steps
                self.reporter.at(step)
                evaluates = self._evaluates(step)
                if evaluates or self._logs(step):
                    entry = self._entry(step, window)  # before the evaluation, whose time is not a step's
                    if evaluates and (loss := self._evaluate(state)) is not None:
                        after = entry["eval_loss"] = loss
                    self._write(entry)
                    window.restart()
                stops = agreement.ask(bool(received))
                if stops or self._saves(step) or (last and self.options.save_strategy != "no"):
                    self.checkpoints.save(state, window.sums())
                if stops:
                    break
        jax.block_until_ready(state)
        early = int(state.step) < self.sizes.steps
        stopped_by = (received[0] if received else signal.SIGTERM) if early else None
        return Outcome(state, before, after, window.tokens, stopped_by)

    def _evaluate(self, state: TrainState) -> float | None:
        rows = self.run.eval_rows
        if rows is None:
            return None
        total, weight = 0.0, 0.0
        for batch in evaluation(rows, self.sizes, self.run.mesh, self.padding_id):
            loss, counted = self.eval_step(state.trainable, self.run.frozen, self.run.adapter, batch)
            total, weight = total + float(loss), weight + float(counted)
        return total / weight

    def _entry(self, step: int, window: _Window) -> dict[str, Any]:
        loss, figures = window.figures()
        return {
            "step": step,
            "epoch": round(step / self.sizes.steps_per_epoch, 4),
            "loss": loss,
            "learning_rate": float(f"{float(self.rate(step - 1)):.7g}"),  # 0.0002, as float32 can tell
            **figures,
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


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM until the step under way is done; a second one ends the program at once."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    handled = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, note) for number in handled]
    try:
        yield received
    finally:
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)
