"""Where the rows come from: a local file, or a data set on the Hub.

CSV and Parquet files and Hub data sets are read through `datasets`. JSON and JSON Lines are parsed here:
`datasets` reads them through Arrow, which gives every row the union of all columns (absent ones as
nulls), refuses rows whose types differ, and knows blocks of bytes rather than lines, whereas a message
about a row must name its line and the columns that it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from lora_jax.data.files import READERS, Table
from lora_jax.data.remote import read_hub
from lora_jax.errors import UserError, listing, nearest

Row = dict[str, Any]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


class Rows(Sequence[Row]):
    """Rows in order, each with the place where the user finds it."""

    def __init__(self, name: str, table: Table) -> None:
        self.name = name
        self.unit = table.unit
        self._rows = table.rows
        self._numbers = table.numbers

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            kept = range(len(self))[index]
            numbers = [self._numbers[i] for i in kept]
            return Rows(self.name, Table([self._rows[i] for i in kept], numbers, self.unit))
        return self._rows[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows)

    def number(self, index: int) -> int:
        """Return the 1-based number of a row: its line in JSON Lines, its place among all rows elsewhere."""
        return self._numbers[index]

    def where(self, index: int) -> str:
        """Return the place of a row in words, such as "rows.jsonl line 3"."""
        return f"{self.name} {self.unit} {self.number(index)}"


def read_rows(path: str, split: str, *, option: str = "--data.path") -> Rows:
    """Return the rows of a file or of a Hub data set.

    Args:
        path: a .json, .jsonl, .ndjson, .csv or .parquet file; else a data set's id on the Hub, with its
            configuration after a colon where it has several ("openai/gsm8k:main").
        split: a split, slices included ("train[:200]", "train[10%:]"); a file has the one split "train".
        option: the option that gave the path, for messages.

    Raises:
        UserError: the path or the split does not exist, or the rows cannot be read.
    """
    if not path:
        raise UserError(f"{option}: needed; give a file ({listing(READERS)}) or a Hub id")
    file = Path(path).expanduser()
    if file.is_dir():
        found = sorted(child.name for child in file.iterdir() if child.suffix.lower() in READERS)
        remedy = f"give one of its files: {listing(found)}" if found else f"give a file ({listing(READERS)})"
        raise UserError(f"{option} {path}: is a folder; {remedy}")
    if not file.exists():
        if file.suffix.lower() in READERS or not _HUB_ID.fullmatch(path):
            raise UserError(f"{option} {path}: no such file; check the path.{_neighbour(file)}")
        return _not_empty(Rows(f"{path} {split}", read_hub(path, split, option)), path, split, option)
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(
            f"{option} {path}: unknown extension {file.suffix!r}; give a file of {listing(READERS)}"
        )
    try:
        table = reader(file)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"{option} {path}: cannot be read ({reason}); check the file") from error
    if not table.rows:
        raise UserError(f"{option} {path}: has no rows; give a file with at least one")
    return _not_empty(_take(Rows(path, table), split, option), path, split, option)


def _not_empty(rows: Rows, path: str, split: str, option: str) -> Rows:
    if not rows:
        raise UserError(f"{option} {path}: split {split!r} has no rows; widen the slice")
    return rows


def _neighbour(file: Path) -> str:
    folder = file.parent
    return nearest(file.name, (child.name for child in folder.iterdir())) if folder.is_dir() else ""


def _take(rows: Rows, split: str, option: str) -> Rows:
    """Return the part of a file's rows that the split names, by the rules of `datasets` itself."""
    if split in ("train", "all"):
        return rows
    from datasets import ReadInstruction  # slow to import, and rarely needed for a file

    sizes = {"train": len(rows), "all": len(rows)}
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{option} {rows.name}: split {split!r} is not known; a file has the one split train, and slices "
            "of it such as train[:200] or train[10%:]"
        ) from error
    chosen = [index for part in parts for index in range(len(rows))[part.from_ : part.to]]
    return Rows(rows.name, Table([rows[i] for i in chosen], [rows.number(i) for i in chosen], rows.unit))
