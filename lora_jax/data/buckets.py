"""To which few lengths the steps of a run are padded: those with which the least is computed in vain.

Each length is a program to be compiled, so there are few of them, and each has to earn its compilation.
"""

from __future__ import annotations

import numpy as np

FEWEST, SAVING = 2, 0.05
"""Steps of a run that a length is worth compiling for, and the share of all tokens that one more length has to save."""


def bucket_lengths(needed: np.ndarray, most: int, fewest: int = 1) -> tuple[int, ...]:
    """Return the lengths to pad steps to, ascending, at most `most` of them.

    They are those that make the padded tokens fewest (by dynamic programming), for the smallest number of lengths that
    another one would improve by less than SAVING.

    Args:
        needed: int [steps], the least length that each step can be padded to.
        most: greatest number of lengths.
        fewest: steps that each length is for, at least, where there is more than one.
    """
    values, counts = np.unique(needed, return_counts=True)
    before = np.concatenate(([0], np.cumsum(counts)))
    # cost[i, j]: steps of the values i to j are padded to value j; inf where they are too few.
    steps = before[None, 1:] - before[:-1, None]
    cost = np.where(steps >= max(1, fewest), steps * values[None, :].astype(float), np.inf)
    least = steps[0] * values.astype(float)  # of values up to j with one length
    chosen, reached, splits = (int(values[-1]),), least[-1], []
    for count in range(2, min(most, len(values)) + 1):
        head = least if count > 2 else np.where(before[1:] >= fewest, least, np.inf)
        # The last length begins after value i - 1, for which one length fewer is known.
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
