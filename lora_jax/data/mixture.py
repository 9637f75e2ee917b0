"""Which rows of which source an epoch has: rows held out, and sources mixed by weights.

Rows are held out first, so that a row which the mixture repeats cannot be in both parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from lora_jax.data.batches import epoch_order
from lora_jax.data.dataset import TokenDataset
from lora_jax.data.tokenising import Counts
from lora_jax.errors import UserError

_NO_EPOCH = 2**32 - 1
"""Stands for the draw of the rows held out, so that no epoch's order repeats it; the draws of a mixture lie below."""

LONGEST_EPOCH = 10**9
"""Rows of an epoch that weights may ask for."""


def hold_out(dataset: TokenDataset, fraction: float, seed: int) -> tuple[TokenDataset, TokenDataset | None]:
    """Split off a share of the rows, drawn by the seed, for evaluation. Windows of one row stay together.

    Returns:
        The rows to train on and the rows held out, each in the order of the source; None for no share.

    Raises:
        UserError: a part would have no rows.
    """
    if fraction == 0:
        return dataset, None
    document = _documents(dataset)
    documents = int(document[-1]) + 1
    size = max(1, round(documents * fraction))
    if size >= documents:
        raise UserError(
            f"--data.eval_fraction {fraction}: leaves none of the {documents:,} row{'s' * (documents > 1)} of "
            f"{dataset.name} to train on; lower it or give --data.eval_path"
        )
    drawn = np.zeros(documents, bool)
    drawn[epoch_order(documents, seed, _NO_EPOCH)[:size]] = True
    held = drawn[document]
    evaluation = replace(dataset.select(np.flatnonzero(held)), counts=Counts())
    return dataset.select(np.flatnonzero(~held)), evaluation


def _documents(dataset: TokenDataset) -> np.ndarray:
    """Return for each row the number, from 0, of the row of the source that it is a window of, int64 [rows]."""
    # By part and row, not by the window's number: a window that has nothing to train on is not among the rows.
    places = np.stack([dataset.part_numbers, dataset.column("row")])
    return np.cumsum(np.concatenate(([0], np.diff(places).any(axis=0))))


def mixed(
    dataset: TokenDataset,
    weights: Sequence[float],
    stopping_strategy: Literal["first_exhausted", "all_exhausted"],
    seed: int,
) -> TokenDataset:
    """Return an epoch in which the paths of a data set have the shares that the weights say.

    A path with share p of an epoch of T rows gives round(p T) of them, at least one. T is the greatest for which no
    path repeats a row (first_exhausted), or the least for which each gives every row (all_exhausted). A path gives
    its rows as often as they all fit, and once more those that the seed draws.

    Args:
        dataset: the rows of one or several paths, each row once; the files of a folder are one path.
        weights: one for each path, in proportion to its share; none leaves the data set as it is.
        stopping_strategy: see above; the words are those of `datasets.interleave_datasets`.
        seed: seed of the draw.

    Raises:
        UserError: a path has no rows.
    """
    if not weights:
        return dataset
    of_path = dataset.path_numbers
    rows = np.bincount(of_path, minlength=len(dataset.paths))
    for path, count in zip(dataset.paths, rows, strict=True):
        if not count:
            raise UserError(
                f"--data.mixture_weights: no rows of {path} are left to mix; drop it from --data.path"
            )
    relative = np.asarray(weights, np.float64) / max(weights)
    shares = relative / relative.sum()
    pick = min if stopping_strategy == "first_exhausted" else max
    total = pick((rows / np.maximum(shares, 1e-300)).tolist())
    if total > LONGEST_EPOCH:
        raise UserError(
            f"--data.mixture_weights: an epoch would have {total:.2g} rows; give weights closer to each other, or "
            "--data.stopping_strategy first_exhausted"
        )
    chosen = []
    for number, (count, share) in enumerate(zip(rows.tolist(), shares.tolist(), strict=True)):
        wanted = max(1, round(total * share))
        times = np.full(count, wanted // count)
        times[epoch_order(count, seed, _NO_EPOCH - 1 - number)[: wanted % count]] += 1
        chosen.append(np.repeat(np.flatnonzero(of_path == number), times))
    return dataset.select(np.concatenate(chosen))
