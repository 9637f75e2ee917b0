"""Where the rows come from: local files, or a data set on the Hub.

Hub data sets are read through `datasets`, Parquet files through Arrow. JSON Lines and CSV are parsed here: `datasets`
reads JSON through Arrow, which gives every row the union of all columns (absent ones as nulls), refuses rows
whose types differ, and knows blocks of bytes rather than lines, whereas a message about a row must name its line
and the columns that it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import file_digest
from pathlib import Path
from typing import overload

from lora_jax.data.files import RowSource, kind_of, read_file
from lora_jax.data.lines import CutFile, Parser
from lora_jax.data.locate import data_files
from lora_jax.data.packed import PACKED
from lora_jax.data.remote import HubRows, read_hub
from lora_jax.errors import UserError
from lora_jax.types import Object

Row = Object


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
    """Rows that are there but not yet read: of one file, or of a data set on the Hub."""

    path: str
    """What the user gave: a file, a folder or a pattern that the file is of, or an id on the Hub."""
    split: str
    option: str
    """The option that gave the path, for messages."""
    file: Path | None
    """None for a data set on the Hub."""
    kept: tuple[range, ...] | None = None
    """Rows of the file that a slice of several files takes; None takes those of the split."""

    @property
    def name(self) -> str:
        """What the user knows the rows by."""
        return str(self.file) if self.file else self.origin

    @property
    def origin(self) -> str:
        """What the user knows the path by."""
        return self.path if self.file else f"{self.path} {self.split}"

    @property
    def bytes(self) -> int:
        """Size of the file, roughly where it is compressed; 0 for a data set on the Hub."""
        if self.file is None:
            return 0
        return self.file.stat().st_size * (4 if self.file.suffix.lower() in PACKED else 1)

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
        kind = (
            "".join(self.file.suffixes[-2:]).lower()
            if self.file.suffix.lower() in PACKED
            else kind_of(self.file)
        )
        return f"{kind} {digest} {self.split if self.kept is None else self.kept}"

    def read(self) -> Rows:
        """Return the rows, at least one; raises UserError where there are none or they cannot be read."""
        if self.file is None:
            return self._not_empty(Rows(self.origin, self._hub))
        rows = self.whole()
        kept = self.kept or _ranges(self.split, len(rows), f"{self.option} {self.name}")
        return self._not_empty(_take(rows, kept))

    def whole(self) -> Rows:
        """Return all rows of the file, at least one; raises UserError where there are none or they cannot be read."""
        if self.file is None:
            raise ValueError(f"{self.path} is no file")
        try:
            source = read_file(self.file)
        except OSError as error:
            raise self.unreadable(error) from error
        if not len(source):
            raise UserError(f"{self.option} {self.name}: has no rows; give a file with at least one")
        return Rows(self.name, source)

    def unreadable(self, error: OSError) -> UserError:
        """Return the error for rows that the system would not let be read."""
        reason = error.strerror or type(error).__name__
        return UserError(f"{self.option} {self.name}: cannot be read ({reason}); check the file")

    def _not_empty(self, rows: Rows) -> Rows:
        if not rows:
            raise _no_rows(self.option, self.name, self.split)
        return rows


def _no_rows(option: str, name: str, split: str) -> UserError:
    return UserError(f"{option} {name}: split {split!r} has no rows; widen the slice")


def find_rows(path: str, split: str, *, option: str = "--data.path") -> list[Source]:
    """Return the rows that a path stands for, not yet read: of a Hub data set, of a file, or of each of several files.

    Args:
        path: a file (see READERS), a folder, a pattern; else a data set's id on the Hub, with its configuration after
            a colon where it has several ("openai/gsm8k:main").
        split: a split, slices included ("train[:200]", "train[10%:]"); files have the one split "train", of which a
            slice takes rows as if they were one file.
        option: the option that gave the path, for messages.

    Raises:
        UserError: there is no such path, or a file of another kind.
    """
    files = data_files(path, option)
    sources = [Source(path, split, option, file) for file in files or [None]]
    if len(sources) == 1 or split in _WHOLE:
        return sources
    sizes = [len(source.whole()) for source in sources]
    taken = _ranges(split, sum(sizes), f"{option} {path}")
    found, start = [], 0
    for source, size in zip(sources, sizes, strict=True):
        own = [range(max(part.start - start, 0), min(part.stop - start, size)) for part in taken]
        if any(own):
            found.append(replace(source, kept=tuple(part for part in own if part)))
        start += size
    if not found:
        raise _no_rows(option, path, split)
    return found


def read_rows(path: str, split: str, *, option: str = "--data.path") -> Rows:
    """Return the rows of a file or of a Hub data set, found and read as `find_rows` and `Source.read` do."""
    (source,) = find_rows(path, split, option=option)
    return source.read()


_WHOLE = ("train", "all")


def _take(rows: Rows, kept: Sequence[range]) -> Rows:
    """Return the rows in some ranges."""
    chosen = kept[0] if len(kept) == 1 else [index for piece in kept for index in piece]
    return rows if chosen == range(len(rows)) else Rows(rows.name, rows._source, chosen)


def _ranges(split: str, size: int, what: str) -> list[range]:
    """Return the part of so many rows that the split names, by the rules of `datasets` itself."""
    if split in _WHOLE:
        return [range(size)]
    from datasets import ReadInstruction  # slow to import, and rarely needed for a file

    try:
        parts = ReadInstruction.from_spec(split).to_absolute({"train": size, "all": size})
    except (ValueError, AssertionError) as error:
        raise UserError(
            f"{what}: split {split!r} is unknown; a file has only the split train, and slices "
            "of it such as train[:200] or train[10%:]"
        ) from error
    return [range(size)[part.from_ : part.to] for part in parts]
