"""Where the rows come from: a local file, or a data set on the Hub.

Hub data sets are read through `datasets`, Parquet files through Arrow. JSON Lines and CSV are parsed here: `datasets`
reads JSON through Arrow, which gives every row the union of all columns (absent ones as nulls), refuses rows
whose types differ, and knows blocks of bytes rather than lines, whereas a message about a row must name its line
and the columns that it has.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import file_digest
from pathlib import Path
from typing import Any, overload

from lora_jax.data.files import READERS, RowSource
from lora_jax.data.lines import CutFile, Parser
from lora_jax.data.remote import HubRows, read_hub
from lora_jax.errors import UserError, listing, nearest
from lora_jax.paths import on_disk

Row = dict[str, Any]

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


class Rows:
    """Rows in order, each with the place where the user finds it."""

    def __init__(self, name: str, source: RowSource, kept: Sequence[int] | None = None) -> None:
        """Take `kept` of a source's rows, all by default."""
        self.name = name
        self.unit = source.unit
        self._source = source
        self._kept = range(len(source)) if kept is None else kept

    def __len__(self) -> int:
        return len(self._kept)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return Rows(self.name, self._source, self._kept[index])
        return self._source[self._kept[index]]

    def __iter__(self) -> Iterator[Row]:
        if self._kept == range(len(self._source)):
            return iter(self._source)
        return map(self.__getitem__, range(len(self)))

    def number(self, index: int) -> int:
        """Return the 1-based number of a row: its line in JSON Lines, its place among all rows elsewhere."""
        return self._source.numbers[self._kept[index]]

    def where(self, index: int) -> str:
        """Return the place of a row in words, such as "rows.jsonl line 3"."""
        return f"{self.name} {self.unit} {self.number(index)}"

    def pieces(self) -> Iterator[bytes | Row]:
        """Yield the rows, those of a text file as bytes, which `parser` makes rows of, perhaps in another process."""
        if isinstance(self._source, CutFile):
            return self._source.pieces(self._kept)
        return iter(self)

    @property
    def parser(self) -> Parser | None:
        """What makes a row of its bytes; None where `pieces` yields rows."""
        return self._source.parse if isinstance(self._source, CutFile) else None


@dataclass(frozen=True)
class Source:
    """Rows that are there but not yet read."""

    path: str
    split: str
    option: str
    """The option that gave the path, for messages."""
    file: Path | None
    """None for a data set on the Hub."""

    @property
    def name(self) -> str:
        """What the user knows the rows by."""
        return self.path if self.file else f"{self.path} {self.split}"

    @property
    def bytes(self) -> int:
        """Size of the file; 0 for a data set on the Hub."""
        return self.file.stat().st_size if self.file else 0

    def state(self) -> tuple[int, int] | None:
        """Return what changes when the file is written to; None for a data set on the Hub."""
        if self.file is None:
            return None
        found = self.file.stat()
        return found.st_size, found.st_mtime_ns

    @cached_property
    def _hub(self) -> HubRows:
        return read_hub(self.path, self.split, self.option)

    def content(self) -> str:
        """Return what tells these rows from others, wherever they lie; raises UserError where they cannot be read."""
        if self.file is None:
            return f"hub {self._hub.fingerprint}"
        try:
            with self.file.open("rb") as opened:
                digest = file_digest(opened, "sha256").hexdigest()
        except OSError as error:
            raise self.unreadable(error) from error
        return f"{self.file.suffix.lower()} {digest} {self.split}"

    def read(self) -> Rows:
        """Return the rows, at least one; raises UserError where there are none or they cannot be read."""
        if self.file is None:
            return self._not_empty(Rows(self.name, self._hub))
        try:
            source = READERS[self.file.suffix.lower()](self.file)
        except OSError as error:
            raise self.unreadable(error) from error
        if not len(source):
            raise UserError(f"{self.option} {self.path}: has no rows; give a file with at least one")
        return self._not_empty(_take(Rows(self.path, source), self.split, self.option))

    def unreadable(self, error: OSError) -> UserError:
        """Return the error for rows that the system would not let be read."""
        reason = error.strerror or type(error).__name__
        return UserError(f"{self.option} {self.path}: cannot be read ({reason}); check the file")

    def _not_empty(self, rows: Rows) -> Rows:
        if not rows:
            raise UserError(f"{self.option} {self.path}: split {self.split!r} has no rows; widen the slice")
        return rows


def find_rows(path: str, split: str, *, option: str = "--data.path") -> Source:
    """Return the rows of a file or of a Hub data set, not yet read.

    Args:
        path: a .json, .jsonl, .ndjson, .csv or .parquet file; else a data set's id on the Hub, with its
            configuration after a colon where it has several ("openai/gsm8k:main").
        split: a split, slices included ("train[:200]", "train[10%:]"); a file has the one split "train".
        option: the option that gave the path, for messages.

    Raises:
        UserError: there is no such path, or a file of another kind.
    """
    if not path:
        raise UserError(f"{option}: needed; give a file ({listing(READERS)}) or a Hub id")
    file = on_disk(path, option)
    if file.is_dir():
        found = sorted(child.name for child in file.iterdir() if child.suffix.lower() in READERS)
        remedy = f"give one of its files: {listing(found)}" if found else f"give a file ({listing(READERS)})"
        raise UserError(f"{option} {path}: is a folder; {remedy}")
    if not file.exists():
        if file.suffix.lower() in READERS or not _HUB_ID.fullmatch(path):
            raise UserError(f"{option} {path}: no such file; check the path.{_neighbour(file)}")
        return Source(path, split, option, None)
    if file.suffix.lower() not in READERS:
        raise UserError(
            f"{option} {path}: unknown extension {file.suffix!r}; give a file of {listing(READERS)}"
        )
    return Source(path, split, option, file)


def read_rows(path: str, split: str, *, option: str = "--data.path") -> Rows:
    """Return the rows of a file or of a Hub data set, found and read as `find_rows` and `Source.read` do."""
    return find_rows(path, split, option=option).read()


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
    pieces = [range(len(rows))[part.from_ : part.to] for part in parts]
    chosen = pieces[0] if len(pieces) == 1 else [index for piece in pieces for index in piece]
    return Rows(rows.name, rows._source, chosen)
