"""Sources of rows: local files, or a data set on the Hub.

Hub data sets are read through `datasets`, Parquet files through Arrow. JSON Lines and CSV are parsed here, because a
message about a row must name its line and the columns that it has: `datasets` reads JSON through Arrow, which gives
every row the union of all columns (with nulls), rejects rows whose types differ, and reads blocks instead of lines.
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
from lora_jax.errors import Option, UserError
from lora_jax.types import Object

Row = Object
PATH = Option("data.path")
"""The option that gives rows, unless a message is to name another."""


class Rows:
    """Rows in order, each with a position that the user can find."""

    def __init__(self, name: str, source: RowSource, kept: Sequence[int] | None = None) -> None:
        """Take the `kept` rows of a source, by default all."""
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
        """Return the 1-based number of a row: its line in JSON Lines, otherwise its position among all rows."""
        return self._source.numbers[self._kept[index]]

    def where(self, index: int) -> str:
        """Return the position of a row in words, such as "rows.jsonl line 3"."""
        return f"{self.name} {self.unit} {self.number(index)}"

    def pieces(self) -> Iterator[bytes | Row]:
        """Yield the rows; those of a text file as bytes, for `parser`, which may run in another process."""
        if isinstance(self._source, CutFile):
            return self._source.pieces(self._kept)
        return iter(self)

    @property
    def parser(self) -> Parser | None:
        """Parser of a row's bytes; None if `pieces` yields rows."""
        return self._source.parse if isinstance(self._source, CutFile) else None


@dataclass(frozen=True)
class Source:
    """Rows that have been found but not yet read: those of one file, or of a data set on the Hub."""

    path: str
    """The path as given: a file, a folder or pattern that the file belongs to, or an id on the Hub."""
    split: str
    option: Option
    """The option that gave the path, for messages."""
    file: Path | None
    """None for a data set on the Hub."""
    kept: tuple[range, ...] | None = None
    """Rows of the file that a slice over several files selects; None selects those of the split."""

    @property
    def name(self) -> str:
        """Name of the rows in messages."""
        return str(self.file) if self.file else self.origin

    @property
    def origin(self) -> str:
        """Name of the path in messages."""
        return self.path if self.file else f"{self.path} {self.split}"

    @property
    def bytes(self) -> int:
        """Size of the file, estimated if it is compressed; 0 for a data set on the Hub."""
        if self.file is None:
            return 0
        return self.file.stat().st_size * (4 if self.file.suffix.lower() in PACKED else 1)

    def state(self) -> tuple[int, int] | None:
        """Return a value that changes when the file is written to; None for a data set on the Hub."""
        if self.file is None:
            return None
        found = self.file.stat()
        return found.st_size, found.st_mtime_ns

    @cached_property
    def _hub(self) -> HubRows:
        return read_hub(self.path, self.split, self.option)

    def content(self) -> str:
        """Return a digest of the rows, whatever their location; raises UserError if they cannot be read."""
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
        """Return the rows, at least one; raises UserError if there are none or they cannot be read."""
        if self.file is None:
            return self._not_empty(Rows(self.origin, self._hub))
        rows = self.whole()
        kept = self.kept or _ranges(self.split, len(rows), f"{self.option} {self.name}")
        return self._not_empty(_take(rows, kept))

    def whole(self) -> Rows:
        """Return all rows of the file, at least one; raises UserError if there are none or they cannot be read."""
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
        """Return the error for rows that the operating system could not read."""
        reason = error.strerror or type(error).__name__
        return UserError(f"{self.option} {self.name}: cannot be read ({reason}); check the file")

    def _not_empty(self, rows: Rows) -> Rows:
        if not rows:
            raise _no_rows(self.option, self.name, self.split)
        return rows


def _no_rows(option: Option, name: str, split: str) -> UserError:
    return UserError(f"{option} {name}: split {split!r} has no rows; widen the slice")


def find_rows(path: str, split: str, *, option: Option = PATH) -> list[Source]:
    """Return the sources that a path stands for: a Hub data set, a file, or each of several files. Reads no rows.

    Args:
        path: a file (see READERS), a folder or a pattern; otherwise the id of a data set on the Hub, with a colon and a
            configuration if it has several ("openai/gsm8k:main").
        split: a split or a slice ("train[:200]", "train[10%:]"). Files have one split, "train", and are sliced as if
            they were one file.
        option: the option that gave the path, for messages.

    Raises:
        UserError: there is no such path, or the type of a file is unknown.
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


def read_rows(path: str, split: str, *, option: Option = PATH) -> Rows:
    """Return the rows of a file or of a Hub data set, found and read as by `find_rows` and `Source.read`."""
    (source,) = find_rows(path, split, option=option)
    return source.read()


_WHOLE = ("train", "all")


def _take(rows: Rows, kept: Sequence[range]) -> Rows:
    """Return the rows in some ranges."""
    chosen = kept[0] if len(kept) == 1 else [index for piece in kept for index in piece]
    return rows if chosen == range(len(rows)) else Rows(rows.name, rows._source, chosen)


def _ranges(split: str, size: int, what: str) -> list[range]:
    """Return the ranges of `size` rows that a split selects, by the rules of `datasets`."""
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
