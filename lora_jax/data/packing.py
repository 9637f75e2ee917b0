"""Packing: which rows share a row of a batch, as a pure function of the rows' lengths.

    none      one row each
    bfd       best-fit decreasing: whole rows, longest first, each into the fullest bin that still has room
    wrapped   rows one after the other, cut whenever a bin is full, so that only the last bin has padding

A bin holds pieces of rows. Each piece is a segment with positions from 0, so it attends only to itself, and no piece
predicts a token of another. A piece that starts inside its row has lost its context, so its first token is not a target
(`lost_targets`).

Best-fit decreasing never needs more than 11/9 of the minimum number of bins, plus four (Johnson 1973, Near-optimal bin
packing algorithms).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from lora_jax.config import DataOptions, Packing
from lora_jax.data.tokens import Tokens


@dataclass(frozen=True, eq=False)  # comparing arrays gives no single truth value
class Bins:
    """Pieces of rows, bin by bin; without packing each row is a bin."""

    rows: np.ndarray
    """int64 [pieces]: the row that a piece comes from."""
    starts: np.ndarray
    """int64 [pieces]: the piece's first token in its row."""
    sizes: np.ndarray
    """int64 [pieces]: tokens."""
    bounds: np.ndarray
    """int64 [bins + 1]: bin i holds pieces bounds[i] to bounds[i + 1]."""

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per bin, int64 [bins]."""
        return np.diff(np.concatenate(([0], np.cumsum(self.sizes)))[self.bounds])

    def examples(self, dataset: Sequence[Tokens], index: int) -> list[Tokens]:
        """Return the pieces of a bin in order."""
        pieces = slice(self.bounds[index], self.bounds[index + 1])
        parts = zip(self.rows[pieces], self.starts[pieces], self.sizes[pieces], strict=True)
        return [_piece(dataset[int(row)], int(start), int(start + size)) for row, start, size in parts]

    def lost_targets(self, dataset: Sequence[Tokens]) -> int:
        """Return how many trained tokens are not targets because they are the first of a piece inside their row."""
        inside = np.flatnonzero(self.starts)
        return sum(bool(dataset[int(self.rows[piece])].trained[self.starts[piece]]) for piece in inside)

    def summary(self, packing: Packing, dataset: Sequence[Tokens]) -> str:
        """Return in words how many rows share how many bins, and what that costs."""
        shared = (
            f"{packing}: {len(dataset):,} rows share {len(self):,} of at most {self.lengths.max():,} tokens"
        )
        lost = self.lost_targets(dataset)
        return f"{shared}; {lost:,} trained tokens after a cut are not targets" if lost else shared


def packs(data: DataOptions) -> bool:
    """Return whether a row of any batch in the run may hold more than one segment."""
    return data.packing != "none" or (data.eval_packing or "none") != "none"


def pack(lengths: np.ndarray, packing: Packing, capacity: int) -> Bins:
    """Return rows of given lengths in bins of at most `capacity` tokens.

    Raises:
        ValueError: for bfd, a row has no tokens, or is longer than a bin.
    """
    if packing == "wrapped":
        return _wrapped(lengths, capacity)
    if packing == "none":
        return _bins_of(np.arange(len(lengths)), lengths)
    return _bins_of(best_fit_decreasing(lengths, capacity), lengths)


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the bin of each row, int64 [rows], with bins numbered in the order they are opened.

    Rows of equal length are placed together: the fullest bins with room for one are filled with as many as fit, then
    the next fullest. The work therefore grows with the number of different lengths, not with the number of rows.

    Raises:
        ValueError: a row has no tokens, or more than a bin can hold.
    """
    if len(lengths) and not 0 < lengths.min() <= lengths.max() <= capacity:
        raise ValueError(
            f"rows of {lengths.min()} to {lengths.max()} tokens do not fit in bins of {capacity}"
        )
    by_length = np.argsort(-lengths, kind="stable")
    sizes, firsts = np.unique(-lengths[by_length], return_index=True)
    bin_of = np.empty(len(lengths), np.int64)
    spaces: list[int] = []  # sorted
    having: dict[int, list[np.ndarray]] = {}  # bins by their remaining space
    opened = 0

    def put_back(space: int, bins: np.ndarray) -> None:
        if space == 0 or not len(bins):
            return
        if space not in having:
            insort(spaces, space)
            having[space] = []
        having[space].append(bins)

    for size, rows in zip((-sizes).tolist(), np.split(by_length, firsts[1:]), strict=True):
        while len(rows):
            at = bisect_left(spaces, size)
            if at < len(spaces):
                space = spaces.pop(at)
                bins = np.concatenate(having.pop(space))
            else:
                space = capacity
                bins = np.arange(opened, opened - (-len(rows) // (capacity // size)))
                opened += len(bins)
            each = space // size
            full, rest = divmod(min(len(rows), each * len(bins)), each)
            used = full + (rest > 0)
            placed = full * each + rest
            bin_of[rows[:placed]] = np.repeat(bins[:used], each)[:placed]
            rows = rows[placed:]
            put_back(space - each * size, bins[:full])
            put_back(space - rest * size, bins[full:used])
            put_back(space, bins[used:])
    return bin_of


def _bins_of(bin_of: np.ndarray, lengths: np.ndarray) -> Bins:
    """Return whole rows in their given bins, the longest in a bin first."""
    rows = np.lexsort((-lengths, bin_of))
    bounds = np.searchsorted(bin_of[rows], np.arange(bin_of.max(initial=-1) + 2))
    return Bins(rows, np.zeros_like(rows), lengths[rows].astype(np.int64), bounds)


def _wrapped(lengths: np.ndarray, capacity: int) -> Bins:
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.unique(np.concatenate(([0], ends, np.arange(0, total, capacity))))  # ends of rows and of bins
    starts = cuts[:-1]
    rows = np.searchsorted(ends, starts, side="right")
    bounds = np.searchsorted(starts, np.arange(0, total + capacity, capacity))
    return Bins(rows, starts - (ends - lengths)[rows], np.diff(cuts), bounds)


def _piece(row: Tokens, start: int, stop: int) -> Tokens:
    if (start, stop) == (0, len(row)):
        return row
    return replace(row, input_ids=row.input_ids[start:stop], trained=row.trained[start:stop])
