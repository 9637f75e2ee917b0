"""Which rows of which source an epoch uses: held-out rows, and sources mixed by weight.

Rows are held out first, so that a row that the mixture repeats cannot be in both parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from lora_jax.data.batches import epoch_order
from lora_jax.data.dataset import TokenDataset
from lora_jax.data.tokenizing import Counts
from lora_jax.errors import Option, UserError

_NO_EPOCH = 2**32 - 1
"""Draw number for held-out rows, which no epoch's order uses; the draws of a mixture are below it."""

LONGEST_EPOCH = 10**9
"""Maximum number of rows per epoch that weights may result in."""


def hold_out(dataset: TokenDataset, fraction: float, seed: int) -> tuple[TokenDataset, TokenDataset | None]:
    """Hold out a random share of the rows for evaluation. Windows of one row stay together.

    Returns:
        The training rows and the held-out rows, each in the order of the source; None for a share of 0.

    Raises:
        UserError: one part would have no rows.
    """
    if fraction == 0:
        return dataset, None
    document = _documents(dataset)
    documents = int(document[-1]) + 1
    size = max(1, round(documents * fraction))
    if size >= documents:
        raise UserError(
            f"{Option('data.eval_fraction', fraction)}: leaves none of the {documents:,} "
            f"row{'s' * (documents > 1)} of {dataset.name} to train on; lower it or give {Option('data.eval_path')}"
        )
    drawn = np.zeros(documents, bool)
    drawn[epoch_order(documents, seed, _NO_EPOCH)[:size]] = True
    held = drawn[document]
    evaluation = replace(dataset.select(np.flatnonzero(held)), counts=Counts())
    return dataset.select(np.flatnonzero(~held)), evaluation


def _documents(dataset: TokenDataset) -> np.ndarray:
    """Return for each row the number, from 0, of the source row that it is a window of, int64 [rows]."""
    # By part and row, not by window number, because windows with nothing to train on have been left out.
    places = np.stack([dataset.part_numbers, dataset.column("row")])
    return np.cumsum(np.concatenate(([0], np.diff(places).any(axis=0))))


def mixed(
    dataset: TokenDataset,
    weights: Sequence[float],
    stopping_strategy: Literal["first_exhausted", "all_exhausted"],
    seed: int,
) -> TokenDataset:
    """Return an epoch in which the paths of a data set have the shares given by the weights.

    In an epoch of T rows, a path with share p has round(p T) rows, at least one. T is the largest number for which no
    path repeats a row (first_exhausted), or the smallest for which each path uses every row (all_exhausted). A path
    repeats all its rows as often as they fit; the rest is drawn with the seed.

    Args:
        dataset: the rows of one or several paths, each row once; the files in a folder are one path.
        weights: one per path, proportional to its share; if empty, the data set is not changed.
        stopping_strategy: see above; the values are those of `datasets.interleave_datasets`.
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
                f"{Option('data.mixture_weights')}: no rows of {path} are left to mix; drop it from "
                f"{Option('data.path')}"
            )
    relative = np.asarray(weights, np.float64) / max(weights)
    shares = relative / relative.sum()
    pick = min if stopping_strategy == "first_exhausted" else max
    total = pick((rows / np.maximum(shares, 1e-300)).tolist())
    if total > LONGEST_EPOCH:
        raise UserError(
            f"{Option('data.mixture_weights')}: an epoch would have {total:.2g} rows; give weights closer to each "
            f"other, or {Option('data.stopping_strategy', 'first_exhausted')}"
        )
    chosen = []
    for number, (count, share) in enumerate(zip(rows.tolist(), shares.tolist(), strict=True)):
        wanted = max(1, round(total * share))
        times = np.full(count, wanted // count)
        times[epoch_order(count, seed, _NO_EPOCH - 1 - number)[: wanted % count]] += 1
        chosen.append(np.repeat(np.flatnonzero(of_path == number), times))
    return dataset.select(np.concatenate(chosen))
