"""What a run writes while it runs: lines of metrics.jsonl and samples.jsonl, with warnings, also on the terminal."""

from __future__ import annotations

import math
from typing import Any

import jax

from lora_jax.run.evaluation import Evaluation
from lora_jax.run.output import Logs
from lora_jax.run.reporter import Reporter
from lora_jax.run.setup import Run
from lora_jax.run.utilization import mfu_at_one_token_per_second
from lora_jax.run.warnings import RunWarnings
from lora_jax.run.window import Window
from lora_jax.run_folder import BASE_LOSS, EVALUATED, WARNINGS
from lora_jax.training.feed import Sizes
from lora_jax.training.optim import schedule
from lora_jax.training.skipped import Skipped
from lora_jax.types import Object, Trained, Values


class Journal:
    """The log of one run."""

    def __init__(self, run: Run, sizes: Sizes, logs: Logs, reporter: Reporter) -> None:
        self.sizes, self.logs, self.reporter = sizes, logs, reporter
        kept = logs.metrics.kept
        self.warnings = RunWarnings(run, [text for line in kept for text in line.get(WARNINGS, [])])
        self.evaluations = {line["step"]: found for line in kept if (found := evaluation_metrics(line))}
        """Metrics of all evaluations so far, by step."""
        self._mfu_at_one_token_per_second = mfu_at_one_token_per_second(run)
        # One program instead of one per operation.
        self._rate = jax.jit(schedule(run.config.train, sizes.steps))
        self._unwritten: list[str] = []
        """Warnings that belong to the next line."""

    def warn(self, texts: list[str]) -> None:
        """Show warnings now, and add them to the next line."""
        for text in texts:
            self.reporter.warned(text)
        self._unwritten += texts

    def start(self, evaluation: Evaluation, base_loss: float | None) -> None:
        """Write the evaluation before the first step, if there is one; `base_loss` is the base's own loss."""
        entry = {"step": 0, "epoch": 0.0, "num_tokens": 0}
        if base_loss is not None:
            entry[BASE_LOSS] = base_loss
        self.warn(self.warnings.about_start(evaluation.metrics, base_loss))
        self._note(entry, evaluation)
        if evaluation.metrics:
            self._write(entry | evaluation.metrics)
        self._write_samples(0, evaluation)

    def entry(self, step: int, window: Window, skipped: Skipped, padding: float) -> Object:
        """Wait for the steps of the window; return the line of a step without its evaluation."""
        loss, metrics = window.metrics()
        if self._mfu_at_one_token_per_second is not None:
            metrics["mfu"] = self._mfu_at_one_token_per_second * metrics["tokens_per_second"]
        # A skipped step does not advance the schedule.
        rate = float(self._rate(max(0, step - skipped.total - (skipped.in_a_row == 0))))
        return {
            "step": step,
            "epoch": round(step / self.sizes.steps_per_epoch, 4),
            "loss": loss,
            "learning_rate": float(f"{rate:.7g}"),  # 0.0002 rather than all digits of the float32
            **metrics,
            "padding": round(padding, 4),
            "skipped_steps": skipped.total,
        }

    def write(self, entry: Object, trainable: Trained, evaluation: Evaluation, ends: bool) -> None:
        """Write a step's line with its evaluation and warnings; `ends` marks the last step of the run."""
        self._note(entry, evaluation)
        self.warn(self.warnings.about_step(entry, trainable, ends))
        if entry["step"] == 1 and 0 not in self.evaluations:
            self.warn(self.warnings.about_start(entry))
        self._write(entry | evaluation.metrics)
        self._write_samples(entry["step"], evaluation)

    def _note(self, entry: Values, evaluation: Evaluation) -> None:
        if evaluation.metrics:
            self.evaluations[entry["step"]] = evaluation.metrics

    def _write(self, entry: Values) -> None:
        line = {name: number(value) for name, value in entry.items()}
        if self._unwritten:
            line, self._unwritten = line | {WARNINGS: self._unwritten}, []
        self.logs.metrics.write(line)
        self.reporter.logged(line)

    def _write_samples(self, step: int, evaluation: Evaluation) -> None:
        self.logs.write_samples({"step": step, **sample} for sample in evaluation.samples)
        for sample in evaluation.samples:
            self.reporter.sampled(sample)


def evaluation_metrics(line: Values) -> dict[str, float]:
    """Return the evaluation metrics in a line of metrics.jsonl, with NaN for null."""
    found = {name: value for name, value in line.items() if name.startswith(EVALUATED)}
    return {name: math.nan if value is None else value for name, value in found.items()}


def number(value: Any) -> Any:
    """Return a value as JSON can hold it: null if it is not finite."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
