"""The steps since the last logged one: their mean loss and accuracy, time, and tokens."""

from __future__ import annotations

import math
import time

import jax

from lora_jax.training.step import StepMetrics
from lora_jax.types import Object


class Window:
    """The steps of one line in metrics.jsonl; skipped steps count only in time and tokens."""

    def __init__(self, tokens: int, sums: list[float]) -> None:
        """`tokens` is the total of all steps so far, `sums` the value of `sums` in the checkpoint to resume from."""
        self.tokens = tokens
        self.restart()
        if len(sums) == 3:  # an older checkpoint, without the sum of weights
            sums = [*sums, sums[1]]
        self.carried = sums or self.carried

    def restart(self) -> None:
        """Start a new window."""
        self.carried = [0.0, 0.0, 0.0, 0.0]
        self.pending: list[tuple[StepMetrics, int]] = []
        self.started = time.perf_counter()

    def add(self, tokens: int, metrics: StepMetrics) -> None:
        """Add a queued step, and wait for the one before it, so that a signal is handled soon.

        With two steps queued, the device never waits.
        """
        self.tokens += tokens
        if self.pending:
            jax.block_until_ready(self.pending[-1][0])
        self.pending.append((metrics, tokens))

    def sums(self) -> list[float]:
        """Wait for the steps; return their sums of weighted loss, weights, correct tokens and trained tokens."""
        loss, weight, right, trained = self.carried
        for metrics, _ in self.pending:
            if bool(metrics.finite):
                loss += float(metrics.loss) * float(metrics.weight)
                weight += float(metrics.weight)
                right += float(metrics.correct_tokens)
                trained += int(metrics.trained_tokens)
        return [loss, weight, right, trained]

    def metrics(self) -> tuple[float, Object]:
        """Wait for the steps; return their mean loss, and the other metrics of a logged line."""
        loss, weight, right, trained = self.sums()
        seconds = time.perf_counter() - self.started
        last, _ = self.pending[-1]
        skipped = not trained and not all(bool(metrics.finite) for metrics, _ in self.pending)
        return math.nan if skipped else loss / (weight or 1.0), {
            "token_accuracy": math.nan if skipped else right / max(1, trained),
            "grad_norm": float(last.grad_norm),
            "num_tokens": self.tokens,
            "tokens_per_second": sum(tokens for _, tokens in self.pending) / seconds,
            "step_seconds": seconds / len(self.pending),
        }
