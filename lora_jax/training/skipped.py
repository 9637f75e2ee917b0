"""Count steps that are skipped because their loss or gradient is not finite, and notice when there are too many."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from lora_jax.data.dataset import TokenDataset
from lora_jax.training.step import StepMetrics

LISTED = 40
"""Number of rows listed in the final message."""


class Skipped:
    """The count over a run. A step's flag is read after the step has finished."""

    def __init__(self, limit: int, total: int = 0, in_a_row: int = 0) -> None:
        """Stop the run after `limit` skipped steps in a row; 0 counts as 1."""
        self.limit = max(1, limit)
        self.total, self.in_a_row = total, in_a_row
        self.too_many: range | None = None
        """The steps that stop the run, once there are too many in a row."""
        self._unread: deque[tuple[int, StepMetrics]] = deque()

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Note a queued step, and read the flags of those before it."""
        self.read()
        self._unread.append((step, metrics))

    def read(self) -> None:
        """Wait for all steps so far and read their flags."""
        while self._unread:
            step, metrics = self._unread.popleft()
            finite = bool(metrics.finite)
            self.total += not finite
            self.in_a_row = 0 if finite else self.in_a_row + 1
            if self.in_a_row >= self.limit and self.too_many is None:
                self.too_many = range(step - self.in_a_row + 1, step + 1)


def places(rows: TokenDataset, indices: Sequence[int]) -> str:
    """Return the positions of rows in their source, listed per file."""
    found: defaultdict[str, list[int]] = defaultdict(list)
    for index in sorted(set(indices))[:LISTED]:
        name, _, number = rows.where(index).rpartition(" ")
        found[name].append(int(number))
    text = "; ".join(f"{name} {', '.join(map(str, numbers))}" for name, numbers in found.items())
    rest = len(set(indices)) - LISTED
    return f"{text} and {rest} more" if rest > 0 else text
