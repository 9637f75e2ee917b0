"""Which rows a step takes, and the length it pads them to: a pure function of lengths, seed and step.

The step number is therefore the whole data position: a resumed run sees the same data as an uninterrupted one, and all
processes of a run know each step without communicating.

Each epoch uses each bin (`packing`) once. If there are several lengths, a step has bins of one length: the epoch's
random order is sorted by length, longest first, and cut into steps, which are then shuffled. A step mixes lengths only
where the bins of one length run out. The composition of steps differs between epochs, but the number of steps per
length does not. The first step of an epoch is one of the longest, so that insufficient memory shows immediately. The
last step has the remaining bins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from lora_jax.config import Packing
from lora_jax.data.batches import Batch, epoch_order, packed_batch, padded_length
from lora_jax.data.buckets import FEWEST, bucket_lengths
from lora_jax.data.packing import Bins, pack
from lora_jax.data.tokens import Tokens

_STEPS = 1
"""Draw number for an epoch's order of steps, as opposed to its order of rows."""


class Step(NamedTuple):
    """A step: its bins, int64 [bins], fewer in an epoch's last; their padded length; tokens without padding."""

    bins: np.ndarray
    length: int
    tokens: int


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The steps of a run, counted from 0 over all epochs."""

    bins: Bins
    buckets: tuple[int, ...]
    """Lengths that steps are padded to, ascending, before rounding up to a multiple of `parts`."""
    per_step: int
    """Bins per step over all devices."""
    seed: int | None
    """Seed of the order; None keeps the rows of each length in order, longest first."""
    parts: int = 1
    """Number of devices that shard a row's tokens; lengths are multiples of it."""

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps that use each bin once; the last is padded."""
        return -(-len(self.bins) // self.per_step)

    @cached_property
    def steps_by_length(self) -> dict[int, int]:
        """Number of steps per length in an epoch, by ascending length; the same in all epochs."""
        lengths, counts = np.unique(_epoch(self, 0).lengths, return_counts=True)
        return {int(length): int(count) for length, count in zip(lengths, counts, strict=True)}

    @property
    def padding(self) -> float:
        """Share of padding in everything that an epoch computes."""
        return self.padding_before(self.steps_per_epoch)

    def at(self, step: int) -> Step:
        """Return the contents of a step."""
        epoch, place = divmod(step, self.steps_per_epoch)
        found = _epoch(self, epoch)
        start = found.starts[place]
        bins = found.order[start : start + self.per_step]
        return Step(bins, int(found.lengths[place]), int(found.tokens[place]))

    def rows_of(self, step: int) -> list[int]:
        """Return the rows of which a step takes all or a part, in order."""
        bins = self.at(step).bins
        pieces = [self.bins.rows[self.bins.bounds[bin] : self.bins.bounds[bin + 1]] for bin in bins]
        return np.unique(np.concatenate(pieces)).tolist()

    def tokens_before(self, step: int) -> int:
        """Return the number of tokens, without padding, in all steps before this one."""
        epochs, place = divmod(step, self.steps_per_epoch)
        return epochs * int(self.bins.lengths.sum()) + int(_epoch(self, epochs).tokens[:place].sum())

    def padding_before(self, step: int) -> float:
        """Return the share of padding in all steps before this one; 0 before the first."""
        epochs, place = divmod(step, self.steps_per_epoch)
        whole = sum(length * count for length, count in self.steps_by_length.items())
        computed = self.per_step * (epochs * whole + int(_epoch(self, epochs).lengths[:place].sum()))
        return 1 - self.tokens_before(step) / computed if computed else 0.0

    def lengths_of(self, steps: range) -> list[int]:
        """Return the lengths that occur in some steps, longest first."""
        if len(steps) >= 2 * self.steps_per_epoch:  # contains at least one whole epoch
            return sorted(self.steps_by_length, reverse=True)
        return sorted({self.at(step).length for step in steps}, reverse=True)

    def summary(self) -> str:
        """Return in words the number of steps per length, and the share of padding."""
        shown = ", ".join(f"{length:,} x {count:,} steps" for length, count in self.steps_by_length.items())
        return f"{shown} per epoch; {100 * self.padding:.1f}% padding"


@dataclass(frozen=True)
class Shaping:
    """How rows become bins and steps: the options, and what the devices require."""

    packing: Packing
    max_length: int
    most: int
    """Maximum number of step lengths."""
    multiple: int
    parts: int

    def plan(
        self, lengths: np.ndarray, per_step: int, seed: int | None, steps: int = 0, epochs: float = 0
    ) -> StepPlan:
        """Return the plan of a run with a number of steps, or epochs, over rows of given lengths."""
        bins = pack(lengths, self.packing, self.max_length)
        descending = np.sort(bins.lengths)[::-1]
        # Sorted by length and cut, a step is as long as its first bin requires.
        needed = np.array(
            [padded_length(int(first), self.max_length, self.multiple) for first in descending[::per_step]]
        )
        times = steps / len(needed) if steps > 0 else epochs
        fewest = int(np.ceil(FEWEST / max(times, 1e-9)))
        buckets = bucket_lengths(needed, self.most if self.packing == "none" else 1, fewest)
        return StepPlan(bins, buckets, per_step, seed, self.parts)


class _Epoch(NamedTuple):
    """An epoch: its order of bins, and for each step its start, length and tokens, each int64 [steps]."""

    order: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    tokens: np.ndarray


@lru_cache(maxsize=4)  # consecutive steps share an epoch
def _epoch(plan: StepPlan, epoch: int) -> _Epoch:
    count, size = len(plan.bins), plan.per_step
    order = np.arange(count) if plan.seed is None else epoch_order(count, plan.seed, epoch)
    bucket = np.searchsorted(plan.buckets, plan.bins.lengths)
    order = order[np.argsort(-bucket[order], kind="stable")]
    starts = np.arange(0, count, size)
    if plan.seed is not None and len(plan.buckets) > 1:
        whole = count // size
        starts[:whole] = starts[_longest_first(epoch_order(whole, plan.seed, epoch, _STEPS))]
    lengths = np.array(plan.buckets)[bucket[order[starts]]]
    lengths = -(-lengths // plan.parts) * plan.parts
    ends = np.concatenate(([0], np.cumsum(plan.bins.lengths[order])))
    return _Epoch(order, starts, lengths, ends[np.minimum(starts + size, count)] - ends[starts])


def _longest_first(order: np.ndarray) -> np.ndarray:
    """Return an order of steps, which are numbered from the longest, with number 0 moved to the front."""
    found = order.copy()
    found[np.flatnonzero(order == 0)] = order[:1]
    found[:1] = 0
    return found


def step_batch(
    dataset: Sequence[Tokens],
    plan: StepPlan,
    step: int,
    *,
    accumulation: int,
    padding_id: int,
    part: Iterable[int] | None = None,
) -> Batch:
    """Return the batch of an optimizer step, counted from 0 over all epochs.

    Args:
        dataset: the rows that the plan was made for.
        plan: which rows the step takes.
        step: the step.
        accumulation: number of forward passes in the step, among which its bins are divided.
        padding_id: token id of the padding.
        part: which rows of each forward pass to make, by default all.

    Returns:
        Arrays [accumulation, rows or len(part), length]. If an epoch's last step has fewer bins, padding rows follow;
        real rows fill the passes in order.
    """
    chosen, length, _ = plan.at(step)
    rows = plan.per_step // accumulation
    part = range(rows) if part is None else list(part)
    places = [start + row for start in range(0, plan.per_step, rows) for row in part]
    filled = {index: int(chosen[place]) for index, place in enumerate(places) if place < len(chosen)}
    bins = [plan.bins.examples(dataset, bin) for bin in filled.values()]
    flat = packed_batch(bins, len(places), length, padding_id, list(filled))
    return Batch(*(array.reshape(accumulation, len(part), length) for array in flat))
