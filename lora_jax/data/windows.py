"""Rows longer than the greatest length: cut at the end, cut into windows, or left out."""

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
    """Return a row's tokens as parts of at most max_length: one, its windows, or none where it is dropped.

    Args:
        ids: int32 [length].
        trained: bool [length].
        max_length: greatest number of tokens of a part.
        mode: keep_start cuts what is beyond it off; windows cuts the row into parts that follow each other, each
            full but for the last; drop leaves the row out.
        row: the row's number.
        weight: the row's weight.

    The first token of a window is no target, as nothing in the window comes before it; all others are as in the
    row. One token that would be left over, which could not be trained, takes another one into the last window.
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
