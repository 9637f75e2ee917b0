"""Rows of tokens as arrays of a fixed shape, as a pure function of the step.

A step's batch depends on the data, the seed and the step's number alone, so that a run that goes on from
a checkpoint sees the rows that an uninterrupted one would have seen. The order of an epoch sorts the raw
output of a bit generator, whose stream NumPy keeps from release to release; `Generator.permutation` has no
such promise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lora_jax.data.tokens import Tokens


class Batch(NamedTuple):
    """Arrays [..., length]; leading axes are [batch], or [accumulation, batch] for a step."""

    tokens: np.ndarray
    """int32: token ids, the padding id behind a row's end."""
    positions: np.ndarray
    """int32: place in the row from 0; 0 in padding."""
    segment_ids: np.ndarray
    """int32: 1 in the row, 0 in padding."""
    targets: np.ndarray
    """int32: the next token."""
    weights: np.ndarray
    """float32: 1 where the target is trained, else 0."""


def padded_length(longest: int, max_length: int, multiple: int = 64, parts: int = 1) -> int:
    """Return the length that every row is padded to: a multiple, but no more than max_length.

    It is a multiple of `parts`, the devices that share out a row's tokens, in any case.
    """
    rounded = -(-longest // multiple) * multiple
    return -(-max(min(rounded, max_length), longest) // parts) * parts


def make_batch(
    examples: Sequence[Tokens], rows: int, length: int, padding_id: int, places: Sequence[int] | None = None
) -> Batch:
    """Return examples as arrays [rows, length], at `places` (the first rows by default); other rows are padding.

    Raises:
        ValueError: there are more examples than rows, or one is longer than length.
    """
    if len(examples) > rows:
        raise ValueError(f"{len(examples)} examples do not fit in {rows} rows")
    lengths = np.zeros(rows, np.int64)
    lengths[list(range(len(examples)) if places is None else places)] = [len(example) for example in examples]
    if lengths.max(initial=0) > length:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit in a length of {length}")
    column = np.arange(length)
    filled = column < lengths[:, None]
    tokens = np.full((rows, length), padding_id, np.int32)
    trained = np.zeros((rows, length), np.float32)
    if examples:
        tokens[filled] = np.concatenate([example.input_ids for example in examples])
        trained[filled] = np.concatenate([example.trained for example in examples])
    targets = np.full((rows, length), padding_id, np.int32)
    weights = np.zeros((rows, length), np.float32)
    targets[:, :-1] = tokens[:, 1:]
    weights[:, :-1] = trained[:, 1:]
    positions = np.where(filled, column, 0).astype(np.int32)
    return Batch(tokens, positions, filled.astype(np.int32), targets, weights)


def steps_per_epoch(rows: int, rows_per_step: int) -> int:
    """Return the number of steps that see each row once; padding fills the last one."""
    return -(-rows // rows_per_step)


@lru_cache(maxsize=2)  # successive steps share an epoch
def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """Return the order of the rows in an epoch, int64 [rows]: a permutation that seed and epoch decide."""
    stream = np.random.PCG64(np.random.SeedSequence((seed % 2**64, epoch)))
    order = np.argsort(stream.random_raw(rows), kind="stable")
    order.flags.writeable = False
    return order


def step_batch(
    dataset: Sequence[Tokens],
    step: int,
    *,
    seed: int,
    batch: int,
    accumulation: int,
    length: int,
    padding_id: int,
    part: Sequence[int] | None = None,
) -> Batch:
    """Return the batch of an optimiser step, counted from 0 over all epochs.

    Args:
        dataset: the training rows.
        step: the step; its epoch is step // steps_per_epoch.
        seed: seed of the order.
        batch: rows in one forward pass, over all devices.
        accumulation: forward passes in the step.
        length: length that rows are padded to.
        padding_id: token id of the padding.
        part: which rows of each forward pass to make, all by default.

    Returns:
        Arrays [accumulation, batch or len(part), length]. Where an epoch's last step has fewer rows, rows of padding
        follow; they are dealt so that real rows fill the passes in order.
    """
    chosen = rows_of(step, len(dataset), seed, batch * accumulation)
    part = range(batch) if part is None else part
    places = [start + row for start in range(0, batch * accumulation, batch) for row in part]
    examples = [dataset[int(chosen[place])] for place in places if place < len(chosen)]
    filled = [index for index, place in enumerate(places) if place < len(chosen)]
    flat = make_batch(examples, len(places), length, padding_id, filled)
    return Batch(*(array.reshape(accumulation, len(part), length) for array in flat))


def tokens_of(lengths: np.ndarray, step: int, *, seed: int, rows_per_step: int) -> int:
    """Return the real tokens of a step, counted from 0, given the length of each row."""
    return int(lengths[rows_of(step, len(lengths), seed, rows_per_step)].sum())


def tokens_before(lengths: np.ndarray, step: int, *, seed: int, rows_per_step: int) -> int:
    """Return the real tokens of all steps before `step`, counted from 0, given the length of each row."""
    epochs, rest = divmod(step, steps_per_epoch(len(lengths), rows_per_step))
    begun = range(step - rest, step)
    return epochs * int(lengths.sum()) + sum(
        tokens_of(lengths, past, seed=seed, rows_per_step=rows_per_step) for past in begun
    )


def rows_of(step: int, rows: int, seed: int, rows_per_step: int) -> np.ndarray:
    """Return the indices of the rows of a step counted from 0, fewer in the last step of an epoch."""
    epoch, place = divmod(step, steps_per_epoch(rows, rows_per_step))
    return epoch_order(rows, seed, epoch)[place * rows_per_step : (place + 1) * rows_per_step]


def eval_batches(
    dataset: Sequence[Tokens], batch: int, length: int, padding_id: int, part: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Yield all rows in order as arrays [batch, length], rows of padding filling the last batch.

    `part` says which rows of each batch to make, all by default.
    """
    for start in range(0, len(dataset), batch):
        rows = [start + row for row in (range(batch) if part is None else part)]
        examples = [dataset[row] for row in rows if row < len(dataset)]
        yield make_batch(examples, len(rows), length, padding_id)
