"""Parquet files, read one batch of rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.errors import UserError
from lora_jax.types import Object

BATCH = 256
"""Number of rows converted to Python objects at once."""


class ParquetFile:
    """The rows of a file; only the batch around the last requested row is in memory."""

    def __init__(self, file: Path) -> None:
        """Read the file's footer; raises UserError if that fails."""
        self.file, self.unit = file, "row"
        self._batch: list[Object] = []
        self._start = 0
        try:
            groups = self._opened.metadata
            sizes = [groups.row_group(group).num_rows for group in range(groups.num_row_groups)]
        except Exception as error:  # Arrow's exceptions have no common base
            raise _unreadable(f"{file}", error) from error
        self._ends = np.cumsum(sizes, dtype=np.int64)
        self._batches: Iterator[Any] = iter(())

    @cached_property
    def _opened(self) -> Any:
        from pyarrow.parquet import ParquetFile as Opened

        return Opened(self.file)

    @property
    def numbers(self) -> range:
        """1-based number of each row."""
        return range(1, len(self) + 1)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __iter__(self) -> Iterator[Object]:
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> Object:
        while not self._start <= index < self._start + len(self._batch):
            self._advance(index)
        return self._batch[index - self._start]

    def _advance(self, index: int) -> None:
        """Read the next batch, or start at the row's group unless the row lies ahead in the same group."""
        group = int(np.searchsorted(self._ends, index, side="right"))
        first = int(self._ends[group - 1]) if group else 0
        behind = self._start + len(self._batch)
        try:
            if not (self._batch and first <= behind <= index and self._start >= first):
                self._batches = self._opened.iter_batches(BATCH, row_groups=[group])
                behind = first
            self._batch, self._start = without_absent(next(self._batches).to_pylist()), behind
        except Exception as error:
            raise _unreadable(f"{self.file} row {behind + 1} or later", error) from error


def _unreadable(where: str, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    return UserError(f"{where}: cannot be read as Parquet ({reason}); fix the file")


def without_absent(value: Any, *, column: bool = True) -> Any:
    """Return rows without the nulls with which Arrow fills missing keys of nested objects; columns keep theirs."""
    if isinstance(value, dict):
        return {
            key: without_absent(item, column=False)
            for key, item in value.items()
            if column or item is not None
        }
    return [without_absent(item, column=column) for item in value] if isinstance(value, list) else value
