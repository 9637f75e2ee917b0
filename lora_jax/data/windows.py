"""Rows longer than the maximum length: cut at the end, split into windows, or dropped."""

from __future__ import annotations

from typing import Literal

import numpy as np

from lora_jax.data.tokens import Tokens

TruncationMode = Literal["keep_start", "windows", "drop"]


def fitted(
    ids: np.ndarray,
    trained: np.ndarray,
    max_length: int,
    mode: TruncationMode,
    *,
    row: int,
    weight: float = 1.0,
) -> list[Tokens]:
    """Return a row's tokens as parts of at most max_length tokens: one part, several windows, or none if dropped.

    Args:
        ids: int32 [length].
        trained: bool [length].
        max_length: maximum number of tokens per part.
        mode: keep_start cuts off the rest; windows splits the row into consecutive parts, all full except the last;
            drop leaves the row out.
        row: the row's number.
        weight: the row's weight.

    The first token of a window is not a target, because nothing in the window precedes it; all others are as in the
    row. If a single token would remain, which could not be trained, the last window takes one more.
    """
    length = len(ids)
    if length <= max_length:
        return [Tokens(ids, trained, row, 0, weight)]
    if mode == "drop":
        return []
    if mode == "keep_start":
        return [Tokens(ids[:max_length], trained[:max_length], row, length - max_length, weight)]
    starts = list(range(0, length, max_length))
    if length - starts[-1] == 1 and max_length > 2:
        starts[-1] -= 1
    parts = []
    for number, (start, end) in enumerate(zip(starts, [*starts[1:], length], strict=True), start=1):
        targets = trained[start:end].copy()
        targets[0] = False
        parts.append(Tokens(ids[start:end], targets, row, 0, weight, number))
    return parts
