"""Rows of tokens in a memory-mapped Arrow file, so that they may exceed memory.

The file is an Arrow stream, as `datasets.Dataset.from_file` reads it, with these columns:

    input_ids list<int32>    trained list<bool>    targets int32 (trained tokens)    row int64    window int32
    cut int64 (tokens cut off)    weight float64    remarks uint8 (the bits of `Remark`)

All columns except the first two are held in memory, with the lengths: 37 bytes per row.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from lora_jax.data.remarks import Remark
from lora_jax.data.tokens import Tokens
from lora_jax.errors import Option, UserError
from lora_jax.hub.atomic import write_failure

SCALARS = {
    "targets": np.int32, "row": np.int64, "window": np.int32, "cut": np.int64, "weight": np.float64,
    "remarks": np.uint8,
}  # fmt: skip


def as_batch(examples: Sequence[Tokens]) -> Any:
    """Return rows of tokens as a pyarrow.RecordBatch with the columns of a store."""
    import pyarrow as pa

    offsets = np.cumsum([0, *map(len, examples)], dtype=np.int32)
    ids = np.concatenate([np.zeros(0, np.int32), *(example.input_ids for example in examples)])
    trained = np.concatenate([np.zeros(0, bool), *(example.trained for example in examples)])
    scalars = {
        "targets": [int(example.trained.sum()) for example in examples],
        "row": [example.row for example in examples],
        "window": [example.window for example in examples],
        "cut": [example.cut for example in examples],
        "weight": [example.weight for example in examples],
        "remarks": [int(example.remarks) for example in examples],
    }
    columns = {
        "input_ids": pa.ListArray.from_arrays(pa.array(offsets), pa.array(ids)),
        "trained": pa.ListArray.from_arrays(pa.array(offsets), pa.array(trained)),
        **{name: pa.array(np.asarray(column, SCALARS[name])) for name, column in scalars.items()},
    }
    return pa.record_batch(columns)


class StoreWriter:
    """An Arrow file that is written batch by batch; raises UserError if writing fails."""

    def __init__(self, file: Path) -> None:
        import pyarrow as pa

        self.file = file
        with self._writing():
            self._sink = pa.OSFile(str(file), "wb")
            self._writer = pa.ipc.new_stream(self._sink, as_batch([]).schema)
        self.rows = 0

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with self._writing():
            try:
                self._writer.close()
            finally:
                self._sink.close()

    def write(self, batch: Any) -> None:
        """Append a batch made by `as_batch`."""
        self.rows += batch.num_rows
        if batch.num_rows:
            with self._writing():
                self._writer.write_batch(batch)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            plain = OSError(error.errno, os.strerror(error.errno)) if error.errno else error
            raise UserError(
                f"{write_failure(self.file, plain)}; LORA_JAX_CACHE sets another folder for tokens; with "
                f"{Option('data.cache', False)} they go to TMPDIR"
            ) from error


class Store(Sequence[Tokens]):
    """The rows of an Arrow file. They stay readable after the file is removed."""

    def __init__(self, file: Path) -> None:
        """Map the file; raises an Arrow exception if it is damaged."""
        import pyarrow as pa

        table = pa.ipc.open_stream(pa.memory_map(str(file))).read_all()
        self._batches = [_Batch(batch) for batch in table.to_batches()]
        self._starts = np.cumsum([0, *(batch.rows for batch in self._batches)])
        columns = {name: [np.zeros(0, dtype)] for name, dtype in SCALARS.items()}
        for name, parts in columns.items():
            parts += [np.from_dlpack(chunk) for chunk in table.column(name).chunks]
        self.columns = {name: np.concatenate(parts) for name, parts in columns.items()}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[row] for row in range(len(self))[index]]
        row = range(len(self))[index]
        place = int(np.searchsorted(self._starts, row, side="right")) - 1
        ids, trained = self._batches[place].row(row - int(self._starts[place]))
        said = self.columns
        return Tokens(
            ids,
            trained,
            int(said["row"][row]),
            int(said["cut"][row]),
            float(said["weight"][row]),
            int(said["window"][row]),
            Remark(int(said["remarks"][row])),
        )

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens per row, int64 [rows]."""
        return np.concatenate([np.zeros(0, np.int64), *(batch.lengths for batch in self._batches)])

    @cached_property
    def checksum(self) -> int:
        """CRC-32 of the rows' ids, lengths, numbers of trained tokens, and weights."""
        columns = (self.lengths, self.columns["targets"], self.columns["weight"])
        found = 0
        for array in (*(batch.ids for batch in self._batches), *columns):
            found = zlib.crc32(np.ascontiguousarray(array).data, found)
        return found

    def largest(self) -> int:
        """Return the largest token id, or -1 if there is none."""
        return max((int(batch.ids.max(initial=-1)) for batch in self._batches), default=-1)

    def first_with(self, token: int) -> int:
        """Return the index of the first row with a token id of at least `token`."""
        return next(index for index, row in enumerate(self) if row.input_ids.max(initial=-1) >= token)


class _Batch:
    """One record batch, with its tokens as a view of the file.

    Arrow's `to_numpy` would import pandas if it is installed, which takes about a second.
    """

    def __init__(self, batch: Any) -> None:
        tokens, trained = batch.column("input_ids"), batch.column("trained")
        self.rows = batch.num_rows
        self._offsets = np.from_dlpack(tokens.offsets)
        self.ids = np.from_dlpack(tokens.values)
        bits = trained.values
        self._bits = np.frombuffer(bits.buffers()[1] or b"", np.uint8)
        self._first_bit = bits.offset

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self._offsets).astype(np.int64)

    def row(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        start, end = int(self._offsets[index]), int(self._offsets[index + 1])
        first, last = self._first_bit + start, self._first_bit + end
        bits = np.unpackbits(self._bits[first // 8 : -(-last // 8)], bitorder="little").view(bool)
        return self.ids[start:end], bits[first % 8 :][: end - start]
