"""Choose the few lengths that the steps of a run are padded to, so that padding is minimal.

Each length is a program to compile, so there are few, and each has to be worth its compilation.
"""

from __future__ import annotations

import numpy as np

FEWEST, SAVING = 2, 0.05
"""Minimum number of steps per length, and the share of all tokens that an additional length has to save."""


def bucket_lengths(needed: np.ndarray, most: int, fewest: int = 1) -> tuple[int, ...]:
    """Return the lengths to pad steps to, ascending, at most `most` of them.

    They minimize the number of padded tokens (by dynamic programming). Their number is the smallest one that an
    additional length would improve by less than SAVING.

    Args:
        needed: int [steps], minimum length of each step.
        most: maximum number of lengths.
        fewest: minimum number of steps per length, if there is more than one length.
    """
    values, counts = np.unique(needed, return_counts=True)
    before = np.concatenate(([0], np.cumsum(counts)))
    # cost[i, j]: steps with values i to j, padded to value j; inf if they are too few.
    steps = before[None, 1:] - before[:-1, None]
    cost = np.where(steps >= max(1, fewest), steps * values[None, :].astype(float), np.inf)
    least = steps[0] * values.astype(float)  # for values up to j, with one length
    chosen, reached, splits = (int(values[-1]),), least[-1], []
    for count in range(2, min(most, len(values)) + 1):
        head = least if count > 2 else np.where(before[1:] >= fewest, least, np.inf)
        # The last length begins after value i - 1, whose solution with one length fewer is known.
        table = np.concatenate((np.full((1, len(values)), np.inf), head[:-1, None] + cost[1:]))
        splits.append(table.argmin(axis=0))
        least = table.min(axis=0)
        if least[-1] <= reached * (1 - SAVING) ** (count - len(chosen)):
            chosen, reached = _traced(splits, values), least[-1]
    return chosen


def _traced(splits: list[np.ndarray], values: np.ndarray) -> tuple[int, ...]:
    last = len(values) - 1
    lengths = [int(values[last])]
    for starts in reversed(splits):
        last = int(starts[last]) - 1
        lengths.append(int(values[last]))
    return tuple(reversed(lengths))
