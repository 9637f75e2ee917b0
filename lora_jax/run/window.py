"""The steps since the last logged one: their mean loss and accuracy, time and tokens."""

from __future__ import annotations

import math
import time

import jax

from lora_jax.training.step import StepMetrics
from lora_jax.types import Object


class Window:
    """The steps that one line of metrics.jsonl is about; those that were skipped count only in time and tokens."""

    def __init__(self, tokens: int, sums: list[float]) -> None:
        """`tokens` are those of all steps so far, `sums` what `sums` gave at the checkpoint that is gone on from."""
        self.tokens = tokens
        self.restart()
        if len(sums) == 3:  # a checkpoint from before rows' weights were summed beside their tokens
            sums = [*sums, sums[1]]
        self.carried = sums or self.carried

    def restart(self) -> None:
        """Begin anew."""
        self.carried = [0.0, 0.0, 0.0, 0.0]
        self.pending: list[tuple[StepMetrics, int]] = []
        self.started = time.perf_counter()

    def add(self, tokens: int, metrics: StepMetrics) -> None:
        """Add a step that is only queued; waits for the one before, so that a signal does not wait long.

        With two under way the device never waits.
        """
        self.tokens += tokens
        if self.pending:
            jax.block_until_ready(self.pending[-1][0])
        self.pending.append((metrics, tokens))

    def sums(self) -> list[float]:
        """Return weighted loss, weights, right and trained tokens, each summed; waits for the steps."""
        loss, weight, right, trained = self.carried
        for metrics, _ in self.pending:
            if bool(metrics.finite):
                loss += float(metrics.loss) * float(metrics.weight)
                weight += float(metrics.weight)
                right += float(metrics.right_tokens)
                trained += int(metrics.trained_tokens)
        return [loss, weight, right, trained]

    def figures(self) -> tuple[float, Object]:
        """Return the mean loss, and the other figures of a logged line; waits for the steps."""
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
