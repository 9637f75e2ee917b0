"""Packing beside TRL's: as few rows, filled alike."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from trl.data_utils import pack_dataset

from lora_jax.data.packing import pack

CAPACITY = 1024


def drawn(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    if kind == "chat":
        return np.clip(rng.lognormal(5.3, 0.7, 3000).astype(int) + 1, 1, CAPACITY)
    return rng.integers(1, CAPACITY + 1, 1000)


def packed_by_trl(lengths: np.ndarray, strategy: str, **settings: Any) -> list[list[int]]:
    """The bins, each row's tokens being its number."""
    rows = Dataset.from_dict({"input_ids": [[row] * length for row, length in enumerate(lengths.tolist())]})
    return pack_dataset(rows, CAPACITY, strategy, settings)["input_ids"][:]


@pytest.mark.parametrize("kind", ["chat", "uniform"])
def test_best_fit_decreasing_fills_its_bins_as_trl_does(kind: str) -> None:
    lengths = drawn(kind)
    theirs = packed_by_trl(lengths, "bfd", batch_size=len(lengths))
    assert sorted(pack(lengths, "bfd", CAPACITY).lengths.tolist()) == sorted(map(len, theirs))


def test_all_rows_at_once_take_fewer_bins_than_trls_batches_of_rows() -> None:
    lengths = drawn("chat")
    assert len(pack(lengths, "bfd", CAPACITY)) < len(packed_by_trl(lengths, "bfd"))


def test_wrapping_cuts_where_trl_cuts() -> None:
    lengths = drawn("chat")
    theirs = packed_by_trl(lengths, "wrapped", batch_size=len(lengths))
    ours = pack(lengths, "wrapped", CAPACITY)
    assert ours.lengths.tolist() == [len(ids) for ids in theirs]
    np.testing.assert_array_equal(np.repeat(ours.rows, ours.sizes), np.concatenate(theirs))
