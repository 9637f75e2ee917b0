"""Rows of tokens as arrays of a fixed shape, and the order of an epoch.

An epoch's order sorts the raw output of a bit generator, whose stream NumPy keeps stable between releases;
`Generator.permutation` gives no such guarantee.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from lora_jax.data.tokens import Tokens


class Batch(NamedTuple):
    """Arrays [..., length] with leading axes [batch], or [accumulation, batch] for a step."""

    tokens: np.ndarray
    """int32: token ids, the padding id after a row's end."""
    positions: np.ndarray
    """int32: position in the segment from 0; 0 in padding."""
    segment_ids: np.ndarray
    """int32: 1, 2, … for the examples in a row, 0 in padding."""
    targets: np.ndarray
    """int32: the next token."""
    weights: np.ndarray
    """float32: the row's weight if the target is trained, otherwise 0."""


def padded_length(longest: int, max_length: int, multiple: int = 64, parts: int = 1) -> int:
    """Return the length that every row is padded to: `longest` rounded up to `multiple`, but at most max_length.

    In any case it is a multiple of `parts`, the number of devices that shard a row's tokens.
    """
    rounded = -(-longest // multiple) * multiple
    return -(-max(min(rounded, max_length), longest) // parts) * parts


def make_batch(examples: Sequence[Tokens], rows: int, length: int, padding_id: int) -> Batch:
    """Return examples as arrays [rows, length], one per row, followed by padding rows.

    Raises:
        ValueError: there are more examples than rows, or one is longer than length.
    """
    return packed_batch([[example] for example in examples], rows, length, padding_id)


def packed_batch(
    bins: Sequence[Sequence[Tokens]],
    rows: int,
    length: int,
    padding_id: int,
    places: Sequence[int] | None = None,
) -> Batch:
    """Return bins of examples as arrays [rows, length] at the ascending `places`, by default the first rows.

    The examples in a bin are consecutive segments of its row, and the first token of each is not a target. Other rows
    are padding.

    Raises:
        ValueError: there are more bins than rows, or one is longer than length.
    """
    if len(bins) > rows:
        raise ValueError(f"{len(bins)} examples do not fit in {rows} rows")
    lengths = np.zeros(rows, np.int64)
    lengths[list(range(len(bins)) if places is None else places)] = [sum(map(len, bin)) for bin in bins]
    if lengths.max(initial=0) > length:
        raise ValueError(f"an example of {lengths.max()} tokens does not fit in a length of {length}")
    filled = np.arange(length) < lengths[:, None]
    tokens = np.full((rows, length), padding_id, np.int32)
    positions, segment_ids = np.zeros((2, rows, length), np.int32)
    trained = np.zeros((rows, length), np.float32)
    examples = [example for bin in bins for example in bin]
    if examples:
        sizes = [len(example) for example in examples]
        tokens[filled] = np.concatenate([example.input_ids for example in examples])
        positions[filled] = np.concatenate([np.arange(size) for size in sizes])
        segment_ids[filled] = np.repeat([number for bin in bins for number in range(1, len(bin) + 1)], sizes)
        trained[filled] = np.concatenate([example.trained * example.weight for example in examples])
        trained[positions == 0] = 0
    targets = np.full((rows, length), padding_id, np.int32)
    weights = np.zeros((rows, length), np.float32)
    targets[:, :-1] = tokens[:, 1:]
    weights[:, :-1] = trained[:, 1:]
    return Batch(tokens, positions, segment_ids, targets, weights)


@lru_cache(maxsize=4)  # consecutive steps share an epoch
def epoch_order(rows: int, seed: int, epoch: int, *draw: int) -> np.ndarray:
    """Return the order of the rows in an epoch, int64 [rows]: a permutation decided by seed and epoch.

    `draw` distinguishes permutations of the same epoch.
    """
    stream = np.random.PCG64(np.random.SeedSequence((seed % 2**64, epoch, *draw)))
    order = np.argsort(stream.random_raw(rows), kind="stable")
    order.flags.writeable = False
    return order
