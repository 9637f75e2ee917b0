"""Steps that were skipped because their loss or gradient was not finite: how many, and when they are too many."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from lora_jax.data.dataset import TokenDataset
from lora_jax.training.step import StepMetrics

LISTED = 40
"""Rows that the last message names."""


class Skipped:
    """The count over a run, kept by reading each step's flag when the step is done."""

    def __init__(self, limit: int, total: int = 0, in_a_row: int = 0) -> None:
        """`limit` is how many in a row end the run; 0 is as 1."""
        self.limit = max(1, limit)
        self.total, self.in_a_row = total, in_a_row
        self.too_many: range | None = None
        """The steps that end the run, once there are that many in a row."""
        self._unread: deque[tuple[int, StepMetrics]] = deque()

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Note a step that was queued, and read all before it."""
        self.read()
        self._unread.append((step, metrics))

    def read(self) -> None:
        """Read the flags of all steps so far, waiting for them."""
        while self._unread:
            step, metrics = self._unread.popleft()
            finite = bool(metrics.finite)
            self.total += not finite
            self.in_a_row = 0 if finite else self.in_a_row + 1
            if self.in_a_row >= self.limit and self.too_many is None:
                self.too_many = range(step - self.in_a_row + 1, step + 1)


def places(rows: TokenDataset, indices: Sequence[int]) -> str:
    """Return where rows stand in their source, a list of numbers for each file."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for index in sorted(set(indices))[:LISTED]:
        name, _, number = rows.where(index).rpartition(" ")
        found[name].append(int(number))
    text = "; ".join(f"{name} {', '.join(map(str, numbers))}" for name, numbers in found.items())
    rest = len(set(indices)) - LISTED
    return f"{text} and {rest} more" if rest > 0 else text
